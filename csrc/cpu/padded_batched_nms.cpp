#include "../padded_batched_nms.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <tuple>
#include <vector>

#include "../padded_batched_nms_args.h"
#include "kept_boxes.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Most images are done after a few hundred of their candidates, so that sorting all of them would
// be most of the work. They are dealt into buckets of falling score, and a bucket is sorted when
// its turn comes.
constexpr int kMaxLogBuckets = 12;

template <typename score_t>
class RankOrder {
 public:
  // Of K candidates; those with a negative label are absent.
  template <typename label_t>
  FCOS_INLINE void deal(const score_t* scores, const label_t* labels, int64_t K) {
    using Key = OrderKey<score_t>;
    keys_.resize(K);
    ranks_.resize(K);
    Key lowest = ~Key(0), highest = 0;
    for (int64_t i = 0; i < K; ++i) {
      const Key key = labels[i] < 0 ? Key(0) : order_key(scores[i]);
      keys_[i] = key;
      highest = std::max(highest, key);
      lowest = std::min(lowest, key - 1);  // absent ones become the highest
    }
    ends_.assign(1, 0);
    if (highest == 0) return;
    // Buckets of equal width in the keys.
    const Key range = highest - (lowest + 1);
    const int log_buckets =
        std::min(kMaxLogBuckets, static_cast<int>(std::bit_width(uint64_t(K) / 2)));
    const int buckets = 1 << log_buckets;
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - log_buckets);
    const auto bucket_of = [&](Key key) { return key ? (highest - key) >> shift : Key(buckets); };
    ends_.assign(buckets + 2, 0);
    for (int64_t i = 0; i < K; ++i) ++ends_[bucket_of(keys_[i]) + 1];
    for (int b = 1; b <= buckets; ++b) ends_[b] += ends_[b - 1];
    // Each start moves on to become the end of its bucket.
    for (int64_t i = 0; i < K; ++i)
      ranks_[ends_[bucket_of(keys_[i])]++] = rank_of<score_t>(keys_[i], i);
    ends_.resize(buckets);
  }

  // Calls f(index) in rank order until it returns false.
  template <typename F>
  FCOS_INLINE void visit(const F& f) {
    uint32_t begin = 0;
    for (const uint32_t end : ends_) {
      sort(ranks_.data() + begin, ranks_.data() + end);
      for (; begin < end; ++begin)
        if (!f(index_of(ranks_[begin]))) return;
    }
  }

 private:
  __attribute__((noinline)) static void sort(Rank<score_t>* begin, Rank<score_t>* end) {
    std::sort(begin, end, std::greater<>());
  }

  std::vector<OrderKey<score_t>> keys_;
  std::vector<Rank<score_t>> ranks_;
  std::vector<uint32_t> ends_;
};

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
