// How postprocess finds candidates among the logits on a CPU: one read of them, one comparison for
// most, and none where the centerness rules a location out.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "../padded_batched_nms.h"
#include "../postprocess_args.h"
#include "simd.h"

namespace fcos_ext {

// Logits of one work item, about; and locations at most.
constexpr int kTilePairs = 1 << 16, kTileLocations = 1 << 12;
// Logits that are compared with the cutoff together.
constexpr int kStep = 64;
// And how many are fetched before that.
constexpr int kAhead = 16 * kStep;
// Logits above it that are scored together.
constexpr int kScored = 256;

using Ranks = std::vector<Rank<float>>;

// Leaves the best k, in any order, and returns the lowest of them; 0 if there are not more. Not
// inlined, which spares a copy for each instruction set.
__attribute__((noinline)) inline Rank<float> keep_best(Ranks& ranks, size_t k) {
  if (ranks.size() <= k) return 0;
  // Counted by the upper bits of the score, which lies in (0, 1], 32 bins for each power of 2: only
  // the bin at the border has to be looked at closely.
  constexpr int kShift = 32 + 18, kBins = 4096;
  const auto bin_of = [](Rank<float> rank) {
    return static_cast<size_t>(rank >> kShift) & (kBins - 1);
  };
  uint32_t counts[kBins] = {};
  for (const Rank<float> rank : ranks) ++counts[bin_of(rank)];
  size_t above = 0, border = kBins - 1;
  while (above + counts[border] < k) above += counts[border--];
  Ranks close;
  close.reserve(counts[border]);
  size_t kept = 0;
  for (const Rank<float> rank : ranks) {
    const size_t bin = bin_of(rank);
    if (bin == border) close.push_back(rank);
    ranks[kept] = rank;
    kept += bin > border;
  }
  const auto last = close.begin() + static_cast<int64_t>(k - above) - 1;
  std::nth_element(close.begin(), last, close.end(), std::greater<>());
  const Rank<float> lowest = *last;
  ranks.resize(kept);
  ranks.insert(ranks.end(), close.begin(), last + 1);
  return lowest;
}

// Some locations of a level of an image. What is found goes from tile to tile as long as one thread
// takes the next one of the same level and image.
struct Tile {
  int64_t image;
  int level;
  int begin, end;
  Ranks ranks;            // the best k at least, of those up to here
  Rank<float> floor = 0;  // k of them are not below
  int64_t dropped = 0;

  bool continues(const Tile& before) const {
    return image == before.image && level == before.level;
  }
};

// In planes, a tile has a piece of each: longer ones are read faster.
inline int locations_of_a_tile(const PostprocessLevel& level, int64_t classes) {
  const int64_t pairs = level.planes ? 4 * kTilePairs : kTilePairs;
  const int fit = static_cast<int>(std::min<int64_t>(pairs / classes, kTileLocations));
  return std::max(kStep, fit / kStep * kStep);
}

// Finds the candidates of a tile.
template <typename scalar_t>
class Search {
 public:
  using acc = acc_t<scalar_t>;

  Search(const PostprocessCall& call, const Cutoff& cutoff, Tile& tile)
      : level_(call.levels[tile.level]),
        tile_(tile),
        scoring_(call.scoring),
        threshold_(cutoff),
        classes_(static_cast<int>(call.classes)),
        k_(static_cast<size_t>(level_.max_candidates)),
        logits_(static_cast<const scalar_t*>(level_.logits) + tile.image * level_.image_stride) {}

  FCOS_INLINE void run() {
    if (scoring_.on_final || tile_.floor) read_centerness();
    set_cutoffs();
    if (scoring_.on_final) count_dropped_locations();
    if (level_.planes || classes_ == 1)
      walk_planes();
    else
      walk_rows();
    score();
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  FCOS_INLINE static int passes(scalar_t x, acc cutoff) { return !(static_cast<acc>(x) <= cutoff); }

  FCOS_INLINE int size() const { return tile_.end - tile_.begin; }

  FCOS_INLINE void read_centerness() {
    has_centerness_ = true;
    const Maps& maps = level_.centerness;
    if (!maps.numbers.data) {
      std::fill(centerness_, centerness_ + size(), kInfinity);
      return;
    }
    switch (maps.numbers.dtype) {
      case ScalarType::Double:
        return read_centerness(static_cast<const double*>(maps.numbers.data));
      case ScalarType::Half:
        return read_centerness(static_cast<const torch::headeronly::Half*>(maps.numbers.data));
      case ScalarType::BFloat16:
        return read_centerness(static_cast<const torch::headeronly::BFloat16*>(maps.numbers.data));
      default:
        return read_centerness(static_cast<const float*>(maps.numbers.data));
    }
  }

  template <typename T>
  FCOS_INLINE void read_centerness(const T* data) {
    const Maps& maps = level_.centerness;
    int y = tile_.begin / level_.width, x = tile_.begin - y * level_.width;
    for (int i = 0; i < size(); x = 0, ++y) {
      const int n = std::min(size() - i, level_.width - x);
      const T* from = data + maps.offset(tile_.image, y, x);
      float* to = centerness_ + i;
      if (maps.column == 1)
        for (int k = 0; k < n; ++k) to[k] = static_cast<float>(from[k]);
      else
        for (int k = 0; k < n; ++k) to[k] = static_cast<float>(from[k * maps.column]);
      i += n;
    }
  }

  // What the logits of each location are compared with. Infinite: they need not be read, as the
  // centerness fails.
  FCOS_INLINE void set_cutoffs() {
    const int n = size();
    const float any = static_cast<float>(threshold_.any);
    if (scoring_.on_final)
      for (int i = 0; i < n; ++i) {
        const float c = centerness_[i];
        const float cutoff = c == c ? threshold_.at(c) : kInfinity;
        cutoffs_[i] = cutoff > any ? cutoff : any;
      }
    else
      std::fill(cutoffs_, cutoffs_ + n, any);
    raise_cutoffs();
  }

  // To the floor, of class scores or of products; but what is not a number has to be found all the
  // same.
  FCOS_INLINE void raise_cutoffs() {
    if (!tile_.floor) return;
    const float floor = score_of_key(static_cast<OrderKey<float>>(tile_.floor >> 32));
    if (!(floor > 1e-30f)) return;
    const float inverse = 1.0f / floor;
    for (int i = 0; i < size(); ++i) {
      const float c = centerness_[i];
      const float raised = Cutoff::of_product(inverse, scoring_.by_class && c == c ? kInfinity : c);
      const float finite = std::min(raised, std::numeric_limits<float>::max());
      cutoffs_[i] = finite > cutoffs_[i] ? finite : cutoffs_[i];
    }
  }

  // A location whose centerness is not a number counts once for each class, read or not.
  FCOS_INLINE void count_dropped_locations() {
    int count = 0;
    for (int i = 0; i < size(); ++i) count += centerness_[i] != centerness_[i];
    tile_.dropped += int64_t(count) * classes_;
  }

  FCOS_INLINE void walk_planes() {
    bool ruled_out[kTileLocations / kStep];
    for (int i = 0; i + kStep <= size(); i += kStep) {
      int any = 0;
      for (int k = 0; k < kStep; ++k) any |= cutoffs_[i + k] < kInfinity;
      ruled_out[i / kStep] = !any;
    }
    for (int c = 0; c < classes_; ++c) {
      const scalar_t* plane = logits_ + int64_t(c) * level_.locations + tile_.begin;
      int i = 0;
      for (; i + kStep <= size(); i += kStep) {
        if (ruled_out[i / kStep]) continue;
        prefetch(plane, i + kAhead);
        const scalar_t* x = plane + i;  // with an index from 0, or the loop is not vectorised
        const float* cutoff = cutoffs_ + i;
        int any = 0;
        for (int k = 0; k < kStep; ++k) any |= passes(x[k], static_cast<acc>(cutoff[k]));
        if (!any) continue;
        for_each_passing([&](int k) { return passes(x[k], static_cast<acc>(cutoff[k])); },
                         [&](int k) { take(i + k, c); });
        if (count_ >= kScored) score();
      }
      for (; i < size(); ++i)
        if (passes(plane[i], static_cast<acc>(cutoffs_[i]))) take(i, c);
      if (count_ >= kScored) score();
    }
  }

  // The piece of a plane ends where the hardware would only begin to read ahead.
  FCOS_INLINE void prefetch(const scalar_t* plane, int i) {
    const scalar_t* ahead = plane + i + (i < size() ? 0 : level_.locations - size());
    for (size_t line = 0; line < kStep * sizeof(scalar_t); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line);
  }

  FCOS_INLINE void walk_rows() {
    const scalar_t* first = logits_ + int64_t(tile_.begin) * classes_;
    const int n = size() * classes_;
    int location = 0, next = classes_;  // where that of logit i ends
    for (int i = 0; i < n; i += kStep) {
      for (; next <= i; next += classes_) ++location;
      const int end = std::min(i + kStep, n);
      // Of the logits of that location, and of the others, which from 64 classes on is one.
      const float head = cutoffs_[location];
      float tail = kInfinity;
      for (int l = location + 1, start = next; start < end; ++l, start += classes_)
        tail = std::min(tail, cutoffs_[l]);
      if (head == kInfinity && tail == kInfinity) continue;
      const scalar_t* x = first + i;
      const int border = next - i;
      const auto may_pass = [&](int k) {
        return passes(x[k], static_cast<acc>(k < border ? head : tail));
      };
      const auto found = [&](int k) {
        int l = location, beyond = next;
        for (; beyond <= i + k; beyond += classes_) ++l;
        if (passes(x[k], static_cast<acc>(cutoffs_[l]))) take(l, i + k - beyond + classes_);
      };
      if (end - i == kStep) {
        int any = 0;
        for (int k = 0; k < kStep; ++k) any |= may_pass(k);
        if (any) for_each_passing(may_pass, found);
      } else {
        for (int k = 0; k < end - i; ++k)
          if (may_pass(k)) found(k);
      }
      if (count_ >= kScored) score();
    }
  }

  // Calls f(k) for k of [0, kStep) that pass.
  template <typename Passes, typename F>
  FCOS_INLINE static void for_each_passing(const Passes& passes, const F& f) {
    uint8_t flags[kStep];
    for (int k = 0; k < kStep; ++k) flags[k] = static_cast<uint8_t>(passes(k));
    for (int k = 0; k < kStep; k += 8) {
      uint64_t eight;
      std::memcpy(&eight, flags + k, sizeof(eight));
      for (; eight; eight &= eight - 1) f(k + std::countr_zero(eight) / 8);
    }
  }

  FCOS_INLINE void take(int location, int c) {
    location_[count_] = tile_.begin + location;
    class_[count_++] = c;
  }

  FCOS_INLINE void score() {
    for (int i = 0; i < count_; ++i) {
      const int location = location_[i], c = class_[i];
      const int y = location / level_.width, x = location - y * level_.width;
      const int64_t at = level_.planes ? int64_t(c) * level_.locations + location
                                       : int64_t(location) * classes_ + c;
      cls_[i] = static_cast<double>(static_cast<acc>(logits_[at]));
      weight_[i] = level_.template centerness_at<double>(tile_.image, y, x);
    }
    // One short loop each, or they are not vectorised.
    float cls[kScored + kStep], weight[kScored + kStep];
    for (int i = 0; i < count_; ++i) cls[i] = sigmoid_by_series(cls_[i]);
    for (int i = 0; i < count_; ++i) weight[i] = sigmoid_by_series(weight_[i]);
    const Scoring scoring = scoring_;
    for (int i = 0; i < count_; ++i) score_[i] = scoring.judge(cls[i], weight[i]);
    for (int i = 0; i < count_; ++i) {
      const float score = score_[i];
      // A location whose centerness is not a number has been counted for all classes, if all are.
      tile_.dropped += score != score && !(scoring_.on_final && weight_[i] != weight_[i]);
      if (!(score > 0.0f)) continue;
      const Rank<float> rank =
          rank_of<float>(order_key(score), int64_t(location_[i]) * classes_ + class_[i]);
      if (rank > tile_.floor) tile_.ranks.push_back(rank);
    }
    count_ = 0;
    if (tile_.ranks.size() < k_ + k_ / 2 + kScored) return;
    // The floor rises, and with it what logits are compared with.
    tile_.floor = keep_best(tile_.ranks, k_);
    if (!has_centerness_) read_centerness();
    raise_cutoffs();
  }

  const PostprocessLevel& level_;
  Tile& tile_;
  const Scoring scoring_;
  const Cutoff threshold_;
  const int classes_;
  const size_t k_;
  const scalar_t* logits_;
  bool has_centerness_ = false;
  int count_ = 0;
  int location_[kScored + kStep], class_[kScored + kStep];
  double cls_[kScored + kStep], weight_[kScored + kStep];
  float score_[kScored + kStep];
  alignas(64) float centerness_[kTileLocations];
  alignas(64) float cutoffs_[kTileLocations];
};

}  // namespace fcos_ext
