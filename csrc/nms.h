// When one box suppresses another, the one source of the formula for CPU and CUDA.
#pragma once

#include "math.h"

namespace fcos_ext {

struct Box {
  float x0, y0, x1, y1;
};

FCOS_INLINE float area_of(const Box& b) { return product(b.x1 - b.x0, b.y1 - b.y0); }

FCOS_INLINE float intersection_of(const Box& a, const Box& b) {
  const float x0 = a.x0 > b.x0 ? a.x0 : b.x0, y0 = a.y0 > b.y0 ? a.y0 : b.y0;
  const float x1 = a.x1 < b.x1 ? a.x1 : b.x1, y1 = a.y1 < b.y1 ? a.y1 : b.y1;
  const float w = x1 - x0, h = y1 - y0;
  return product(w > 0.0f ? w : 0.0f, h > 0.0f ? h : 0.0f);
}

// IoU of a and b: I / (A + B - I), every operation rounded to float32. Of two boxes without area
// it is NaN, which no comparison calls large.
FCOS_INLINE float iou_of(const Box& a, float area_a, const Box& b, float area_b) {
  const float intersection = intersection_of(a, b);
  return intersection / (area_a + area_b - intersection);
}

// iou_of(...) > threshold, for a threshold that is not negative, where branches are cheap: most
// boxes do not meet, and then nothing is divided.
FCOS_INLINE bool iou_above(const Box& a, float area_a, const Box& b, float area_b,
                           float threshold) {
  const float intersection = intersection_of(a, b);
  return intersection > 0.0f && intersection / (area_a + area_b - intersection) > threshold;
}

}  // namespace fcos_ext
