// Integers of a tensor that may be int64 or int32 (labels, offsets, counts), on CPU and CUDA.
#pragma once

#include "common.h"
#include "math.h"

namespace fcos_ext {

struct Integers {
  const void* data;  // null where an operator may go without
  bool is_int64;
  FCOS_INLINE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i]
                    : int64_t(static_cast<const int32_t*>(data)[i]);
  }
};

// Of a contiguous tensor.
inline Integers integers_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long};
}

}  // namespace fcos_ext
