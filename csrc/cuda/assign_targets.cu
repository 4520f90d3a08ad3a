#include <algorithm>

#include "../assign_targets.h"
#include "../assign_targets_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"

namespace fcos_ext {
namespace {

// A block takes a rectangle of a level, a warp a row of it: what it writes is one stretch.
constexpr int kColumns = 32, kRows = 8;
constexpr int kThreads = kColumns * kRows;
constexpr int kWarps = kThreads / 32;

struct Levels {
  Level level[kMaxLevels];
  int64_t first_tile[kMaxLevels];  // of an image
  int32_t tiles_across[kMaxLevels];
  int32_t count;
  int64_t num_tiles, num_locations;  // of an image
};

// What is left of a chunk of boxes, in their order.
struct Survivors {
  Box box[kThreads];
  float cost[kThreads];
  int32_t row[kThreads];  // among those of the image
};

// The number of `keep` in threads before this one, and in the whole block. Every thread must call;
// the counts of warps are free again after the next barrier.
__device__ __forceinline__ int count_before(bool keep, int (&of_warp)[kWarps], int& total) {
  const unsigned ballot = __ballot_sync(0xffffffffu, keep);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) of_warp[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warp[w];
    total += of_warp[w];
  }
  return before;
}

// One block for each tile of each image, or several in turn. It sorts out, together, the boxes that
// no location of the tile can have, and then each thread tests those that are left at its location.
__global__ void __launch_bounds__(kThreads)
    assign_targets_kernel(const __grid_constant__ Levels levels, const Boxes boxes,
                          const TargetPointers out, int64_t num_items, const Ties ties,
                          bool normalize) {
  __shared__ Survivors survivors;
  __shared__ int of_warp[kWarps];
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t image = item / levels.num_tiles;
    int64_t tile = item - image * levels.num_tiles;
    int number = 0;
    while (number + 1 < levels.count && tile >= levels.first_tile[number + 1]) ++number;
    const Level level = levels.level[number];
    tile -= levels.first_tile[number];
    const int64_t tile_y = tile / levels.tiles_across[number];
    const int x0 = static_cast<int>(tile - tile_y * levels.tiles_across[number]) * kColumns;
    const int y0 = static_cast<int>(tile_y) * kRows;
    const int x = x0 + threadIdx.x % kColumns, y = y0 + threadIdx.x / kColumns;
    const float px = location_of(level.x, x), py = location_of(level.y, y);
    const float last_px = location_of(level.x, min(x0 + kColumns, level.width) - 1);
    const float last_py = location_of(level.y, min(y0 + kRows, level.height) - 1);
    const float first_px = location_of(level.x, x0), first_py = location_of(level.y, y0);

    const Rows rows = boxes.rows_of(image);
    const int num_rows = static_cast<int>(rows.last - rows.first);
    float best_cost = ties.limit;
    int best_row = -1;
    for (int chunk = 0; chunk < num_rows; chunk += kThreads) {
      const int row = chunk + static_cast<int>(threadIdx.x);
      Box box = {};
      bool keep = false;
      if (row < num_rows) {
        box = boxes[rows.first + row];
        keep = is_proper(box) && may_be_in_range(level, box) &&
               may_hold(level, first_px, last_px, box.x0, box.x1) &&
               may_hold(level, first_py, last_py, box.y0, box.y1);
      }
      int count;
      const int place = count_before(keep, of_warp, count);
      if (keep) {
        survivors.box[place] = box;
        survivors.cost[place] = cost_of(ties, box);
        survivors.row[place] = row;
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const Box b = survivors.box[i];
        const float cost = survivors.cost[i];
        if (cost < best_cost && is_inside(level, px, b.x0, b.x1, center_of(b.x0, b.x1)) &&
            is_inside(level, py, b.y0, b.y1, center_of(b.y0, b.y1)) &&
            is_in_range(level, longest_side(px, b.x0, b.x1), longest_side(py, b.y0, b.y1))) {
          best_cost = cost;
          best_row = survivors.row[i];
        }
      }
      __syncthreads();  // the survivors, and the counts of warps, may be written again
    }

    const bool exists = x < level.width && y < level.height;
    const int positives = __syncthreads_count(exists && best_row >= 0);
    // Integers add up to the same in any order.
    if (threadIdx.x == 0 && positives > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(out.num_pos + image),
                static_cast<unsigned long long>(positives));
    if (!exists) continue;
    int64_t matched = -1, label = -1;
    float4 ltrb = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float centerness = 0.0f;
    if (best_row >= 0) {
      matched = rows.first + best_row;
      label = boxes.labels[matched];
      const Box b = boxes[matched];
      ltrb = make_float4(px - b.x0, py - b.y0, b.x1 - px, b.y1 - py);
      centerness = centerness_of(ltrb.x, ltrb.y, ltrb.z, ltrb.w);
      if (normalize) {
        ltrb.x /= level.unit;
        ltrb.y /= level.unit;
        ltrb.z /= level.unit;
        ltrb.w /= level.unit;
      }
    }
    const int64_t at = image * levels.num_locations + level.start + int64_t(y) * level.width + x;
    out.labels[at] = label;
    out.matched[at] = matched;
    out.centerness[at] = centerness;
    reinterpret_cast<float4*>(out.ltrb)[at] = ltrb;
  }
}

const ListKernel kListed("assign_targets", &assign_targets_kernel, kThreads);

Levels cut_into_tiles(const std::vector<Level>& from) {
  Levels levels{};
  for (const Level& level : from) {
    const int32_t i = levels.count++;
    levels.level[i] = level;
    levels.first_tile[i] = levels.num_tiles;
    levels.tiles_across[i] = (level.width - 1) / kColumns + 1;
    levels.num_tiles += int64_t(levels.tiles_across[i]) * ((level.height - 1) / kRows + 1);
  }
  levels.num_locations = num_locations(from);
  return levels;
}

Targets assign_targets_cuda(const Tensor& boxes, const Tensor& labels, const Tensor& extents,
                            const std::vector<int64_t>& feature_sizes,
                            const std::vector<double>& grids,
                            const std::vector<double>& size_ranges, int64_t boundary,
                            bool normalize, int64_t ties, bool pixels) {
  check_assign_targets(boxes, labels, extents);
  const Levels levels = cut_into_tiles(levels_of(feature_sizes, grids, size_ranges, boundary));
  const Ties rule = ties_of(ties, pixels);
  const GroundTruth truth(boxes, labels, extents);
  const int64_t N = truth.num_images(), num_items = N * levels.num_tiles;
  Targets targets = new_targets(boxes, N, levels.num_locations);
  if (N == 0) return targets;
  const TargetPointers out(targets);
  clear(out.num_pos, N * sizeof(int64_t), boxes);
  launch(&assign_targets_kernel, grid_for(num_items), dim3(kThreads), 0, boxes, levels,
         truth.rows(), out, num_items, rule, normalize);
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace fcos_ext
