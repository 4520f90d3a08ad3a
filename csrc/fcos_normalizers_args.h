// The argument rules of fcos_normalizers, the same for CPU and CUDA.
#pragma once

#include "checks.h"
#include "integers.h"

namespace fcos_ext {

inline void check_fcos_normalizers(const Tensor& labels, const Tensor& centerness,
                                   int64_t num_classes) {
  constexpr const char* kOp = "fcos_normalizers";
  check_integer(kOp, "labels", labels);
  STD_TORCH_CHECK(centerness.scalar_type() == ScalarType::Float, kOp,
                  ": centerness must be Float, got ",
                  torch::headeronly::toString(centerness.scalar_type()));
  STD_TORCH_CHECK(centerness.sizes().equals(labels.sizes()), kOp,
                  ": centerness must have the shape of labels");
  check_same_device(kOp, "labels", labels, "centerness", centerness);
  STD_TORCH_CHECK(num_classes >= 0, kOp, ": num_classes must be >= 0, got ", num_classes);
}

}  // namespace fcos_ext
