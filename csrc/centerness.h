// Centerness of a location in its box, the one source of the formula for CPU and CUDA.
// Tian et al., "FCOS", https://arxiv.org/abs/1904.01355, eq. 3.
#pragma once

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

// sqrt((min(l, r) / max(l, r)) (min(t, b) / max(t, b))).
template <typename T>
FCOS_INLINE T centerness_of(T l, T t, T r, T b) {
  return std::sqrt(product(balance(l, r), balance(t, b)));
}

}  // namespace fcos_ext
