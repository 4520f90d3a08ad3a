#include "../soft_nms.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../soft_nms_args.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Candidates that are looked at together, and passed over once all are out of the running.
constexpr int kBlock = 64;

// The candidates of one image. Those that fill up the last block have a score of 0.
class Candidates {
 public:
  FCOS_INLINE void load(const Box* boxes, const float* scores, const int64_t* groups, int64_t K,
                        const SoftNms& rule) {
    blocks_.resize((K + kBlock - 1) / kBlock);
    for (size_t b = 0; b < blocks_.size(); ++b) {
      Block& block = blocks_[b];
      const int64_t first = int64_t(b) * kBlock;
      const int size = static_cast<int>(std::min<int64_t>(kBlock, K - first));
      block = Block{};
      for (int k = 0; k < size; ++k) {
        const Box& box = boxes[first + k];
        block.x0[k] = box.x0, block.y0[k] = box.y0, block.x1[k] = box.x1, block.y1[k] = box.y1;
        block.area[k] = area_of(box);
        block.score[k] = rule.live(scores[first + k]);
        const int64_t group = groups ? groups[first + k] : 0;
        block.low[k] = static_cast<int32_t>(group);
        block.high[k] = static_cast<int32_t>(group >> 32);
      }
      for (int k = 0; k < size; ++k) block.best = std::max(block.best, bits_of(block.score[k]));
    }
  }

  // The first candidate with the highest score, or -1 if none is left.
  FCOS_INLINE int64_t best() const {
    int32_t highest = 0;
    size_t at = 0;
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (blocks_[b].best > highest) highest = blocks_[b].best, at = b;
    if (highest == 0) return -1;
    int k = 0;
    while (bits_of(blocks_[at].score[k]) != highest) ++k;
    return int64_t(at) * kBlock + k;
  }

  // Takes candidate i out, and from the others what it takes from their scores. Returns its score.
  template <bool kGaussian>
  FCOS_INLINE float select(int64_t i, const SoftNms& rule) {
    Block& own = blocks_[i / kBlock];
    const int at = static_cast<int>(i % kBlock);
    const Box box{own.x0[at], own.y0[at], own.x1[at], own.y1[at]};
    const float area = own.area[at], score = own.score[at];
    const int32_t low = own.low[at], high = own.high[at];
    own.score[at] = 0;
    for (Block& block : blocks_) {
      if (block.best == 0) continue;
      int32_t best = 0;
#pragma omp simd reduction(max : best)
      for (int k = 0; k < kBlock; ++k) {
        const Box other{block.x0[k], block.y0[k], block.x1[k], block.y1[k]};
        const float iou = iou_of(box, area, other, block.area[k]);
        const float left = rule.decayed<kGaussian>(block.score[k], iou);
        const bool same = (block.low[k] == low) & (block.high[k] == high);
        block.score[k] = same ? left : block.score[k];
        best = std::max(best, bits_of(block.score[k]));
      }
      block.best = best;
    }
    return score;
  }

 private:
  struct alignas(64) Block {
    float x0[kBlock] = {}, y0[kBlock] = {}, x1[kBlock] = {}, y1[kBlock] = {}, area[kBlock] = {};
    float score[kBlock] = {};
    // Halves of the group: as wide as the floats, they are compared in the same vectors.
    int32_t low[kBlock] = {}, high[kBlock] = {};
    int32_t best = 0;  // bits of the highest score
  };
  std::vector<Block> blocks_;
};

std::tuple<Tensor, Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores,
                                                const std::optional<Tensor>& groups,
                                                double iou_threshold, double sigma,
                                                double score_threshold, bool gaussian,
                                                int64_t max_detections) {
  check_soft_nms(boxes, scores, groups, score_threshold, max_detections);
  const Tensor b = torch::stable::contiguous(boxes);
  const Tensor s = torch::stable::contiguous(scores);
  const Tensor g = groups ? torch::stable::contiguous(*groups) : s;
  const int64_t N = b.size(0), K = b.size(1), D = max_detections;
  Tensor keep = torch::stable::new_empty(b, {N, D}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(b, {N, D}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(b, {N}, ScalarType::Long);
  const SoftNms rule{float(iou_threshold), float(sigma), float(score_threshold)};
  const auto* box_ptr = reinterpret_cast<const Box*>(b.const_data_ptr<float>());
  const auto* score_ptr = s.const_data_ptr<float>();
  const int64_t* group_ptr = groups ? g.const_data_ptr<int64_t>() : nullptr;
  auto* keep_ptr = keep.mutable_data_ptr<int64_t>();
  auto* kept_ptr = kept_scores.mutable_data_ptr<float>();
  auto* count_ptr = counts.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, N, 1, [&](int64_t first, int64_t last) {
    Candidates candidates;
    for (int64_t n = first; n < last; ++n)
      with_cpu_isa([&, n] {
        candidates.load(box_ptr + n * K, score_ptr + n * K, group_ptr ? group_ptr + n * K : nullptr,
                        K, rule);
        int64_t count = 0;
        for (; count < D; ++count) {
          const int64_t i = candidates.best();
          if (i < 0) break;
          keep_ptr[n * D + count] = i;
          kept_ptr[n * D + count] =
              gaussian ? candidates.select<true>(i, rule) : candidates.select<false>(i, rule);
        }
        std::fill(keep_ptr + n * D + count, keep_ptr + (n + 1) * D, int64_t(-1));
        std::fill(kept_ptr + n * D + count, kept_ptr + (n + 1) * D, 0.0f);
        count_ptr[n] = count;
      });
  });
  return {keep, kept_scores, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms_cpu)); }

}  // namespace fcos_ext
