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

}  // namespace fcos_ext
