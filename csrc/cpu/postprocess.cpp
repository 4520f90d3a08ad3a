#include "../postprocess.h"

#include <algorithm>
#include <array>
#include <functional>
#include <tuple>
#include <vector>

#include "../padded_batched_nms.h"
#include "../postprocess_args.h"
#include "kept_boxes.h"
#include "rank_order.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Logits of one work item. They lie side by side in the memory of one image and level.
constexpr int kTile = 1 << 16;
// Logits that are compared with the cutoff together.
constexpr int kStep = 64;
// Logits above it that are scored together.
constexpr int kBlock = 256;

using Ranks = std::vector<Rank<float>>;

// Leaves the best k, in any order. Not inlined, which spares a copy for each instruction set.
__attribute__((noinline)) void keep_best(Ranks& ranks, size_t k) {
  if (ranks.size() <= k) return;
  std::nth_element(ranks.begin(), ranks.begin() + static_cast<int64_t>(k) - 1, ranks.end(),
                   std::greater<>());
  ranks.resize(k);
}

__attribute__((noinline)) void sort_best(Ranks& ranks, size_t k) {
  keep_best(ranks, k);
  std::sort(ranks.begin(), ranks.end(), std::greater<>());
}

struct Tile {
  int64_t image;
  int level;
  int begin, end;  // in the logits of the image
  Ranks ranks;
  int64_t dropped = 0;
};

// Finds the candidates of a tile. The best k of them at least.
template <typename scalar_t>
class Search {
 public:
  using acc = acc_t<scalar_t>;

  Search(const PostprocessCall& call, const Cutoff& cutoff, Tile& tile)
      : level_(call.levels[tile.level]),
        tile_(tile),
        scoring_(call.scoring),
        classes_(static_cast<int>(call.classes)),
        k_(static_cast<size_t>(level_.max_candidates)),
        cutoff_(static_cast<acc>(cutoff.any)),
        logits_(static_cast<const scalar_t*>(level_.logits) + tile.image * level_.image_stride) {}

  FCOS_INLINE void run() {
    for (int i = tile_.begin; i < tile_.end; i += kStep) {
      const scalar_t* x = logits_ + i;  // with an index from 0, or the loop is not vectorised
      const int n = std::min(kStep, tile_.end - i);
      int any = 0;
      if (n == kStep)
        for (int k = 0; k < kStep; ++k) any |= passes(x[k]);
      else
        for (int k = 0; k < n; ++k) any |= passes(x[k]);
      if (!any) continue;
      for (int k = 0; k < n; ++k) {
        found_[count_] = i + k;
        count_ += passes(x[k]);
      }
      if (count_ >= kBlock) score();
    }
    score();
    keep_best(tile_.ranks, k_);
  }

 private:
  FCOS_INLINE int passes(scalar_t x) const { return !(static_cast<acc>(x) <= cutoff_); }

  FCOS_INLINE void score() {
    for (int i = 0; i < count_; ++i) {
      const int at = found_[i];
      const int slow = at / (level_.planes ? level_.locations : classes_);
      const int fast = at - slow * (level_.planes ? level_.locations : classes_);
      const int location = level_.planes ? fast : slow, c = level_.planes ? slow : fast;
      const int y = location / level_.width, x = location - y * level_.width;
      cls_[i] = static_cast<double>(static_cast<acc>(logits_[at]));
      weight_[i] =
          level_.centerness.numbers.at<double>(level_.centerness.offset(tile_.image, y, x));
      flat_[i] = location * classes_ + c;
    }
    for (int i = 0; i < count_; ++i)
      score_[i] = scoring_.judge(sigmoid_by_series(cls_[i]), sigmoid_by_series(weight_[i]));
    for (int i = 0; i < count_; ++i) {
      const float score = score_[i];
      // A location whose centerness is not a number is counted once for all classes, if all are.
      tile_.dropped += score != score && !(scoring_.on_final && weight_[i] != weight_[i]);
      if (!(score > 0.0f)) continue;
      const Rank<float> rank = rank_of<float>(order_key(score), flat_[i]);
      if (rank > floor_) tile_.ranks.push_back(rank);
    }
    count_ = 0;
    // Where far too many are found, a bounded number is held.
    if (tile_.ranks.size() < 4 * k_ + kTile / 8) return;
    keep_best(tile_.ranks, k_);
    floor_ = tile_.ranks[k_ - 1];  // the lowest, at the place that nth_element() put it
  }

  const PostprocessLevel& level_;
  Tile& tile_;
  const Scoring scoring_;
  const int classes_;
  const size_t k_;
  const acc cutoff_;
  const scalar_t* logits_;
  Rank<float> floor_ = 0;
  int count_ = 0;
  int found_[kBlock + kStep];
  int flat_[kBlock + kStep];
  double cls_[kBlock + kStep], weight_[kBlock + kStep];
  float score_[kBlock + kStep];
};

// The candidates of one image and level, best first.
struct Selected {
  std::vector<Box> boxes;
  std::vector<float> scores;
  std::vector<int32_t> labels;
  int64_t dropped = 0;
};

void decode(const PostprocessCall& call, const PostprocessLevel& level, int64_t n,
            const Ranks& ranks, Selected& selected) {
  const float height = call.image_sizes.at<float>(2 * n);
  const float width = call.image_sizes.at<float>(2 * n + 1);
  const Maps& ltrb = level.ltrb;
  for (const Rank<float> rank : ranks) {
    const int flat = static_cast<int>(index_of(rank));
    const int classes = static_cast<int>(call.classes);
    const int location = flat / classes, y = location / level.width;
    const int x = location - y * level.width;
    const int64_t at = ltrb.offset(n, y, x);
    Box box = level.grid.decode(y, x, ltrb.numbers.at<float>(at),
                                ltrb.numbers.at<float>(at + ltrb.channel),
                                ltrb.numbers.at<float>(at + 2 * ltrb.channel),
                                ltrb.numbers.at<float>(at + 3 * ltrb.channel));
    if (!is_finite(box)) {
      ++selected.dropped;
      continue;
    }
    if (call.clip) box = clipped(box, height, width);
    if (!call.keep_empty && !has_area(box)) continue;
    selected.boxes.push_back(box);
    selected.scores.push_back(score_of_key(static_cast<OrderKey<float>>(rank >> 32)));
    selected.labels.push_back(flat - location * classes);
  }
}

// Suppression among the candidates of one image, and the results.
class Suppression {
 public:
  FCOS_INLINE void run(const PostprocessCall& call, const Selected& all, int64_t n) {
    const int64_t D = call.max_detections;
    float* boxes = Tensor(call.boxes).mutable_data_ptr<float>() + n * D * 4;
    float* scores = Tensor(call.scores).mutable_data_ptr<float>() + n * D;
    int64_t* labels = Tensor(call.labels).mutable_data_ptr<int64_t>() + n * D;
    const float scale_y = call.scale(call.original_sizes, call.image_sizes, 2 * n);
    const float scale_x = call.scale(call.original_sizes, call.image_sizes, 2 * n + 1);
    order_.deal(all.scores.data(), all.labels.data(), static_cast<int64_t>(all.scores.size()));
    kept_.clear();
    int64_t count = 0;
    order_.visit([&](int64_t i) {
      const Box& b = all.boxes[i];
      const int64_t group = call.class_agnostic ? 0 : all.labels[i];
      if (!kept_.add_unless_suppressed(b, group, call.iou_threshold)) return true;
      boxes[4 * count] = b.x0 * scale_x;
      boxes[4 * count + 1] = b.y0 * scale_y;
      boxes[4 * count + 2] = b.x1 * scale_x;
      boxes[4 * count + 3] = b.y1 * scale_y;
      scores[count] = call.scoring.final_of(all.scores[i]);
      labels[count] = all.labels[i];
      return ++count < D;
    });
    std::fill(boxes + 4 * count, boxes + 4 * D, 0.0f);
    std::fill(scores + count, scores + D, 0.0f);
    std::fill(labels + count, labels + D, int64_t(-1));
    Tensor(call.counts).mutable_data_ptr<int64_t>()[n] = count;
    Tensor(call.dropped).mutable_data_ptr<int64_t>()[n] = all.dropped;
  }

 private:
  RankOrder<float> order_;
  KeptBoxes kept_;
};

struct Cpu {
  static void run(const PostprocessCall& call, const Tensor&) {
    const int64_t L = static_cast<int64_t>(call.levels.size());
    const Cutoff cutoff(call.scoring);
    std::vector<Tile> tiles;
    std::vector<size_t> first_tile;  // of each image and level, and the end
    for (int64_t n = 0; n < call.images; ++n)
      for (int l = 0; l < L; ++l) {
        first_tile.push_back(tiles.size());
        const int pairs = call.levels[l].pairs;
        for (int begin = 0; begin < pairs; begin += kTile)
          tiles.push_back({n, l, begin, std::min(begin + kTile, pairs), {}});
      }
    first_tile.push_back(tiles.size());

    dispatch_floating(call.dtype, "postprocess", [&](auto zero) {
      torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                                  [&](int64_t first, int64_t last) {
                                    with_cpu_isa([&] {
                                      for (int64_t t = first; t < last; ++t) {
                                        Search<decltype(zero)> search(call, cutoff, tiles[t]);
                                        search.run();
                                      }
                                    });
                                  });
    });

    std::vector<Selected> selected(static_cast<size_t>(call.images * L));
    torch::stable::parallel_for(0, call.images * L, 1, [&](int64_t first, int64_t last) {
      for (int64_t map = first; map < last; ++map) {
        Ranks ranks;
        for (size_t t = first_tile[map]; t < first_tile[map + 1]; ++t) {
          ranks.insert(ranks.end(), tiles[t].ranks.begin(), tiles[t].ranks.end());
          selected[map].dropped += tiles[t].dropped;
        }
        const PostprocessLevel& level = call.levels[map % L];
        if (call.scoring.on_final)
          selected[map].dropped += call.classes * count_nan(level, map / L);
        sort_best(ranks, static_cast<size_t>(level.max_candidates));
        decode(call, level, map / L, ranks, selected[map]);
      }
    });

    torch::stable::parallel_for(0, call.images, 1, [&](int64_t first, int64_t last) {
      Suppression suppression;
      for (int64_t n = first; n < last; ++n) {
        Selected all;
        for (int64_t map = n * L; map < (n + 1) * L; ++map) append(selected[map], all);
        with_cpu_isa([&] { suppression.run(call, all, n); });
      }
    });
  }

 private:
  static void append(const Selected& level, Selected& all) {
    all.boxes.insert(all.boxes.end(), level.boxes.begin(), level.boxes.end());
    all.scores.insert(all.scores.end(), level.scores.begin(), level.scores.end());
    all.labels.insert(all.labels.end(), level.labels.begin(), level.labels.end());
    all.dropped += level.dropped;
  }

  // Locations whose centerness is not a number.
  static int64_t count_nan(const PostprocessLevel& level, int64_t n) {
    int64_t count = 0;
    for (int y = 0; y < level.height; ++y)
      for (int x = 0; x < level.width; ++x) {
        const float value = level.centerness.numbers.at<float>(level.centerness.offset(n, y, x));
        count += value != value;
      }
    return count;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess<Cpu>));
}

}  // namespace fcos_ext
