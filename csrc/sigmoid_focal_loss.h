// Sigmoid focal loss of one logit, the one source of the formula for CPU and CUDA.
// Lin et al., "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002, eq. 5:
//   FL = -alpha_t (1 - p_t)^gamma log(p_t)
//
// Of a negative this is (1 - alpha) L(x), of a positive alpha L(-x), with
//   L(x)  = p^gamma s                     p = sigmoid(x), q = 1 - p, s = log(1 + e^x)
//   L'(x) = p^gamma (p + gamma q s)
// p, q and s all come from e = e^-|x| without subtracting close numbers, so that nothing is lost,
// and nothing overflows, however large |x| is.
#pragma once

#include "math.h"

namespace fcos_ext {

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
struct Logistic {
  T p, q;      // sigmoid(x), sigmoid(-x)
  T softplus;  // log(1 + e^x)
  T log_p;     // log(p)
};

template <typename T>
FCOS_INLINE Logistic<T> logistic(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const T e = exp_nonpositive(-magnitude);
  const T r = reciprocal(T(1) + e);
  const T er = e * r;
  const T l = log1p_unit(e);
  const bool positive = x >= T(0);
  return {positive ? r : er, positive ? er : r, (positive ? x : T(0)) + l,
          (positive ? T(0) : x) - l};
}

// L(x).
template <typename T, typename Gamma>
FCOS_INLINE T focal_loss(T x, Gamma gamma) {
  const Logistic<T> s = logistic(x);
  return gamma.power(s.p, s.log_p) * s.softplus;
}

// L'(x).
template <typename T, typename Gamma>
FCOS_INLINE T focal_loss_derivative(T x, Gamma gamma) {
  const Logistic<T> s = logistic(x);
  return gamma.power(s.p, s.log_p) * (s.p + gamma.template value<T>() * s.q * s.softplus);
}

// The label of each row of logits, int64 or int32: in [0, C) the positive class, -1 all C are
// negative, and anything else takes no part (-2 by convention).
constexpr int64_t kBackground = -1;

struct Labels {
  const void* data;
  bool is_int64;
  FCOS_INLINE int64_t operator[](int64_t row) const {
    return is_int64 ? static_cast<const int64_t*>(data)[row]
                    : int64_t(static_cast<const int32_t*>(data)[row]);
  }
};

}  // namespace fcos_ext
