// Binary cross-entropy of a logit, the one source of the formula for CPU and CUDA.
#pragma once

#include "centerness.h"
#include "iou_loss.h"
#include "logistic.h"

namespace fcos_ext {

// -y log(p) - (1 - y) log(1 - p) and its derivative, with p = sigmoid(x).
template <typename T>
struct CrossEntropy {
  T loss, derivative;
};

template <typename T>
FCOS_INLINE CrossEntropy<T> cross_entropy(T x, T y) {
  // That of -x and 1 - y is the same: with x <= 0, p and log(1 + e^x) are small numbers known to
  // full precision.
  const bool mirrored = x > T(0);
  const T z = mirrored ? -x : x, target = mirrored ? T(1) - y : y;
  const Logistic<T> l = logistic(z);
  const T slope = l.p - target;
  return {l.softplus - target * z, mirrored ? -slope : slope};
}

}  // namespace fcos_ext
