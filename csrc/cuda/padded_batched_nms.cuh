// What postprocess calls of padded_batched_nms.
#pragma once

#include <tuple>

#include "../common.h"

namespace fcos_ext {

// keep [N, D] and counts [N] of boxes [N, K, 4], scores and labels [N, K].
std::tuple<Tensor, Tensor> padded_batched_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                   const Tensor& labels, double iou_threshold,
                                                   int64_t max_detections, bool class_agnostic);

}  // namespace fcos_ext
