// The label of each row of a batch, int64 or int32, on CPU and CUDA.
#pragma once

#include "common.h"
#include "math.h"

namespace fcos_ext {

struct Labels {
  const void* data;  // null where an operator may go without: its rows all count
  bool is_int64;
  FCOS_INLINE int64_t operator[](int64_t row) const {
    return is_int64 ? static_cast<const int64_t*>(data)[row]
                    : int64_t(static_cast<const int32_t*>(data)[row]);
  }
};

// Of a contiguous tensor.
inline Labels labels_of(const Tensor& labels) {
  return {labels.const_data_ptr(), labels.scalar_type() == ScalarType::Long};
}

}  // namespace fcos_ext
