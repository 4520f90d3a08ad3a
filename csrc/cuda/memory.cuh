// 16-byte loads and stores, and division by a number that the compiler does not know.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fcos_ext {

// N elements that travel as one access: 16 bytes, or a single element.
template <typename T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N == 1 || N * sizeof(T) == 16, "an element or 16 bytes");
  static constexpr int kSize = N;
  T values[N];
};

// Loads and stores of data that is used once: they do not displace what is in the L2 cache.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_streaming(const T* p) {
  if constexpr (N == 1) {
    return {*p};
  } else {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    Vector<T, N> v;
    memcpy(&v, &bits, sizeof(v));
    return v;
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_streaming(T* p, const Vector<T, N>& v) {
  if constexpr (N == 1) {
    *p = v.values[0];
  } else {
    uint4 bits;
    memcpy(&bits, &v, sizeof(v));
    __stcs(reinterpret_cast<uint4*>(p), bits);
  }
}

// The elements in the type that is computed in.
template <typename T, int N, typename acc>
__device__ __forceinline__ void unpack(const Vector<T, N>& v, acc (&x)[N]) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16> && N % 2 == 0) {
    // A bfloat16 is the upper half of a float: of two in a word, one is shifted and one masked.
    uint32_t words[N / 2];
    memcpy(words, &v, sizeof(v));
#pragma unroll
    for (int w = 0; w < N / 2; ++w) {
      const uint32_t bits[2] = {words[w] << 16, words[w] & 0xffff0000u};
      memcpy(&x[2 * w], bits, sizeof(bits));
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = static_cast<acc>(v.values[k]);
  }
}

inline bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// n / d for 0 <= n < 2^31 by a multiplication and a shift.
// Granlund and Montgomery, "Division by invariant integers using multiplication", figure 4.1.
struct FastDivision {
  uint32_t divisor, multiplier, shift;

  FastDivision() : FastDivision(1) {}
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
