// The argument rules of the operators on padded candidates, the same for CPU and CUDA.
#pragma once

#include <initializer_list>
#include <utility>

#include "checks.h"
#include "padded_batched_nms.h"

namespace fcos_ext {

// `others` [N, K] are scores and the like.
inline void check_candidates(const char* op, const Tensor& boxes,
                             std::initializer_list<std::pair<const char*, Tensor>> others,
                             int64_t max_detections) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, op, ": boxes must be [N, K, 4]");
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float, op, ": boxes must be Float, got ",
                  torch::headeronly::toString(boxes.scalar_type()));
  STD_TORCH_CHECK(boxes.size(1) <= int64_t(1) << 30, op, ": K must be at most 2^30, got ",
                  boxes.size(1));
  for (const auto& [name, t] : others) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == boxes.size(0) && t.size(1) == boxes.size(1), op,
                    ": ", name, " must have the shape of boxes without its last dimension");
    check_same_device(op, "boxes", boxes, name, t);
  }
  STD_TORCH_CHECK(max_detections >= 1, op, ": max_detections must be at least 1, got ",
                  max_detections);
}

// Calls f with a zero of the type of the scores, float or double, and one of that of the labels,
// int64_t or int32_t.
template <typename F>
void dispatch_candidates(const char* op, const Tensor& scores, const Tensor& labels, const F& f) {
  const auto with_score = [&](auto score) {
    if (labels.scalar_type() == ScalarType::Long) return f(score, int64_t(0));
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Int, op,
                    ": labels must be int64 or int32, got ",
                    torch::headeronly::toString(labels.scalar_type()));
    f(score, int32_t(0));
  };
  if (scores.scalar_type() == ScalarType::Float) return with_score(float(0));
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Double, op,
                  ": scores must be Float or Double, got ",
                  torch::headeronly::toString(scores.scalar_type()));
  with_score(double(0));
}

}  // namespace fcos_ext
