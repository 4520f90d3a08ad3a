// The argument rules of box_and_centerness_loss, the same for CPU and CUDA.
#pragma once

#include "box_and_centerness_loss.h"
#include "iou_loss_args.h"

namespace fcos_ext {

// What the forward and the backward read: the tensors, kept alive, and their rows.
struct BoxAndCenternessInputs {
  Input pred, centerness, target;
  std::optional<Input> centerness_target;
  Tensor labels;
  int64_t rows;

  BoxAndCenternessInputs(const Tensor& p, const Tensor& c, const Tensor& t, const Tensor& l,
                         const std::optional<Tensor>& given)
      : pred(p, p.dim() - 1),
        centerness(c, c.dim()),
        target(t, t.dim() - 1),
        labels(torch::stable::contiguous(l)),
        rows(p.numel() / 4) {
    if (given) centerness_target.emplace(*given, given->dim());
  }
};

inline void check_box_and_centerness_loss(const char* op, const Tensor& pred,
                                          const Tensor& centerness, const Tensor& target,
                                          const Tensor& labels,
                                          const std::optional<Tensor>& centerness_target,
                                          int64_t kind) {
  check_boxes(op, pred, target, kind);
  check_floating(op, "centerness", centerness);
  check_one_per_row(op, "centerness", centerness, pred);
  check_labels(op, labels, pred);
  if (!centerness_target) return;
  check_floating(op, "centerness_target", *centerness_target);
  check_one_per_row(op, "centerness_target", *centerness_target, pred);
}

}  // namespace fcos_ext
