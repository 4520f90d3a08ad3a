// Threads that wait for each other, rightly and wrongly.
#include <cuda_runtime.h>

__global__ void early_exit_before_barrier(int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
}

__global__ void barriers_in_two_branches() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void warp_waits_for_barrier() {
  if (threadIdx.x == 0)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void shuffles_in_two_branches(int* out) {
  int value = 0;
  if (threadIdx.x < 16) {
    value = __shfl_sync(0xffffffffu, 1, 0);
  } else {
    value = __shfl_sync(0xffffffffu, 2, 0);
  }
  out[threadIdx.x] = value;
}

__global__ void mask_without_caller() { __syncwarp(0x0000ffffu); }

__global__ void shuffle_width_of_12(int* out) { *out = __shfl_sync(0xffffffffu, 1, 0, 12); }

// The last thread releases the others, if it is there.
__global__ void spin(unsigned* flag, unsigned releasing_thread) {
  if (threadIdx.x == releasing_thread)
    atomicExch(flag, 1u);
  else
    while (atomicAdd(flag, 0u) == 0u) {
    }
}

// out: for each thread the three kinds of barrier with a predicate, of which `n` are true.
__global__ void predicates(int n, int* out) {
  const int p = static_cast<int>(threadIdx.x) < n ? 7 : 0;
  out[3 * threadIdx.x] = __syncthreads_count(p);
  out[3 * threadIdx.x + 1] = __syncthreads_or(p);
  out[3 * threadIdx.x + 2] = __syncthreads_and(p);
}

// Every element of out is the position of its own thread, in the order that CUDA numbers them.
__global__ void positions(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<int>(i);
}

// Which block comes first, and which of its threads reaches its end first.
__global__ void order(unsigned* counter, int* out) {
  __syncthreads();
  out[atomicAdd(counter, 1u)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

__attribute__((noinline)) __device__ int deep(int n) {
  volatile int frame[64];
  frame[n % 64] = n;
  return n == 0 ? 0 : deep(n - 1) + frame[n % 64];
}
__global__ void recursion(int depth, int* out) { out[threadIdx.x] = deep(depth); }
