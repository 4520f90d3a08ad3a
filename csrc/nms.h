// When one box suppresses another, the one source of the formula for CPU and CUDA.
#pragma once

#include "math.h"

namespace fcos_ext {

struct Box {
  float x0, y0, x1, y1;
};

FCOS_INLINE float area_of(const Box& b) { return product(b.x1 - b.x0, b.y1 - b.y0); }

// IoU of a and b: I / (A + B - I), every operation rounded to float32. Of two boxes without area
// it is NaN, which no comparison calls large.
FCOS_INLINE float iou_of(const Box& a, float area_a, const Box& b, float area_b) {
  const float x0 = a.x0 > b.x0 ? a.x0 : b.x0, y0 = a.y0 > b.y0 ? a.y0 : b.y0;
  const float x1 = a.x1 < b.x1 ? a.x1 : b.x1, y1 = a.y1 < b.y1 ? a.y1 : b.y1;
  const float w = x1 - x0, h = y1 - y0;
  const float intersection = product(w > 0.0f ? w : 0.0f, h > 0.0f ? h : 0.0f);
  return intersection / (area_a + area_b - intersection);
}

}  // namespace fcos_ext
