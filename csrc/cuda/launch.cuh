// How kernels are started, and the few things every kernel does.
//
// Under FCOS_SIMT (tests/simt) <cuda_runtime.h> is a stand-in that runs the same source on the CPU,
// one fiber per CUDA thread. Kernel files therefore contain no <<<>>> and no inline PTX.
#pragma once

#include <cuda_runtime.h>

#include "../common.h"

#ifndef FCOS_SIMT
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

// The shared memory whose size the launch gives: FCOS_DYNAMIC_SHARED(float, tile);
#ifdef FCOS_SIMT
#define FCOS_DYNAMIC_SHARED(type, name) type* const name = simt::dynamic_shared<type>()
#else
#define FCOS_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace fcos_ext {

// Starts kernel<<<grid, block, shared_bytes>>>(args...) on the device and current stream of `on`.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Tensor& on,
            Args... args) {
#ifdef FCOS_SIMT
  (void)on;
  simt::launch(
      grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); },
      reinterpret_cast<const void*>(kernel));
#else
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Params>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// Sets bytes on the device of `on` to 0, in the order of its current stream.
inline void clear(void* p, size_t bytes, const Tensor& on) {
#ifdef FCOS_SIMT
  (void)on;
  memset(p, 0, bytes);
#else
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  STD_CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
#endif
}

// Blocks for `items` work items, at most what a grid-stride loop needs to fill any GPU. The
// simulator gets few, so that small inputs give a block several items.
inline dim3 grid_for(int64_t items) {
#ifdef FCOS_SIMT
  constexpr int64_t kMaxBlocks = 3;
#else
  constexpr int64_t kMaxBlocks = 8192;
#endif
  return dim3(static_cast<unsigned>(items < kMaxBlocks ? items : kMaxBlocks));
}

// Sum over the block, in a fixed order; the result is valid in thread 0. Every thread must call.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  __shared__ T warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  __syncthreads();  // warp_sums may be written again
  return sum;
}

}  // namespace fcos_ext
