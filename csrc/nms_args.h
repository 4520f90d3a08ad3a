// The argument rules of nms, the same for CPU and CUDA, and the forms its kernels take them in.
#pragma once

#include <limits>

#include "checks.h"
#include "nms.h"

namespace fcos_ext {

inline void check_nms(const Tensor& boxes, const Tensor& scores,
                      const std::optional<Tensor>& groups) {
  constexpr const char* kOp = "nms";
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, kOp, ": boxes must be [K, 4], got ",
                  boxes.dim(), " dimensions, the last of size ",
                  boxes.dim() > 0 ? boxes.size(-1) : 0);
  check_floating(kOp, "boxes", boxes);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), kOp,
                  ": scores must be [K], one for each box");
  check_floating(kOp, "scores", scores);
  check_same_device(kOp, "boxes", boxes, "scores", scores);
  STD_TORCH_CHECK(boxes.size(0) <= std::numeric_limits<int32_t>::max(), kOp,
                  ": at most 2^31 - 1 boxes, got ", boxes.size(0));
  if (!groups) return;
  STD_TORCH_CHECK(groups->dim() == 1 && groups->size(0) == boxes.size(0), kOp,
                  ": groups must be [K], one for each box");
  STD_TORCH_CHECK(groups->scalar_type() == ScalarType::Long, kOp, ": groups must be int64, got ",
                  torch::headeronly::toString(groups->scalar_type()));
  check_same_device(kOp, "boxes", boxes, "groups", *groups);
}

// Contiguous float32: what IoUs are computed from.
inline Tensor float_boxes(const Tensor& boxes) {
  const bool is_float = boxes.scalar_type() == ScalarType::Float;
  return torch::stable::contiguous(is_float ? boxes : torch::stable::to(boxes, ScalarType::Float));
}

// How many boxes may be kept: max_detections, or, if that is negative, all.
inline int64_t keep_limit(int64_t num_boxes, int64_t max_detections) {
  return max_detections < 0 || max_detections > num_boxes ? num_boxes : max_detections;
}

}  // namespace fcos_ext
