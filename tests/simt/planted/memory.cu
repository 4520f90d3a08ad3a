// Kernels that read and write where they must not.
#include <cuda_runtime.h>

#include "dynamic_shared.h"

// out[i] = x[i], with the ends of the loop at fault.
__global__ void copy(const float* __restrict__ x, float* __restrict__ out, int first, int last,
                     int reads_end) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) + first;
  if (i < last) out[i] = i < reads_end ? x[i] : 0.0f;
}

__global__ void dynamic_shared_store(int index) {
  DYNAMIC_SHARED(float, values);
  if (threadIdx.x == 0) values[index] = 1.0f;
}

__global__ void static_shared_store(int index, float* out) {
  __shared__ float values[8];
  values[index] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x % 8];
}

// Each block shows what its shared memory held when it began.
__global__ void leftovers(unsigned* out) {
  __shared__ unsigned value;
  if (threadIdx.x == 0) {
    out[blockIdx.x] = value;
    value = 1;
  }
}

__global__ void vector_load(const float* x, float* out) {
  const float4 v = __ldcs(reinterpret_cast<const float4*>(x));
  *out = v.x + v.y + v.z + v.w;
}

__global__ void vector_store(float* out) {
  __stcs(reinterpret_cast<uint2*>(out), make_uint2(1, 2));
}

__global__ void plain_vector_load(const float* x, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  *out = v.x + v.y + v.z + v.w;
}

__global__ void shift(unsigned by, unsigned* out) { *out = 1u << by; }
