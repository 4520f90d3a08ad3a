// An operator with a planted bug, registered with PyTorch as the library's own are.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;

__global__ void double_values(const float* x, float* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 2 * x[i];
}

// Twice the first numel - missing values of x; a negative number of missing ones is out of bounds.
Tensor twice(const Tensor& x, int64_t missing) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t n = x.numel() - missing;
  simt::launch(
      dim3(static_cast<unsigned>(n + 31) / 32), dim3(32), 0,
      [&] { double_values(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), n); },
      reinterpret_cast<const void*>(&double_values));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(FCOS_NAMESPACE, m) { m.def("twice(Tensor x, int missing) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) { m.impl("twice", TORCH_BOX(&twice)); }
