#include "../postprocess.h"

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "../padded_batched_nms.h"
#include "../postprocess_args.h"
#include "kept_boxes.h"
#include "postprocess_search.h"
#include "rank_order.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Candidates of an image.
struct Selected {
  std::vector<Box> boxes;
  std::vector<float> scores;
  std::vector<int32_t> labels;
  std::vector<int64_t> places;  // level and rank in it: of equal scores the lower comes first
  int64_t dropped = 0;
};

// Appends the candidates of a level. They are ranked by location and class where their scores,
// which are what they are ranked by, are equal; those ranked by class score have to be in order.
void decode(const PostprocessCall& call, int l, int64_t n, const Ranks& ranks, Selected& selected) {
  const PostprocessLevel& level = call.levels[l];
  const float height = call.image_sizes.at<float>(2 * n);
  const float width = call.image_sizes.at<float>(2 * n + 1);
  const int classes = static_cast<int>(call.classes);
  int64_t place = 0;
  for (const Rank<float> rank : ranks) {
    const int flat = static_cast<int>(index_of(rank));
    const int location = flat / classes, y = location / level.width;
    const int x = location - y * level.width;
    Box box = level.decode(call.coding, n, y, x);
    ++place;
    if (!is_finite(box)) {
      ++selected.dropped;
      continue;
    }
    if (call.clip) box = call.ends.clipped(box, height, width);
    box = call.ends.compared(box);
    if (!call.keep_empty && !has_area(box)) continue;
    selected.boxes.push_back(box);
    selected.scores.push_back(level.product_of(call.scoring, rank, n, y, x));
    selected.labels.push_back(flat - location * classes);
    selected.places.push_back(int64_t(l) << 32 | (call.scoring.by_class ? place : flat));
  }
}

// Suppression among the candidates of one image, and the results.
class Suppression {
 public:
  FCOS_INLINE void run(const PostprocessCall& call, const Selected& all, int64_t n) {
    const int64_t D = call.max_detections, K = static_cast<int64_t>(all.scores.size());
    float* boxes = Tensor(call.boxes).mutable_data_ptr<float>() + n * D * 4;
    float* scores = Tensor(call.scores).mutable_data_ptr<float>() + n * D;
    int64_t* labels = Tensor(call.labels).mutable_data_ptr<int64_t>() + n * D;
    const float scale_y = call.scale(call.original_sizes, call.image_sizes, 2 * n);
    const float scale_x = call.scale(call.original_sizes, call.image_sizes, 2 * n + 1);
    const bool apart = K <= call.max_apart;
    const float step = apart ? highest(all.boxes) + 1.0f : 0.0f;
    order_.deal(all.scores.data(), all.labels.data(), K);
    kept_.clear();
    int64_t count = 0;
    const auto take = [&](int64_t i) {
      const Box& b = all.boxes[i];
      const int64_t group = call.class_agnostic ? 0 : all.labels[i];
      const Box compared = apart ? moved_apart(b, group, step) : b;
      if (!kept_.add_unless_suppressed(compared, group, call.iou_threshold)) return true;
      const Box result = call.ends.result(b, scale_y, scale_x);
      boxes[4 * count] = result.x0;
      boxes[4 * count + 1] = result.y0;
      boxes[4 * count + 2] = result.x1;
      boxes[4 * count + 3] = result.y1;
      scores[count] = call.scoring.final_of(all.scores[i]);
      labels[count] = all.labels[i];
      return ++count < D;
    };
    order_.visit(take, [&](int64_t i, int64_t j) { return all.places[i] < all.places[j]; });
    std::fill(boxes + 4 * count, boxes + 4 * D, 0.0f);
    std::fill(scores + count, scores + D, 0.0f);
    std::fill(labels + count, labels + D, int64_t(-1));
    Tensor(call.counts).mutable_data_ptr<int64_t>()[n] = count;
    Tensor(call.dropped).mutable_data_ptr<int64_t>()[n] = all.dropped;
  }

 private:
  static float highest(const std::vector<Box>& boxes) {
    float result = -std::numeric_limits<float>::infinity();
    for (const Box& b : boxes)
      result = std::max(result, std::max(std::max(b.x0, b.y0), std::max(b.x1, b.y1)));
    return result;
  }

  RankOrder<float> order_;
  KeptBoxes kept_;
};

struct Cpu {
  static void run(const PostprocessCall& call, const Tensor&) {
    const int64_t L = static_cast<int64_t>(call.levels.size());
    std::vector<Tile> tiles;
    std::vector<size_t> first_tile;  // of each image and level, and the end
    for (int64_t n = 0; n < call.images; ++n)
      for (int l = 0; l < L; ++l) {
        first_tile.push_back(tiles.size());
        const int locations = call.levels[l].locations;
        const int step = locations_of_a_tile(call.levels[l], call.classes);
        for (int begin = 0; begin < locations; begin += step)
          tiles.push_back({n, l, begin, std::min(begin + step, locations), {}});
      }
    first_tile.push_back(tiles.size());
    dispatch_floating(call.dtype, "postprocess",
                      [&](auto zero) { search<decltype(zero)>(call, tiles); });

    torch::stable::parallel_for(0, call.images, 1, [&](int64_t first, int64_t last) {
      Suppression suppression;
      for (int64_t n = first; n < last; ++n) {
        Selected selected;
        for (int l = 0; l < static_cast<int>(L); ++l) {
          const int64_t map = n * L + l;
          Ranks ranks;
          for (size_t t = first_tile[map]; t < first_tile[map + 1]; ++t) {
            ranks.insert(ranks.end(), tiles[t].ranks.begin(), tiles[t].ranks.end());
            selected.dropped += tiles[t].dropped;
          }
          keep_best(ranks, static_cast<size_t>(call.levels[l].max_candidates));
          if (call.scoring.by_class) std::sort(ranks.begin(), ranks.end(), std::greater<>());
          decode(call, l, n, ranks, selected);
        }
        with_cpu_isa([&] { suppression.run(call, selected, n); });
      }
    });
  }

 private:
  template <typename scalar_t>
  static void search(const PostprocessCall& call, std::vector<Tile>& tiles) {
    const Cutoff cutoff(call.scoring);
    const int64_t count = static_cast<int64_t>(tiles.size());
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      with_cpu_isa([&] {
        for (int64_t t = first; t < last; ++t) {
          if (t > first && tiles[t].continues(tiles[t - 1])) {
            tiles[t].ranks.swap(tiles[t - 1].ranks);
            tiles[t].floor = tiles[t - 1].floor;
          }
          Search<scalar_t> search(call, cutoff, tiles[t]);
          search.run();
        }
      });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess<Cpu>));
}

}  // namespace fcos_ext
