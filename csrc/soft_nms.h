// How much a box takes from the score of another, the one source of the formula for CPU and CUDA.
// Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code",
// https://arxiv.org/abs/1704.04503, section 3: linear and gaussian.
#pragma once

#include "nms.h"

namespace fcos_ext {

// e^x for -87 <= x <= 0, by a series: the same bits on every device.
FCOS_INLINE float exp_by_series(float x) {
  // 2^t = 2^n 2^f with |f| <= 1/2. Adding 1.5 * 2^23 rounds t to the integer n and leaves it in
  // the low bits, from where it is shifted into the exponent. The series is that of e^(f ln 2).
  const float t = product(x, 1.44269504088896341f);
  const float shifted = t + 12582912.0f;
  const float f = product(t - (shifted - 12582912.0f), 0.693147180559945309f);
  float series = 1.0f / 5040.0f;
  series = product(series, f) + 1.0f / 720.0f;
  series = product(series, f) + 1.0f / 120.0f;
  series = product(series, f) + 1.0f / 24.0f;
  series = product(series, f) + 1.0f / 6.0f;
  series = product(series, f) + 0.5f;
  series = product(series, f) + 1.0f;
  series = product(series, f) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return product(power, series);
}

struct SoftNms {
  float iou_threshold, sigma, score_threshold;

  // A score that is in the running, or 0 if it is none: not above the threshold, or NaN.
  FCOS_INLINE float live(float score) const { return score > score_threshold ? score : 0.0f; }

  // What is left of a live score, or 0, beside a selected box that it has this IoU with. An IoU
  // of 0 or NaN takes nothing.
  template <bool kGaussian>
  FCOS_INLINE float decayed(float score, float iou) const {
    if constexpr (kGaussian) {
      const float exponent = -(product(iou, iou) / sigma);
      const float factor = exponent >= -87.0f ? exp_by_series(exponent) : 0.0f;
      return iou > 0.0f ? live(product(score, factor)) : score;
    }
    return iou > iou_threshold ? live(product(score, 1.0f - iou)) : score;
  }
};

// Live scores are positive: as integers their bits are in the same order.
FCOS_INLINE int32_t bits_of(float live) {
  int32_t bits;
  std::memcpy(&bits, &live, sizeof(bits));
  return bits;
}

}  // namespace fcos_ext
