// Sigmoid focal loss of one logit, the one source of the formula for CPU and CUDA.
//
// Of a negative, Lin et al., "Focal Loss for Dense Object Detection",
// https://arxiv.org/abs/1708.02002, eq. 5, with p = sigmoid(x) and s = log(1 + e^x):
//   L(x)  = p^gamma s
//   L'(x) = p^gamma (p + gamma (1 - p) s)
// Of a positive, whose target is y (1, or the quality of its box), Li et al., "Generalized Focal
// Loss", https://arxiv.org/abs/2006.04388, eq. 6:
//   L(x, y)  = |p - y|^gamma (s - y x)
// The weights, alpha of a positive and 1 - alpha of a negative, are left to the caller.
//
// Almost all logits are negatives. The kernels therefore treat whole runs of them as such, after
// putting kNever in the place of what is none, and turn to the few positives afterwards.
#pragma once

#include "integers.h"
#include "logistic.h"
#include "math.h"

namespace fcos_ext {

// What a call computes. "Each" is about every single loss, the others about their sum.
enum class Work { kSum, kSumAndGradient, kGradient, kEach, kEachGradient };

constexpr bool sums(Work w) { return w == Work::kSum || w == Work::kSumAndGradient; }
constexpr bool writes(Work w) { return w != Work::kSum; }

// A logit whose loss and derivative are exactly 0, in every dtype.
constexpr float kNever = -1e4f;

// gamma as a type: the usual value is compiled in.
struct GammaTwo {
  template <typename T>
  FCOS_INLINE T value() const {
    return T(2);
  }
  template <typename T>
  FCOS_INLINE T power(T p, T /*log_p*/) const {
    return p * p;
  }
};

struct GammaAny {
  double gamma;
  template <typename T>
  FCOS_INLINE T value() const {
    return T(gamma);
  }
  template <typename T>
  FCOS_INLINE T power(T /*p*/, T log_p) const {
    return exp_nonpositive(T(gamma) * log_p);
  }
};

template <typename T>
struct Term {
  T loss, derivative;
};

// L(x) and L'(x), to the precision of scalar_t.
template <typename scalar_t, typename T, typename Gamma>
FCOS_INLINE Term<T> negative_term(T x, Gamma gamma) {
  const Logistic<T> l = logistic(x);
  const T power = gamma.power(l.p, l.log_p);
  const T factor = gamma.template value<T>();
  // gamma (1 - p) s. Rounding p leaves an error of 1e-7 s: enough for half the precision.
  const T bend =
      sizeof(scalar_t) < 4 ? factor * (l.softplus - l.p * l.softplus) : factor * l.q * l.softplus;
  return {power * l.softplus, power * (l.p + bend)};
}

// L(x, y) and its derivative in x, which where |p - y| has a kink is 0.
template <typename T, typename Gamma>
FCOS_INLINE Term<T> positive_term(T x, T y, Gamma gamma) {
  // L(x, y) = L(-x, 1 - y): with x <= 0, p and s are small numbers known to full precision.
  const bool mirrored = x > T(0);
  const T z = mirrored ? -x : x, target = mirrored ? T(1) - y : y;
  const Logistic<T> l = logistic(z);
  const T d = l.p - target;
  const T distance = d < T(0) ? -d : d;
  const T tiny = T(1e-37f);
  const T power = gamma.power(distance, logarithm(distance > tiny ? distance : tiny));
  const T entropy = l.softplus - target * z;
  const T bend = gamma.template value<T>() * (T(1) - l.p) * entropy * (l.p * reciprocal(d));
  const T slope = distance > tiny ? power * (d + bend) : T(0);
  return {power * entropy, mirrored ? -slope : slope};
}

// The label of each location, int64 or int32: in [0, C) its positive class, -1 all C are negative,
// and anything else takes no part (-2 by convention).
constexpr int kBackground = -1;
constexpr int kIgnored = -2;

// In 32 bits, kIgnored for all that take no part.
FCOS_INLINE int label_at(const Integers& labels, int64_t location, int num_classes) {
  const int64_t label = labels[location];
  // one comparison for -1 <= label < num_classes
  return static_cast<uint64_t>(label) + 1 <= static_cast<uint64_t>(num_classes)
             ? static_cast<int>(label)
             : kIgnored;
}

}  // namespace fcos_ext
