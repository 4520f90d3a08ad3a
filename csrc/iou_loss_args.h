// The argument rules of iou_loss, the same for CPU and CUDA.
#pragma once

#include "checks.h"
#include "integers.h"
#include "iou_loss.h"
#include "rows.h"

namespace fcos_ext {

// The numbers are those of the schema.
enum class Reduction : int64_t { kNone, kSum, kMean };

// Calls f with std::integral_constant<IoUKind, kind>.
template <typename F>
inline void dispatch_kind(IoUKind kind, const F& f) {
  switch (kind) {
    case IoUKind::kIoU:
      return f(std::integral_constant<IoUKind, IoUKind::kIoU>{});
    case IoUKind::kLinearIoU:
      return f(std::integral_constant<IoUKind, IoUKind::kLinearIoU>{});
    case IoUKind::kGIoU:
      return f(std::integral_constant<IoUKind, IoUKind::kGIoU>{});
    case IoUKind::kDIoU:
      return f(std::integral_constant<IoUKind, IoUKind::kDIoU>{});
    case IoUKind::kCIoU:
      return f(std::integral_constant<IoUKind, IoUKind::kCIoU>{});
  }
}

// Calls f with a zero of the type that pred is computed in.
template <typename F>
void dispatch_acc(const Tensor& pred, const F& f) {
  if (pred.scalar_type() == ScalarType::Double) return f(double{});
  f(float{});
}

// pred and target [..., 4], and the kind.
inline void check_boxes(const char* op, const Tensor& pred, const Tensor& target, int64_t kind) {
  check_floating(op, "pred", pred);
  check_floating(op, "target", target);
  STD_TORCH_CHECK(pred.dim() >= 1 && pred.size(-1) == 4, op, ": pred must be [..., 4], got ",
                  pred.dim(), " dimensions, the last of ",
                  pred.dim() >= 1 ? pred.size(-1) : int64_t(0));
  STD_TORCH_CHECK(target.sizes().equals(pred.sizes()), op, ": target must have the shape of pred");
  check_same_device(op, "pred", pred, "target", target);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(IoUKind::kCIoU), op,
                  ": kind must lie in 0..4, got ", kind);
}

// t has one value for each row of pred.
inline void check_one_per_row(const char* op, const char* name, const Tensor& t,
                              const Tensor& pred) {
  bool agree = t.dim() == pred.dim() - 1;
  for (int64_t d = 0; agree && d < t.dim(); ++d) agree = t.size(d) == pred.size(d);
  STD_TORCH_CHECK(agree, op, ": ", name, " must have the shape of pred without its last dimension");
  check_same_device(op, "pred", pred, name, t);
}

inline void check_labels(const char* op, const Tensor& labels, const Tensor& pred) {
  check_integer(op, "labels", labels);
  check_one_per_row(op, "labels", labels, pred);
}

inline void check_iou_loss(const char* op, const Tensor& pred, const Tensor& target,
                           const std::optional<Tensor>& weights,
                           const std::optional<Tensor>& labels, int64_t kind) {
  check_boxes(op, pred, target, kind);
  if (weights) {
    check_floating(op, "weights", *weights);
    check_one_per_row(op, "weights", *weights, pred);
  }
  if (labels) check_labels(op, *labels, pred);
}

inline void check_reduction(const char* op, int64_t reduction, const Tensor& pred,
                            const std::optional<Tensor>& normalizer) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": reduction must lie in 0..2, got ",
                  reduction);
  if (!normalizer) return;
  STD_TORCH_CHECK(reduction == static_cast<int64_t>(Reduction::kSum), op,
                  ": normalizer needs the sum, got reduction ", reduction);
  check_scalar(op, "normalizer", *normalizer, "pred", pred);
}

// `grad` is that of the sum, with the divisor of the sum, or that of each loss.
inline void check_iou_loss_grad(const char* op, const Tensor& grad, const Tensor& pred,
                                const std::optional<Tensor>& divisor) {
  if (divisor) {
    check_scalar(op, "grad", grad, "pred", pred);
    return check_scalar(op, "divisor", *divisor, "pred", pred);
  }
  STD_TORCH_CHECK(grad.scalar_type() == pred.scalar_type(), op,
                  ": grad must have the dtype of pred, got ",
                  torch::headeronly::toString(grad.scalar_type()));
  check_one_per_row(op, "grad", grad, pred);
}

// The shape of one value for each row.
inline torch::headeronly::IntHeaderOnlyArrayRef batch_sizes(const Tensor& pred) {
  return {pred.sizes().data(), static_cast<size_t>(pred.dim() - 1)};
}

}  // namespace fcos_ext
