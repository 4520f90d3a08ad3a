// 16-byte loads and stores, and division by a number that the compiler does not know.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fcos_ext {

// N elements that travel as one 16-byte access.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Loads and stores of data that is used once: they do not displace what is in the L2 cache.
template <typename T>
__device__ __forceinline__ Vector<T> load_streaming(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  Vector<T> v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

template <typename T>
__device__ __forceinline__ void store_streaming(T* p, const Vector<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, sizeof(v));
  __stcs(reinterpret_cast<uint4*>(p), bits);
}

// The first n elements of a vector, one by one. The loops have a fixed length so that they are
// unrolled: a vector that is indexed by a variable would live in memory instead of registers.
template <typename T>
__device__ __forceinline__ Vector<T> load_part(const T* p, int n) {
  Vector<T> v;
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k)
    if (k < n) v.values[k] = p[k];
  return v;
}

template <typename T>
__device__ __forceinline__ void store_part(T* p, const Vector<T>& v, int n) {
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k)
    if (k < n) p[k] = v.values[k];
}

inline bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// n / d for 0 <= n < 2^31 by a multiplication and a shift.
// Granlund and Montgomery, "Division by invariant integers using multiplication", figure 4.1.
struct FastDivision {
  uint32_t divisor, multiplier, shift;

  explicit FastDivision(uint32_t d) : divisor(d), shift(0) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
};

}  // namespace fcos_ext
