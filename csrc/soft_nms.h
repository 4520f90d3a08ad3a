// How much a box takes from the score of another, the one source of the formula for CPU and CUDA.
// Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code",
// https://arxiv.org/abs/1704.04503, section 3: linear and gaussian.
#pragma once

#include "nms.h"

namespace fcos_ext {

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
      const float factor = exponent < -87.0f ? 0.0f : exp_by_series(exponent);
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
