// sigmoid(x) and log(1 + e^x), which losses of logits are made of.
#pragma once

#include "math.h"

namespace fcos_ext {

template <typename T>
struct Logistic {
  T p, q;      // sigmoid(x) and sigmoid(-x)
  T softplus;  // log(1 + e^x)
  T log_p;     // log(sigmoid(x)) = x - softplus
};

FCOS_INLINE Logistic<double> logistic(double x) {
  const bool positive = x > 0;
  const double e = std::exp(positive ? -x : x);
  const double series = std::log1p(e);
  const double larger = 1.0 / (1.0 + e), smaller = e / (1.0 + e);
  return {positive ? larger : smaller, positive ? smaller : larger, (positive ? x : 0.0) + series,
          (positive ? 0.0 : x) - series};
}

// To a few 1e-7 of themselves, however small; log_p near 0 to as much in absolute terms.
#if defined(__CUDA_ARCH__) || defined(FCOS_SIMT)
// A GPU has units for e^x, 1/x and log(x).
FCOS_INLINE Logistic<float> logistic(float x) {
  const float e = exponential(-x), a = 1.0f + e;
  const float p = reciprocal(a);
  const float q = (e < 8e37f ? e : 8e37f) * p;  // infinity times 0 is not a number
  // softplus = x + log(a) = -log(1 - p). Where the first would cancel, a polynomial for the second
  // takes over: Chebyshev interpolation on [0, 1/8], error 5e-8.
  float series = 0.248904674f * p + 0.245977302f;
  series = series * p + 0.333436533f;
  series = series * p + 0.499999591f;
  series = (series * p + 1.0f) * p;
  const float log_a = logarithm(a);
  const bool small = p < 0.125f;
  return {p, q, small ? series : x + log_a, small ? x - series : -log_a};
}
#else
// On a CPU each is a polynomial: one is enough for the logarithm of what lies in [1, 2].
FCOS_INLINE Logistic<float> logistic(float x) {
  const bool positive = x > 0.0f;
  const float e = exp_nonpositive(positive ? -x : x);
  const float larger = 1.0f / (1.0f + e), smaller = e * larger;
  // log(1 + e) / e by the polynomial of least relative error, 3e-8
  float series = 0.00523269130f;
  series = series * e - 0.0295052268f;
  series = series * e + 0.0782259330f;
  series = series * e - 0.136632442f;
  series = series * e + 0.191060066f;
  series = series * e - 0.248429820f;
  series = series * e + 0.333190978f;
  series = series * e - 0.499994934f;
  series = series * e + 0.99999994f;
  return {positive ? larger : smaller, positive ? smaller : larger,
          e * series + (positive ? x : 0.0f), (positive ? 0.0f : x) - e * series};
}
#endif

}  // namespace fcos_ext
