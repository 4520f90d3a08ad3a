// Block sums: a right one, and ones with a planted bug.
#include <cuda_runtime.h>

#include "dynamic_shared.h"

enum class Bug { kNone, kNoBarrier, kUnwritten };

// out[block] = sum of the block's part of x, by a tree in dynamic shared memory.
template <Bug kBug>
__global__ void tree_sum(const unsigned* __restrict__ x, int n, unsigned* __restrict__ out) {
  DYNAMIC_SHARED(unsigned, sums);
  const int t = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + t;
  if (kBug == Bug::kUnwritten) {
    if (i < n) sums[t] = x[i];  // the last block's tail stays as it was
  } else {
    sums[t] = i < n ? x[i] : 0;
  }
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (kBug != Bug::kNoBarrier) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

// The same by shuffles, and static shared memory for the sums of the warps.
template <Bug kBug>
__global__ void warp_sum(const unsigned* __restrict__ x, int n, unsigned* __restrict__ out) {
  __shared__ unsigned warp_sums[32];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  unsigned sum = i < n ? x[i] : 0;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  if (kBug != Bug::kNoBarrier) __syncthreads();
  if (threadIdx.x != 0) return;
  const unsigned warps = kBug == Bug::kUnwritten ? 32 : blockDim.x / 32;
  unsigned total = 0;
  for (unsigned w = 0; w < warps; ++w) total += warp_sums[w];
  out[blockIdx.x] = total;
}
