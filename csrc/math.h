// exp, log and 1/x on the ranges that the formulas need: correct to a few float32 ulp, without
// branches or library calls, so that CPU loops vectorise and a GPU uses its special-function unit.
// float64 (gradient checks) goes to the standard library.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define FCOS_INLINE C10_HOST_DEVICE inline __attribute__((always_inline))

namespace fcos_ext {

// 1 / x.
FCOS_INLINE double reciprocal(double x) { return 1.0 / x; }
FCOS_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// a * b, rounded: never part of a fused multiply-add. Decisions that all backends must agree on
// (an IoU at the threshold, equal areas) are made of this. The CPU files get it from their flags.
FCOS_INLINE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FCOS_INLINE double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// e^x for x <= 0; float is 0 below about -87.7.
FCOS_INLINE double exp_nonpositive(double x) { return std::exp(x); }
FCOS_INLINE float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
#else
  // x = n log(2) + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 + 127 rounds x / log(2) to the
  // integer n and leaves n + 127 in the low bits, from where it is shifted into the exponent; of
  // n = -127 that makes 0. log(2) is subtracted in two parts: n times the first is exact. e^r by
  // the polynomial of least relative error, 2e-9.
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12583039.0f;
  const float n = shifted - 12583039.0f;
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float series = 0.00138368434f;
  series = series * r + 0.00837481767f;
  series = series * r + 0.0416682251f;
  series = series * r + 0.166664198f;
  series = series * r + 0.499999911f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power * series;
#endif
}

// e^x for any x: 0 or infinity where float has nothing else.
FCOS_INLINE float exponential(float x) {
#ifdef __CUDA_ARCH__
  return exp_nonpositive(x);
#else
  return x > 0.0f ? 1.0f / exp_nonpositive(-x) : exp_nonpositive(x);
#endif
}

// log(x) for a normal x > 0, to an absolute error of a few 1e-7 near 1 and a relative one beyond.
FCOS_INLINE double logarithm(double x) { return std::log(x); }
FCOS_INLINE float logarithm(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return 0.693147180559945309f * y;
#else
  // x = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) / f by a polynomial:
  // Chebyshev interpolation of degree 8, error 3e-8.
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t n = (bits - 0x3f3504f3) >> 23;
  bits -= static_cast<int32_t>(static_cast<uint32_t>(n) << 23);
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  f -= 1.0f;
  float series = 0.0874394535f;
  series = series * f - 0.143773306f;
  series = series * f + 0.149490955f;
  series = series * f - 0.165606960f;
  series = series * f + 0.199569775f;
  series = series * f - 0.250021535f;
  series = series * f + 0.333341833f;
  series = series * f - 0.499999870f;
  series = series * f + 0.999999974f;
  return static_cast<float>(n) * 0.693147180559945309f + series * f;
#endif
}

}  // namespace fcos_ext
