#include "../box_and_centerness_loss.h"
#include "../box_and_centerness_loss_ops.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "reduction.cuh"
#include "row_access.cuh"

namespace fcos_ext {
namespace {

struct DeviceLevel {
  LevelRows<const void*> pred, centerness;
  LevelRows<void*> by_pred, by_centerness;
  int64_t rows;       // of all images
  int64_t first_row;  // in the rows of an image
  unsigned first_tile;
  FastDivision positions;  // of an image
};

template <typename acc>
struct Args {
  DeviceLevel levels[kMaxFeatureLevels];
  int num_levels;
  unsigned tiles;
  int64_t rows_per_image;
  ConstRows target, centerness_target;  // the last one's data may be null
  Integers labels;
  int64_t num_classes;
  const acc* normalizers;  // may be null
  bool weighted, iou_quality;
  acc smooth, eps;
  // Gradients are written, of sums whose own are these; null: 1.
  bool writes;
  const acc *grad_box, *grad_centerness;
  bool only_if_not_one;  // what is right for 1 is there already
  // Sums are computed, unless null.
  acc* partials;  // [5, tiles]: of the results that follow
  unsigned* ticket;
  acc *box, *centerness, *weight;
  int64_t *num_pos, *num_ignored;
};

template <typename acc>
__device__ __forceinline__ acc centerness_divisor(const Args<acc>& a) {
  return a.normalizers && a.normalizers[0] > acc(1) ? a.normalizers[0] : acc(1);
}

template <typename acc>
__device__ __forceinline__ acc box_divisor(const Args<acc>& a) {
  if (!a.weighted || !a.normalizers) return centerness_divisor(a);
  return a.normalizers[1] > acc(kNormalizerFloor) ? a.normalizers[1] : acc(kNormalizerFloor);
}

__device__ __forceinline__ Place place_of(const DeviceLevel& level, int64_t row) {
  const unsigned image = level.positions.quotient(static_cast<unsigned>(row));
  return {int64_t(image), row - int64_t(image) * level.positions.divisor};
}

// Index of a place in labels and targets.
template <typename acc>
__device__ __forceinline__ int64_t index_of(const Args<acc>& a, const DeviceLevel& level, Place p) {
  return p.image * a.rows_per_image + level.first_row + p.position;
}

template <typename acc>
struct Sums {
  acc box = 0, centerness = 0, weight = 0;
};

// Works on a location that counts.
template <IoUKind kKind, typename acc>
__device__ __forceinline__ void positive(const Args<acc>& a, const DeviceLevel& level, Place place,
                                         Sums<acc>& sums, Ltrb<acc>& by_pred, acc& by_centerness) {
  const int64_t index = index_of(a, level, place);
  const Ltrb<acc> target = load_ltrb<acc>(a.target, index);
  const Ltrb<acc> pred = load_ltrb<acc>(level.pred, place);
  const acc c = a.centerness_target.data ? load_value<acc>(a.centerness_target, index)
                                         : centerness_of(target.l, target.t, target.r, target.b);
  const acc quality = a.iou_quality ? overlap_of(pred, target, a.smooth, a.eps) : c;
  const acc weight = a.weighted ? c : acc(1);
  const BoxLoss<acc> box = box_loss<kKind>(pred, target, a.smooth, a.eps);
  const CrossEntropy<acc> entropy =
      cross_entropy(load_value<acc>(level.centerness, place), quality);
  sums.box += weight * box.loss;
  sums.centerness += entropy.loss;
  sums.weight += weight;
  if (!a.writes) return;
  // Factors are made late, and for each row again: held in registers they would be spilled.
  const acc factor = weight * (a.grad_box ? *a.grad_box : acc(1)) / box_divisor(a);
  by_pred = {box.gradient.l * factor, box.gradient.t * factor, box.gradient.r * factor,
             box.gradient.b * factor};
  by_centerness = entropy.derivative * (a.grad_centerness ? *a.grad_centerness : acc(1)) /
                  centerness_divisor(a);
}

// The labels of a thread's rows of a tile: as bits, which of them count, and in the upper half how
// many are ignored.
template <typename acc>
__device__ __forceinline__ unsigned look_at_labels(const Args<acc>& a, const DeviceLevel& level,
                                                   int64_t first) {
  unsigned counting = 0, ignored = 0;
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = first + k * kRowThreads;
    if (row >= level.rows) break;
    const int64_t label = a.labels[index_of(a, level, place_of(level, row))];
    const auto limit = static_cast<uint64_t>(a.num_classes);
    if (static_cast<uint64_t>(label) < limit) counting |= 1u << k;
    // one comparison for -1 <= label < num_classes
    ignored += static_cast<uint64_t>(label) + 1 > limit;
  }
  return counting | ignored << 16;
}

template <IoUKind kKind, typename acc>
__global__ void __launch_bounds__(kRowThreads, sizeof(acc) == 8 ? 1 : kMinBlocks)
    box_and_centerness_loss_kernel(const __grid_constant__ Args<acc> a) {
  if (a.only_if_not_one && *a.grad_box == acc(1) && *a.grad_centerness == acc(1)) return;
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    int l = 0;
    while (l + 1 < a.num_levels && tile >= a.levels[l + 1].first_tile) ++l;
    const DeviceLevel& level = a.levels[l];
    const int64_t first = int64_t(tile - level.first_tile) * kRowTile + threadIdx.x;
    const unsigned looked = look_at_labels(a, level, first);
    Sums<acc> sums;
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t row = first + k * kRowThreads;
      if (row >= level.rows) break;
      const bool counts = looked >> k & 1u;
      if (!counts && !a.writes) continue;
      const Place place = place_of(level, row);
      Ltrb<acc> by_pred{0, 0, 0, 0};
      acc by_centerness = 0;
      if (counts) positive<kKind>(a, level, place, sums, by_pred, by_centerness);
      if (!a.writes) continue;
      store_ltrb(level.by_pred, place, by_pred);
      store_value(level.by_centerness, place, by_centerness);
    }
    if (!a.partials) continue;
    const acc box = block_sum<kRowThreads>(sums.box);
    const acc centerness = block_sum<kRowThreads>(sums.centerness);
    const acc weight = block_sum<kRowThreads>(sums.weight);
    // both counts at once: neither reaches 2^16 in a tile
    const unsigned counts = block_sum<kRowThreads>(static_cast<unsigned>(__popc(looked & 0xffffu)) |
                                                   (looked >> 16 << 16));
    if (threadIdx.x != 0) continue;
    acc* partial = a.partials + tile;
    partial[0] = box;
    partial[1 * int64_t(a.tiles)] = centerness;
    partial[2 * int64_t(a.tiles)] = weight;
    partial[3 * int64_t(a.tiles)] = static_cast<acc>(counts & 0xffffu);
    partial[4 * int64_t(a.tiles)] = static_cast<acc>(counts >> 16);
  }
  if (!a.partials || !is_last_block(a.ticket)) return;
  const int64_t tiles = a.tiles;
  const double box = sum_partials<kRowThreads>(a.partials, tiles);
  const double centerness = sum_partials<kRowThreads>(a.partials + tiles, tiles);
  const double weight = sum_partials<kRowThreads>(a.partials + 2 * tiles, tiles);
  const double num_pos = sum_partials<kRowThreads>(a.partials + 3 * tiles, tiles);
  const double num_ignored = sum_partials<kRowThreads>(a.partials + 4 * tiles, tiles);
  if (threadIdx.x != 0) return;
  *a.box = static_cast<acc>(box / box_divisor(a));
  *a.centerness = static_cast<acc>(centerness / centerness_divisor(a));
  *a.weight = static_cast<acc>(weight);
  *a.num_pos = static_cast<int64_t>(num_pos);  // exact: whole numbers, in double
  *a.num_ignored = static_cast<int64_t>(num_ignored);
}

const ListKernel kListed[] = {
    {"box_and_centerness_loss", &box_and_centerness_loss_kernel<IoUKind::kGIoU, float>,
     kRowThreads},
};

template <typename acc>
const acc* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<acc>() : nullptr;
}

struct Cuda {
  static void run(const BoxCall& call) {
    if (call.rows() == 0) {
      if (!call.sums) return;
      for (const Tensor& sum :
           {call.box, call.centerness, call.weight, call.num_pos, call.num_ignored})
        clear(sum.mutable_data_ptr(), sum.element_size(), sum);
      return;
    }
    dispatch_acc(call.pred, [&](auto zero) { run_in<decltype(zero)>(call); });
  }

  template <typename acc>
  static void run_in(const BoxCall& call) {
    Args<acc> a{};
    int64_t tiles = 0;
    for (const BoxLevel& level : call.levels) {
      const int64_t rows = call.images * level.positions;
      if (rows == 0) continue;
      // Divisions within a level are of 32 bits.
      STD_TORCH_CHECK(rows < (int64_t(1) << 31),
                      "box_and_centerness_loss: at most 2^31 - 1 locations in a level, got ", rows);
      a.levels[a.num_levels++] = {level.pred,
                                  level.centerness,
                                  level.by_pred,
                                  level.by_centerness,
                                  rows,
                                  level.first_row,
                                  static_cast<unsigned>(tiles),
                                  FastDivision(static_cast<uint32_t>(level.positions))};
      tiles += num_row_tiles(rows);
    }
    a.tiles = static_cast<unsigned>(tiles);
    a.rows_per_image = call.rows_per_image;
    a.target = call.target;
    a.centerness_target = call.centerness_target;
    a.labels = integers_of(call.labels);
    a.num_classes = call.num_classes;
    a.normalizers = pointer_or_null<acc>(call.normalizers);
    a.weighted = call.weighted;
    a.iou_quality = call.iou_quality;
    a.smooth = static_cast<acc>(call.smooth);
    a.eps = static_cast<acc>(call.eps);
    a.writes = call.writes;
    a.grad_box = pointer_or_null<acc>(call.grad_box);
    a.grad_centerness = pointer_or_null<acc>(call.grad_centerness);
    a.only_if_not_one = call.only_if_not_one;
    Tensor partials, ticket;
    if (call.sums) {
      partials = torch::stable::new_empty(call.pred, {5 * tiles}, acc_dtype(call.pred));
      ticket = new_ticket(call.pred);
      a.partials = partials.mutable_data_ptr<acc>();
      a.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
      a.box = Tensor(call.box).mutable_data_ptr<acc>();
      a.centerness = Tensor(call.centerness).mutable_data_ptr<acc>();
      a.weight = Tensor(call.weight).mutable_data_ptr<acc>();
      a.num_pos = Tensor(call.num_pos).mutable_data_ptr<int64_t>();
      a.num_ignored = Tensor(call.num_ignored).mutable_data_ptr<int64_t>();
    }
    dispatch_kind(call.kind, [&](auto k) {
      launch(&box_and_centerness_loss_kernel<k.value, acc>, grid_for(tiles), dim3(kRowThreads), 0,
             call.pred, a);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) { FCOS_IMPLEMENT_BOX_OPS(m, Cuda); }

}  // namespace fcos_ext
