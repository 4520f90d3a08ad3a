// Sums over a whole grid in one launch, the same to the bit on any GPU.
//
// The work is cut into tiles of a fixed size, and each tile has its own partial sums. The block
// that finishes last adds them up, in a fixed order; a ticket tells it that it is the last. Each
// call has a ticket of its own, so that calls on several streams, and replays of a graph, do not
// meet.
#pragma once

#include "launch.cuh"

namespace fcos_ext {

// A counter on the device of `on`, set to 0 on its current stream: 4 bytes.
inline Tensor new_ticket(const Tensor& on) {
  Tensor ticket = torch::stable::new_empty(on, {1}, ScalarType::Int);
  clear(ticket.mutable_data_ptr(), sizeof(unsigned), on);
  return ticket;
}

// True in all threads of the block that calls this last of the grid; what other blocks had written
// before is then visible to them. Every thread must call, once, after its last write.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();  // the writes of the whole block come before thread 0's fence
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) + 1 == gridDim.x * gridDim.y * gridDim.z;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Sum of n partials in a fixed order, valid in thread 0. For the block that is_last_block() names.
template <int kThreads, typename acc>
__device__ __forceinline__ double sum_partials(const acc* partials, int64_t n) {
  double sum = 0;
  // __ldcg: not from the L1 cache, which may hold what was there before other blocks wrote
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += __ldcg(partials + i);
  return block_sum<kThreads>(sum);
}

}  // namespace fcos_ext
