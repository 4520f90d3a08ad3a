// Rules that the arguments of several operators share, each with its message.
#pragma once

#include "common.h"

namespace fcos_ext {

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), op, ": ", name, " must be floating point, got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_integer(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, op,
                  ": ", name, " must be int64 or int32, got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* a_name, const Tensor& a,
                              const char* b_name, const Tensor& b) {
  STD_TORCH_CHECK(a.device() == b.device(), op, ": ", a_name, " and ", b_name,
                  " must be on the same device");
}

// t is one number, in the dtype of sums over `input`.
inline void check_scalar(const char* op, const char* name, const Tensor& t, const char* input_name,
                         const Tensor& input) {
  STD_TORCH_CHECK(t.dim() == 0, op, ": ", name, " must be a 0-d tensor, got ", t.dim(),
                  " dimensions");
  STD_TORCH_CHECK(t.scalar_type() == acc_dtype(input), op, ": ", name, " must be ",
                  torch::headeronly::toString(acc_dtype(input)), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  check_same_device(op, input_name, input, name, t);
}

}  // namespace fcos_ext
