#include "../assign_targets.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../assign_targets_args.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Locations of one work item, a rectangle of a level. A fixed size, whatever the number of threads;
// what is kept for each stays in the cache.
constexpr int32_t kTile = 4096;
// Locations that are looked at together for whether any has a box.
constexpr int32_t kStretch = 16;

// Less work than this is not worth another thread; a box counts as so many locations.
constexpr int64_t kLocationsPerThread = 16384, kLocationsPerBox = 16;

struct Tile {
  int32_t level, x0, y0, x1, y1;
};

std::vector<Tile> tiles_of(const std::vector<Level>& levels) {
  std::vector<Tile> tiles;
  for (size_t i = 0; i < levels.size(); ++i) {
    const int32_t height = levels[i].height, width = levels[i].width;
    const int32_t columns = std::min(width, kTile), rows = std::min(height, kTile / columns);
    for (int64_t y = 0; y < height; y += rows)
      for (int64_t x = 0; x < width; x += columns)
        tiles.push_back({static_cast<int32_t>(i), static_cast<int32_t>(x), static_cast<int32_t>(y),
                         static_cast<int32_t>(std::min<int64_t>(x + columns, width)),
                         static_cast<int32_t>(std::min<int64_t>(y + rows, height))});
  }
  return tiles;
}

// The best box of each location of a tile.
struct Best {
  float cost[kTile];   // the limit of `Ties`: none
  int32_t row[kTile];  // among those of the image
  // Rows of locations from here to there, of the tile, have been tested; none at first, and then
  // the arrays are not filled either.
  int32_t first_y, last_y;
};

// Indices from first to before last.
struct Range {
  int32_t first, last;
};

// Indices within [begin, end) outside of which the rules do not hold, along one axis, for a box
// from low to high. Computed in float64, and widened by more than all roundings together: that of a
// location is at most 2^-23 of it and of the first one; a distance is rounded to the other side of
// a bound only where that is the range, by 2^-24.
FCOS_INLINE Range window_of(const Level& level, const Axis& axis, float low, float high,
                            int32_t begin, int32_t end) {
  constexpr double kRelative = 1.0 / (1 << 21), kAbsolute = 1.0 / (1 << 20);
  const double longest = double(level.high) * (1.0 + 1.0 / (1 << 23));
  const double center = center_of(low, high);
  double first = std::max<double>(low, high - longest);
  double last = std::min<double>(high, low + longest);
  if (level.reach < INFINITY) {
    first = std::max(first, center - level.reach);
    last = std::min(last, center + level.reach);
  }
  const double scale = 1.0 / axis.step, origin = axis.first;
  const double margin = kRelative * std::fabs(origin);
  first -= kRelative * std::fabs(first) + margin;
  last += kRelative * std::fabs(last) + margin;
  first = (first - origin) * scale - kAbsolute;
  last = (last - origin) * scale + kAbsolute;
  // One more than the last that counts, and within the range before it becomes an integer.
  first = std::min(std::max(std::ceil(first), double(begin)), double(end));
  last = std::min(std::max(std::floor(last) + 1.0, double(begin)), double(end));
  return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

// Tests the box `row` against all locations of its window.
FCOS_INLINE void scatter_box(const Level& level, const Ties& ties, const Tile& tile, const Box& box,
                             int32_t row, Best& best) {
  if (!may_be_in_range(level, box)) return;
  if (!may_hold(level, location_of(level.y, tile.y0), location_of(level.y, tile.y1 - 1), box.y0,
                box.y1))
    return;
  const Range ys = window_of(level, level.y, box.y0, box.y1, tile.y0, tile.y1);
  if (ys.first >= ys.last) return;
  const Range xs = window_of(level, level.x, box.x0, box.x1, tile.x0, tile.x1);
  if (best.first_y >= best.last_y)
    std::fill_n(best.cost, (tile.x1 - tile.x0) * (tile.y1 - tile.y0), ties.limit);
  best.first_y = std::min(best.first_y, ys.first);
  best.last_y = std::max(best.last_y, ys.last);
  const float cost = cost_of(ties, box);
  const float center_x = center_of(box.x0, box.x1), center_y = center_of(box.y0, box.y1);
  for (int32_t y = ys.first; y < ys.last; ++y) {
    const float py = location_of(level.y, y);
    if (!is_inside(level, py, box.y0, box.y1, center_y)) continue;
    const float longest_y = longest_side(py, box.y0, box.y1);
    const int32_t offset = (y - tile.y0) * (tile.x1 - tile.x0) - tile.x0;
    float* costs = best.cost + offset;
    int32_t* rows = best.row + offset;
#pragma omp simd
    for (int32_t x = xs.first; x < xs.last; ++x) {
      const float px = location_of(level.x, x);
      const bool wins = is_inside(level, px, box.x0, box.x1, center_x) &
                        is_in_range(level, longest_side(px, box.x0, box.x1), longest_y) &
                        (cost < costs[x]);
      costs[x] = wins ? cost : costs[x];
      rows[x] = wins ? row : rows[x];
    }
  }
}

struct Batch {
  Boxes boxes;
  TargetPointers out;
  Ties ties;
  bool normalize;
  int64_t num_locations;
};

// The results of location x, y of an image, which has a box.
FCOS_INLINE void store(const Batch& batch, const Level& level, int32_t x, int32_t y, int64_t row,
                       int64_t at) {
  const Box box = batch.boxes[row];
  const float px = location_of(level.x, x), py = location_of(level.y, y);
  const float l = px - box.x0, t = py - box.y0, r = box.x1 - px, b = box.y1 - py;
  const float unit = batch.normalize ? level.unit : 1.0f;
  batch.out.labels[at] = batch.boxes.labels[row];
  batch.out.matched[at] = row;
  batch.out.centerness[at] = centerness_of(l, t, r, b);
  float* ltrb = batch.out.ltrb + at * 4;
  ltrb[0] = l / unit;
  ltrb[1] = t / unit;
  ltrb[2] = r / unit;
  ltrb[3] = b / unit;
}

// Background for n locations.
inline void store_background(const TargetPointers& out, int64_t at, int64_t n) {
  std::memset(out.labels + at, 0xff, n * sizeof(int64_t));  // -1
  std::memset(out.matched + at, 0xff, n * sizeof(int64_t));
  std::memset(out.centerness + at, 0, n * sizeof(float));
  std::memset(out.ltrb + at * 4, 0, n * 4 * sizeof(float));
}

// The results of the locations of row y that have a box. Returns how many they are.
FCOS_INLINE int64_t store_row(const Batch& batch, const Level& level, const Tile& tile, int32_t y,
                              int64_t first_box, int64_t at, const Best& best) {
  const int32_t width = tile.x1 - tile.x0, offset = (y - tile.y0) * width;
  int64_t positives = 0;
  for (int32_t x = 0; x < width; x += kStretch) {
    const int32_t end = std::min(x + kStretch, width);
    int32_t found = 0;
    for (int32_t k = x; k < end; ++k) found += best.cost[offset + k] < batch.ties.limit;
    if (found == 0) continue;
    positives += found;
    for (int32_t k = x; k < end; ++k)
      if (best.cost[offset + k] < batch.ties.limit)
        store(batch, level, tile.x0 + k, y, first_box + best.row[offset + k], at + k);
  }
  return positives;
}

FCOS_INLINE void assign_tile(const Batch& batch, const Level& level, const Tile& tile,
                             int64_t image, Best& best) {
  const int32_t width = tile.x1 - tile.x0, height = tile.y1 - tile.y0;
  const Rows rows = batch.boxes.rows_of(image);
  best.first_y = tile.y1;
  best.last_y = tile.y0;
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const Box box = batch.boxes[row];
    if (is_proper(box))
      scatter_box(level, batch.ties, tile, box, static_cast<int32_t>(row - rows.first), best);
  }
  const int64_t start = image * batch.num_locations + level.start + tile.x0;
  const auto row_at = [&](int32_t y) { return start + int64_t(y) * level.width; };
  if (width == level.width)
    store_background(batch.out, row_at(tile.y0), int64_t(width) * height);
  else
    for (int32_t y = tile.y0; y < tile.y1; ++y) store_background(batch.out, row_at(y), width);
  int64_t positives = 0;
  for (int32_t y = best.first_y; y < best.last_y; ++y)
    positives += store_row(batch, level, tile, y, rows.first, row_at(y), best);
  // Integers add up to the same in any order.
  if (positives)
    std::atomic_ref<int64_t>(batch.out.num_pos[image])
        .fetch_add(positives, std::memory_order_relaxed);
}

void assign_images(const Batch& batch, const std::vector<Level>& levels, int64_t N) {
  if (N == 0) return;
  std::fill_n(batch.out.num_pos, N, int64_t(0));
  const std::vector<Tile> tiles = tiles_of(levels);
  const int64_t per_image = tiles.size();
  const int64_t of_item =
      batch.num_locations / per_image + kLocationsPerBox * (batch.boxes.num_rows / N);
  const int64_t grain = std::max<int64_t>(1, kLocationsPerThread / of_item);
  torch::stable::parallel_for(0, N * per_image, grain, [&](int64_t begin, int64_t end) {
    with_cpu_isa([&] {
      Best best;
      for (int64_t item = begin; item < end; ++item) {
        const Tile& tile = tiles[item % per_image];
        assign_tile(batch, levels[tile.level], tile, item / per_image, best);
      }
    });
  });
}

// What the caller can see at once on the CPU, and what a GPU quietly clamps.
void check_extents(const Boxes& boxes, int64_t N) {
  constexpr const char* kOp = "assign_targets";
  const Integers& extents = boxes.extents;
  if (boxes.per_image >= 0) {
    for (int64_t i = 0; i < N; ++i)
      STD_TORCH_CHECK(extents[i] >= 0 && extents[i] <= boxes.per_image, kOp,
                      ": counts must lie in 0..M with M = ", boxes.per_image, ", got ", extents[i],
                      " at image ", i);
    return;
  }
  STD_TORCH_CHECK(extents[0] == 0 && extents[N] == boxes.num_rows, kOp,
                  ": offsets must start at 0 and end at the number of boxes, ", boxes.num_rows,
                  ", got ", extents[0], " and ", extents[N]);
  for (int64_t i = 0; i < N; ++i)
    STD_TORCH_CHECK(extents[i] <= extents[i + 1], kOp, ": offsets must not decrease, got ",
                    extents[i], " then ", extents[i + 1], " at image ", i);
}

Targets assign_targets_cpu(const Tensor& boxes, const Tensor& labels, const Tensor& extents,
                           const std::vector<int64_t>& feature_sizes,
                           const std::vector<double>& grids, const std::vector<double>& size_ranges,
                           int64_t boundary, bool normalize, int64_t ties, bool pixels) {
  check_assign_targets(boxes, labels, extents);
  const std::vector<Level> levels = levels_of(feature_sizes, grids, size_ranges, boundary);
  const GroundTruth truth(boxes, labels, extents);
  const int64_t N = truth.num_images(), L = num_locations(levels);
  check_extents(truth.rows(), N);
  Targets targets = new_targets(boxes, N, L);
  assign_images({truth.rows(), TargetPointers(targets), ties_of(ties, pixels), normalize, L},
                levels, N);
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cpu));
}

}  // namespace fcos_ext
