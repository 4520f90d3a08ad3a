// FCOS target assignment, the one source of the rules for CPU and CUDA.
// Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection",
// https://arxiv.org/abs/1904.01355, sections 3.1 to 3.3, and the center sampling of its authors.
//
// Every operation is rounded to float32 by itself (product() keeps multiplications out of fused
// multiply-adds), so that all backends choose the same box to the bit.
#pragma once

#include <cstdint>

#include "centerness.h"
#include "integers.h"
#include "math.h"
#include "nms.h"

namespace fcos_ext {

// Rows or columns of locations: their distance and the first, in pixels.
struct Axis {
  float step;  // above 0
  float first;
};

// Of several candidates the one with the least cost, area - offset, is the best, if it is less than
// `limit`: the area itself, or what torchvision compares, which has the precision of the offset.
struct Ties {
  float offset, limit;
  float end;  // added to sides: 1 if those of a box are its first and last pixels
};

FCOS_INLINE float cost_of(const Ties& ties, const Box& box) {
  return product(box.x1 - box.x0 + ties.end, box.y1 - box.y0 + ties.end) - ties.offset;
}

// One level of the feature pyramid.
struct Level {
  int64_t start;          // its first location among all of an image
  int32_t height, width;  // in locations
  Axis y, x;
  float unit;  // of normalised distances, in pixels
  // A candidate has low <= max(l, t, r, b) <= high. An end that does not belong to the range of
  // the user has been replaced by the float32 next to it.
  float low, high;
  float reach;  // of the window around the centre of a box; infinite without center sampling
};

// Pixel of a row or column. Does not decrease with `index`.
FCOS_INLINE float location_of(const Axis& axis, int32_t index) {
  return product(static_cast<float>(index), axis.step) + axis.first;
}

FCOS_INLINE float center_of(float low, float high) { return product(low + high, 0.5f); }
FCOS_INLINE float magnitude_of(float x) { return x < 0.0f ? -x : x; }
FCOS_INLINE float larger_of(float a, float b) { return a < b ? b : a; }
FCOS_INLINE float smaller_of(float a, float b) { return a < b ? a : b; }

// Whether the box can match anywhere: its sides are above 0 and, as the area is finite, so are its
// coordinates.
FCOS_INLINE bool is_proper(const Box& box) {
  return box.x1 > box.x0 && box.y1 > box.y0 && area_of(box) < INFINITY;
}

// The first two rules, along one axis: p lies strictly inside the box [low, high] and in the window
// around its centre.
FCOS_INLINE bool is_inside(const Level& level, float p, float low, float high, float center) {
  return (p - low > 0.0f) & (high - p > 0.0f) & (magnitude_of(p - center) < level.reach);
}

// The third, of the larger of the two distances along each axis.
FCOS_INLINE bool is_in_range(const Level& level, float longest_x, float longest_y) {
  const float longest = larger_of(longest_x, longest_y);
  return (level.low <= longest) & (longest <= level.high);
}

FCOS_INLINE float longest_side(float p, float low, float high) {
  return larger_of(p - low, high - p);
}

// Whether the size of the box allows a candidate at all: as l and r are above 0, neither is larger
// than l + r.
FCOS_INLINE bool may_be_in_range(const Level& level, const Box& box) {
  return larger_of(box.x1 - box.x0, box.y1 - box.y0) >= level.low && level.high > 0.0f;
}

// Whether the rules may hold, along one axis, for a location from `first` to `last`. Exact for a
// single one; else it may say yes in vain, but never no: rounded differences do not decrease with
// p, so that those of the two ends bound all between them.
FCOS_INLINE bool may_hold(const Level& level, float first, float last, float low, float high) {
  const float center = center_of(low, high);
  return last - low > 0.0f && high - first > 0.0f && last - center > -level.reach &&
         first - center < level.reach && first - low <= level.high && high - last <= level.high;
}

FCOS_INLINE int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Which rows of the boxes belong to an image.
struct Rows {
  int64_t first, last;
};

// The boxes of a batch: packed [K, 4], where image i owns the rows from extents[i] to
// extents[i + 1]; or padded [N, M, 4], where it owns the first extents[i] of its M.
struct Boxes {
  const float* data;
  Integers labels, extents;
  int64_t num_rows;
  int64_t per_image;  // M, or -1 if packed

  FCOS_INLINE Box operator[](int64_t row) const {
    const float* p = data + row * 4;
    return {p[0], p[1], p[2], p[3]};
  }
  // Never outside of the boxes, whatever the extents are.
  FCOS_INLINE Rows rows_of(int64_t image) const {
    if (per_image >= 0) {
      const int64_t first = image * per_image;
      return {first, first + clamped(extents[image], 0, per_image)};
    }
    const int64_t first = clamped(extents[image], 0, num_rows);
    return {first, clamped(extents[image + 1], first, num_rows)};
  }
};

}  // namespace fcos_ext
