// The argument rules of soft_nms, the same for CPU and CUDA.
#pragma once

#include "padded_batched_nms_args.h"
#include "soft_nms.h"

namespace fcos_ext {

inline void check_soft_nms(const Tensor& boxes, const Tensor& scores,
                           const std::optional<Tensor>& groups, double score_threshold,
                           int64_t max_detections) {
  constexpr const char* kOp = "soft_nms";
  check_candidates(kOp, boxes, {{"scores", scores}, {"groups", groups ? *groups : scores}},
                   max_detections);
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, kOp, ": scores must be Float, got ",
                  torch::headeronly::toString(scores.scalar_type()));
  STD_TORCH_CHECK(!groups || groups->scalar_type() == ScalarType::Long, kOp,
                  ": groups must be Long, got ",
                  torch::headeronly::toString(groups ? groups->scalar_type() : ScalarType::Long));
  // A score of 0 stands for one that is out of the running.
  STD_TORCH_CHECK(score_threshold >= 0, kOp, ": score_threshold must be at least 0, got ",
                  score_threshold);
}

}  // namespace fcos_ext
