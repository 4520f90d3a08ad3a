// What every kernel file needs: names and dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <type_traits>

// The operators live in torch.ops.<FCOS_NAMESPACE>. tests/simt builds the CUDA sources a second
// time, under another name and for CPU tensors.
#ifndef FCOS_NAMESPACE
#define FCOS_NAMESPACE fcos_ext
#define FCOS_CUDA_KEY CUDA
#endif

namespace fcos_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type that a dtype is computed in: float for half, bfloat16 and float; double for double.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls f with a zero of the C++ type behind a run-time dtype: f(float{}), f(double{}), ...
template <typename F>
void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": no kernel for ", torch::headeronly::toString(dtype));
  }
}

// float64 for float64 input, else float32: the dtype of sums.
inline ScalarType acc_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fcos_ext
