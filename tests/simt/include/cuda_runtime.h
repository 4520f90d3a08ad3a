// Stands in for the CUDA toolkit's header of this name, so that a .cu file compiles as C++:
// keywords, built-in variables and types, and the intrinsics of one thread. ../intrinsics.h has
// those of many threads, ../simt.h executes kernels.
//
// Only what exists in CUDA, on the types that it exists for: __ldg(const bool*) or
// atomicAdd(int64_t*) must not compile here either. Intrinsics that are missing are added when a
// kernel needs them. `__noinline__` cannot be a macro beside libstdc++, which writes
// __attribute__((__noinline__)); kernels write __attribute__((noinline)), as nvcc accepts too.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy a block: blocks run one after another on one thread. See find_static_shared().
#define __shared__ static thread_local

#include "../intrinsics.h"
#include "../simt.h"

static const uint3& threadIdx [[maybe_unused]] = simt::machine.thread_index;
static const uint3& blockIdx [[maybe_unused]] = simt::machine.block_index;
static const dim3& blockDim [[maybe_unused]] = simt::machine.block;
static const dim3& gridDim [[maybe_unused]] = simt::machine.grid;
constexpr int warpSize = simt::kWarpSize;

// ---- loads and stores with a cache hint ----

namespace simt {

template <typename T>
constexpr bool has_cached_access =
    is_one_of<T, char, signed char, short, int, long, long long, unsigned char, unsigned short,
              unsigned, unsigned long, unsigned long long, float, double, char2, char4, short2,
              short4, int2, int4, longlong2, uchar2, uchar4, ushort2, ushort4, uint2, uint4,
              ulonglong2, float2, float4, double2>;

}  // namespace simt

#define SIMT_LOAD(name)                                                                         \
  template <typename T>                                                                         \
  inline T name(const T* p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { \
    static_assert(simt::has_cached_access<T>, #name " does not exist for this type");           \
    simt::check_aligned(p, sizeof(T), #name, {file, line});                                     \
    return *p;                                                                                  \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
#undef SIMT_LOAD

#define SIMT_STORE(name)                                                               \
  template <typename T>                                                                \
  inline void name(T* p, simt::SameType<T> value, const char* file = __builtin_FILE(), \
                   int line = __builtin_LINE()) {                                      \
    static_assert(simt::has_cached_access<T>, #name " does not exist for this type");  \
    simt::check_aligned(p, sizeof(T), #name, {file, line});                            \
    *p = value;                                                                        \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// ---- bits ----

namespace simt {
template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace simt

inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
__extension__ typedef unsigned __int128 simt_uint128;
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<simt_uint128>(a) * b >> 64);
}

// ---- arithmetic: IEEE single roundings, or the host's library where CUDA approximates ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(double(a))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
#if !defined(__GLIBC_PREREQ) || !__GLIBC_PREREQ(2, 42)
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif
// glibc declares functions of these names, but does not export them.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __powf(x, y) ::powf(x, y)

#define SIMT_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
// As in CUDA, a NaN loses against a number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
