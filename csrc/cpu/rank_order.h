// Candidates of an image in the order of padded_batched_nms.h, of which few are visited.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>
#include <vector>

#include "../padded_batched_nms.h"

namespace fcos_ext {

// Most images are done after a few hundred of their candidates, so that sorting all of them would
// be most of the work. They are dealt into buckets of falling score, and a bucket is sorted when
// its turn comes.
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

  // Calls f(index) in rank order until it returns false. before(i, j) tells which of two
  // candidates of equal score comes first.
  template <typename F, typename Before = std::less<>>
  FCOS_INLINE void visit(const F& f, const Before& before = {}) {
    uint32_t begin = 0;
    for (const uint32_t end : ends_) {
      sort(ranks_.data() + begin, ranks_.data() + end, before);
      for (; begin < end; ++begin)
        if (!f(index_of(ranks_[begin]))) return;
    }
  }

 private:
  static constexpr int kMaxLogBuckets = 12;

  template <typename Before>
  __attribute__((noinline)) static void sort(Rank<score_t>* begin, Rank<score_t>* end,
                                             const Before& before) {
    std::sort(begin, end, [&](Rank<score_t> a, Rank<score_t> b) {
      return a >> 32 != b >> 32 ? a > b : before(index_of(a), index_of(b));
    });
  }

  std::vector<OrderKey<score_t>> keys_;
  std::vector<Rank<score_t>> ranks_;
  std::vector<uint32_t> ends_;
};

}  // namespace fcos_ext
