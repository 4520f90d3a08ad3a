// Centerness of a location in its box, and the cross-entropy of its prediction: the one source of
// the formulas for CPU and CUDA. Tian et al., "FCOS", https://arxiv.org/abs/1904.01355, eq. 3.
#pragma once

#include "iou_loss.h"
#include "math.h"

namespace fcos_ext {

// The smaller of two distances to opposite sides over the larger one; 0 where a location lies
// beyond a side, and where there is no box. NaN stays.
template <typename T>
FCOS_INLINE T balance(T a, T b) {
  const bool less = a < b;
  const T low = less ? a : b, high = less ? b : a;
  return high <= T(0) ? T(0) : (low < T(0) ? T(0) : low) / high;
}

template <typename T>
FCOS_INLINE T centerness_of(const Ltrb<T>& box) {
  return std::sqrt(product(balance(box.l, box.r), balance(box.t, box.b)));
}

// -y log(p) - (1 - y) log(1 - p) and its derivative, with p = sigmoid(x).
template <typename T>
struct CrossEntropy {
  T loss, derivative;
};

template <typename T>
FCOS_INLINE CrossEntropy<T> cross_entropy(T x, T y) {
  const bool positive = x >= T(0);
  const T e = exp_nonpositive(positive ? -x : x);
  const T r = reciprocal(T(1) + e);
  return {(positive ? T(1) - y : -y) * x + log1p_unit(e), (positive ? r : e * r) - y};
}

}  // namespace fcos_ext
