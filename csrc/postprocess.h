// From the outputs of a network at one location to a candidate, the one source of the formulas for
// CPU and CUDA, which agree to the bit: only what they skip by is approximate.
#pragma once

#include <limits>

#include "nms.h"

namespace fcos_ext {

// e^x for -200 <= x <= 200 to a few float64 ulp, by a series: the same bits on every device.
FCOS_INLINE double exp_by_wide_series(double x) {
  // x = n log(2) + r with |r| <= log(2) / 2. Adding 1.5 * 2^52 rounds x / log(2) to the integer n
  // and leaves it in the low bits, from where it is shifted into the exponent. log(2) is
  // subtracted in two parts: n times the first is exact.
  const double shifted = product(x, 1.4426950408889634) + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - product(n, 0x1.62e42feep-1)) - product(n, 1.90821492927058770002e-10);
  double series = 1.0 / 6227020800.0;
  series = product(series, r) + 1.0 / 479001600.0;
  series = product(series, r) + 1.0 / 39916800.0;
  series = product(series, r) + 1.0 / 3628800.0;
  series = product(series, r) + 1.0 / 362880.0;
  series = product(series, r) + 1.0 / 40320.0;
  series = product(series, r) + 1.0 / 5040.0;
  series = product(series, r) + 1.0 / 720.0;
  series = product(series, r) + 1.0 / 120.0;
  series = product(series, r) + 1.0 / 24.0;
  series = product(series, r) + 1.0 / 6.0;
  series = product(series, r) + 0.5;
  series = product(series, r) + 1.0;
  series = product(series, r) + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return product(power, series);
}

// 1 / (1 + e^-x), the float32 nearest to the exact one but for one in some ten million.
FCOS_INLINE float sigmoid_by_series(double x) {
  const double magnitude = x < 0 ? -x : x;
  const double e = exp_by_wide_series(magnitude < 200.0 ? -magnitude : -200.0);
  const float result = static_cast<float>((x < 0 ? e : 1.0) / (1.0 + e));
  return x == x ? result : std::numeric_limits<float>::quiet_NaN();
}

// Which pairs of a location and a class become candidates.
struct Scoring {
  float threshold;
  bool root;      // the final score is the root of the product
  bool on_final;  // the threshold is on the final score, else on that of the class
  bool by_class;  // candidates are ranked by the class score, else by the product

  FCOS_INLINE float final_of(float product) const { return root ? std::sqrt(product) : product; }

  // What candidates are ranked by; NaN if it is to be dropped; 0: none.
  FCOS_INLINE float judge(float cls, float weight) const {
    const float p = product(cls, weight);
    const bool fails =
        on_final ? (final_of(p) <= threshold) | (final_of(weight) <= threshold) : cls <= threshold;
    const float key = by_class && p > 0.0f ? cls : p;
    return fails ? 0.0f : key;
  }
};

// What lets most logits be skipped after one comparison: !(x <= cutoff) holds of all that judge()
// does not fail, and of NaN.
struct Cutoff {
  double any;     // at any location
  float inverse;  // of the lowest product, for at(); infinite: too small to divide by

  explicit Cutoff(const Scoring& s) {
    // Four roundings to float32 lie between this and the comparison with the threshold.
    double lowest = double(s.threshold) * (1 - 0x1p-20);
    if (s.on_final && s.root) lowest *= lowest;
    inverse = lowest < 1e-30 ? std::numeric_limits<float>::infinity() : float(1 / lowest);
    any = lowest > 0 ? std::log(lowest / (1 - lowest)) : -std::numeric_limits<double>::infinity();
    any -= lowest > 0 ? 1e-5 * (1 + std::abs(any)) : 0;
  }

  // Where the threshold is on the final score: of a location with this centerness.
  FCOS_INLINE float at(float centerness) const { return of_product(inverse, centerness); }

  // Of a lowest product, and a centerness before its sigmoid w. The class score has to be above
  // s = 1 / (w inverse), or x above -log(w inverse - 1). Infinite if no class can pass.
  FCOS_INLINE static float of_product(float inverse, float centerness) {
    float excess = reciprocal(1.0f + exponential(-centerness)) * inverse - 1.0f;
    excess += 1e-4f * (excess + 1.0f);
    if (excess <= 0.0f) return std::numeric_limits<float>::infinity();
    const float bounded = excess > 1e-12f ? excess : 1e-12f;
    return excess < 1e30f ? -logarithm(bounded) - 1e-3f : -std::numeric_limits<float>::infinity();
  }
};

// What a box is regressed from.
struct Anchor {
  float center_x, center_y, width, height;
};

FCOS_INLINE Anchor anchor_of(const Box& b) {
  return {product(0.5f, b.x0 + b.x1), product(0.5f, b.y0 + b.y1), b.x1 - b.x0, b.y1 - b.y0};
}

// Where the locations of a level are, and the unit of their distances, in pixels.
struct Grid {
  float step_y, step_x, first_y, first_x, unit;

  FCOS_INLINE Anchor anchor(int y, int x) const {
    return {product(static_cast<float>(x), step_x) + first_x,
            product(static_cast<float>(y), step_y) + first_y, unit, unit};
  }
};

// What the four numbers that are regressed at a location mean.
struct BoxCoding {
  // Distances from the centre to left, top, right and bottom side: in sides of the anchor, or in
  // pixels.
  bool in_pixels;
  // Or deltas: the way to the centre in sides of the anchor, and the logarithms of width and
  // height, which are not above the limit; each divided by its weight.
  bool deltas;
  float weight_x, weight_y, weight_width, weight_height, limit;

  FCOS_INLINE Box decode(const Anchor& at, float a, float b, float c, float d) const {
    if (deltas) {
      const float x = product(a / weight_x, at.width) + at.center_x;
      const float y = product(b / weight_y, at.height) + at.center_y;
      const float half_width = product(0.5f, product(exp_to_limit(c / weight_width), at.width));
      const float half_height = product(0.5f, product(exp_to_limit(d / weight_height), at.height));
      return {x - half_width, y - half_height, x + half_width, y + half_height};
    }
    const float unit_x = in_pixels ? 1.0f : at.width, unit_y = in_pixels ? 1.0f : at.height;
    return {at.center_x - product(a, unit_x), at.center_y - product(b, unit_y),
            at.center_x + product(c, unit_x), at.center_y + product(d, unit_y)};
  }

 private:
  FCOS_INLINE float exp_to_limit(float x) const {
    const double power = x > limit ? limit : x;
    const double above = power > -200.0 ? power : -200.0;
    const float result = static_cast<float>(exp_by_wide_series(above < 200.0 ? above : 200.0));
    return x == x ? result : std::numeric_limits<float>::quiet_NaN();
  }
};

FCOS_INLINE bool is_finite(const Box& b) {
  return b.x0 - b.x0 == 0.0f && b.y0 - b.y0 == 0.0f && b.x1 - b.x1 == 0.0f && b.y1 - b.y1 == 0.0f;
}

FCOS_INLINE bool has_area(const Box& b) { return b.x1 > b.x0 && b.y1 > b.y0; }

FCOS_INLINE float clipped(float v, float limit) {
  const float positive = v > 0.0f ? v : 0.0f;
  return positive < limit ? positive : limit;
}

// As torchvision's batched_nms compares boxes: those of each label moved to a place of their own.
// `step` is one more than the highest coordinate.
FCOS_INLINE Box moved_apart(const Box& b, int64_t label, float step) {
  const float by = product(static_cast<float>(label), step);
  return {b.x0 + by, b.y0 + by, b.x1 + by, b.y1 + by};
}

// What the right and bottom sides of a box are, as it is predicted: their coordinates; or its last
// column and row of pixels, to which 1 is added at some point.
struct BoxEnds {
  float added;       // 0 or 1
  bool in_overlaps;  // before overlaps are computed

  FCOS_INLINE float before() const { return in_overlaps ? added : 0.0f; }

  // A finite box inside an image.
  FCOS_INLINE Box clipped(const Box& b, float height, float width) const {
    const float bottom = height - added, right = width - added;
    return {fcos_ext::clipped(b.x0, right), fcos_ext::clipped(b.y0, bottom),
            fcos_ext::clipped(b.x1, right), fcos_ext::clipped(b.y1, bottom)};
  }

  // As overlaps are computed of it.
  FCOS_INLINE Box compared(const Box& b) const {
    return {b.x0, b.y0, b.x1 + before(), b.y1 + before()};
  }

  // Scaled, from what was compared.
  FCOS_INLINE Box result(const Box& b, float scale_y, float scale_x) const {
    return {product(b.x0, scale_x), product(b.y0, scale_y),
            product(b.x1 - before(), scale_x) + added, product(b.y1 - before(), scale_y) + added};
  }
};

}  // namespace fcos_ext
