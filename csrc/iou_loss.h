// Overlap loss of one pair of boxes, the one source of the formulas for CPU and CUDA.
//
// Both boxes are given as distances (l, t, r, b) from one location, see fcos_ext/iou_loss.py for
// the formulas and where they come from. With L the loss, I the intersection, U = A + B - I the
// union of the areas A (pred) and B, C = cw ch the area around both, D = U + smooth + eps and
// iou = (I + smooth) / D:
//   d iou / dI = (1 + iou) / D          d iou / dA = -iou / D
//   giou: d(-(C - U) / (C + eps)) leads to 1 / (C + eps) by I and -1 / (C + eps) by A
#pragma once

#include "math.h"

namespace fcos_ext {

// The numbers are those of the schema.
enum class IoUKind : int64_t { kIoU, kLinearIoU, kGIoU, kDIoU, kCIoU };

// -log(iou) is taken of at least this.
constexpr double kIoUFloor = 1e-6;
// A sum is divided by at least this.
constexpr double kNormalizerFloor = 1e-6;

template <typename T>
struct Ltrb {
  T l, t, r, b;
};

template <typename T>
struct BoxLoss {
  T loss;
  Ltrb<T> gradient;  // by pred
};

namespace iou_loss_detail {

// A side is at least 0. NaN stays.
template <typename T>
FCOS_INLINE T side(T signed_side) {
  return signed_side < T(0) ? T(0) : signed_side;
}

// The gradient of a side by what it is clamped from: also 1 where that is exactly 0.
template <typename T>
FCOS_INLINE T passed(T gradient, T signed_side) {
  return signed_side >= T(0) ? gradient : T(0);
}

// d min(p, t) / dp, one half at a tie. That of the maximum is the rest to 1.
template <typename T>
FCOS_INLINE T share_of_min(T p, T t) {
  return p > t ? T(0) : p == t ? T(0.5) : T(1);
}

template <typename T>
FCOS_INLINE T min_of(T p, T t) {
  return p < t ? p : t;
}
template <typename T>
FCOS_INLINE T max_of(T p, T t) {
  return p > t ? p : t;
}

}  // namespace iou_loss_detail

// (I + smooth) / (U + smooth + eps), the IoU.
template <typename T>
FCOS_INLINE T overlap_of(const Ltrb<T>& pred, const Ltrb<T>& target, T smooth, T eps) {
  using namespace iou_loss_detail;
  const T w_common = side(min_of(pred.l, target.l) + min_of(pred.r, target.r));
  const T h_common = side(min_of(pred.t, target.t) + min_of(pred.b, target.b));
  const T intersection = product(w_common, h_common);
  const T united = product(side(pred.l + pred.r), side(pred.t + pred.b)) +
                   product(side(target.l + target.r), side(target.t + target.b)) - intersection;
  return (intersection + smooth) / (united + smooth + eps);
}

// The loss and its gradient; what is not used of them costs nothing.
template <IoUKind kKind, typename T>
FCOS_INLINE BoxLoss<T> box_loss(const Ltrb<T>& pred, const Ltrb<T>& target, T smooth, T eps) {
  using namespace iou_loss_detail;
  // Signed sides of the predicted box, of what both have in common and of what is around both.
  const T sw = pred.l + pred.r, sh = pred.t + pred.b;
  const T sw_common = min_of(pred.l, target.l) + min_of(pred.r, target.r);
  const T sh_common = min_of(pred.t, target.t) + min_of(pred.b, target.b);
  const T sw_around = max_of(pred.l, target.l) + max_of(pred.r, target.r);
  const T sh_around = max_of(pred.t, target.t) + max_of(pred.b, target.b);
  const T w = side(sw), h = side(sh);
  const T w_target = side(target.l + target.r), h_target = side(target.t + target.b);
  const T w_common = side(sw_common), h_common = side(sh_common);
  const T w_around = side(sw_around), h_around = side(sh_around);

  // No fused multiply-add: of equal boxes all areas must be equal.
  const T intersection = product(w_common, h_common);
  const T united = product(w, h) + product(w_target, h_target) - intersection;
  const T divisor = united + smooth + eps;
  const T iou = (intersection + smooth) / divisor;

  T loss = T(1) - iou;
  T by_iou = T(-1);
  if constexpr (kKind == IoUKind::kIoU) {
    loss = -std::log(iou < T(kIoUFloor) ? T(kIoUFloor) : iou);
    by_iou = iou >= T(kIoUFloor) ? -reciprocal(iou) : T(0);
  }
  const T by_divisor = by_iou * reciprocal(divisor);
  T by_intersection = by_divisor * (T(1) + iou);
  T by_area = -by_divisor * iou;

  T by_w = 0, by_h = 0, by_w_around = 0, by_h_around = 0;
  T by_x = 0, by_y = 0;  // moving the box
  if constexpr (kKind == IoUKind::kGIoU) {
    const T around = product(w_around, h_around);
    const T gap = (around - united) / (around + eps);
    const T by_gap = reciprocal(around + eps);
    loss = T(1) - (iou - gap);
    by_intersection += by_gap;
    by_area -= by_gap;
    const T by_around = (T(1) - gap) * by_gap;
    by_w_around = by_around * h_around;
    by_h_around = by_around * w_around;
  }
  if constexpr (kKind == IoUKind::kDIoU || kKind == IoUKind::kCIoU) {
    const T dx = ((pred.r - pred.l) - (target.r - target.l)) / 2;
    const T dy = ((pred.b - pred.t) - (target.b - target.t)) / 2;
    const T diagonal = w_around * w_around + h_around * h_around + eps;
    const T distance = (dx * dx + dy * dy) / diagonal;
    loss = T(1) - iou + distance;
    const T by_distance = reciprocal(diagonal);
    by_x = dx * by_distance;
    by_y = dy * by_distance;
    const T by_diagonal = T(-2) * distance * by_distance;
    by_w_around = by_diagonal * w_around;
    by_h_around = by_diagonal * h_around;
  }
  if constexpr (kKind == IoUKind::kCIoU) {
    constexpr double kFourOverPiSquared = 0.405284734569351085775;
    // Where a side is not longer than eps, both angles are the same: v and its gradient are 0.
    const bool defined = w > eps && h > eps && w_target > eps && h_target > eps;
    const T aspect = defined ? w / h : T(1);
    const T angle = std::atan(defined ? w_target / h_target : T(1)) - std::atan(aspect);
    const T v = T(kFourOverPiSquared) * angle * angle;
    const T alpha = v / (T(1) - iou + v + eps);
    loss += alpha * v;
    const T by_aspect = T(-2) * alpha * T(kFourOverPiSquared) * angle *
                        reciprocal(T(1) + aspect * aspect) * reciprocal(h);
    by_w = defined ? by_aspect : T(0);
    by_h = defined ? -by_aspect * aspect : T(0);
  }

  by_w = passed(by_w + by_area * h, sw);
  by_h = passed(by_h + by_area * w, sh);
  const T by_w_common = passed(by_intersection * h_common, sw_common);
  const T by_h_common = passed(by_intersection * w_common, sh_common);
  by_w_around = passed(by_w_around, sw_around);
  by_h_around = passed(by_h_around, sh_around);

  const Ltrb<T> share{share_of_min(pred.l, target.l), share_of_min(pred.t, target.t),
                      share_of_min(pred.r, target.r), share_of_min(pred.b, target.b)};
  BoxLoss<T> result;
  result.loss = loss;
  result.gradient.l = by_w + by_w_common * share.l + by_w_around * (T(1) - share.l) - by_x;
  result.gradient.t = by_h + by_h_common * share.t + by_h_around * (T(1) - share.t) - by_y;
  result.gradient.r = by_w + by_w_common * share.r + by_w_around * (T(1) - share.r) + by_x;
  result.gradient.b = by_h + by_h_common * share.b + by_h_around * (T(1) - share.b) + by_y;
  return result;
}

}  // namespace fcos_ext
