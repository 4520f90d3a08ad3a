#include "../padded_batched_nms.h"

#include <algorithm>
#include <tuple>

#include "../padded_batched_nms_args.h"
#include "kept_boxes.h"
#include "rank_order.h"
#include "simd.h"

namespace fcos_ext {
namespace {

std::tuple<Tensor, Tensor> padded_batched_nms_cpu(const Tensor& boxes, const Tensor& scores,
                                                  const Tensor& labels, double iou_threshold,
                                                  int64_t max_detections, bool class_agnostic) {
  constexpr const char* kOp = "padded_batched_nms";
  check_candidates(kOp, boxes, {{"scores", scores}, {"labels", labels}}, max_detections);
  const Tensor b = torch::stable::contiguous(boxes);
  const Tensor s = torch::stable::contiguous(scores);
  const Tensor l = torch::stable::contiguous(labels);
  const int64_t N = b.size(0), K = b.size(1), D = max_detections;
  Tensor keep = torch::stable::new_empty(b, {N, D}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(b, {N}, ScalarType::Long);
  dispatch_candidates(kOp, s, l, [&](auto score, auto label) {
    using score_t = decltype(score);
    using label_t = decltype(label);
    const auto* box_ptr = reinterpret_cast<const Box*>(b.const_data_ptr<float>());
    const auto* score_ptr = s.const_data_ptr<score_t>();
    const auto* label_ptr = l.const_data_ptr<label_t>();
    auto* keep_ptr = keep.mutable_data_ptr<int64_t>();
    auto* count_ptr = counts.mutable_data_ptr<int64_t>();
    torch::stable::parallel_for(0, N, 1, [&](int64_t first, int64_t last) {
      RankOrder<score_t> order;
      KeptBoxes kept;
      for (int64_t n = first; n < last; ++n)
        with_cpu_isa([&, n] {
          order.deal(score_ptr + n * K, label_ptr + n * K, K);
          kept.clear();
          int64_t count = 0;
          order.visit([&](int64_t i) {
            const Box box = box_ptr[n * K + i];
            const int64_t group = class_agnostic ? 0 : int64_t(label_ptr[n * K + i]);
            if (!kept.add_unless_suppressed(box, group, float(iou_threshold))) return true;
            keep_ptr[n * D + count] = i;
            return ++count < D;
          });
          std::fill(keep_ptr + n * D + count, keep_ptr + (n + 1) * D, int64_t(-1));
          count_ptr[n] = count;
        });
    });
  });
  return {keep, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("padded_batched_nms", TORCH_BOX(&padded_batched_nms_cpu));
}

}  // namespace fcos_ext
