#include "../box_and_centerness_loss.h"

#include <vector>

#include "../box_and_centerness_loss_ops.h"
#include "row_blocks.h"

namespace fcos_ext {
namespace {

// Tiles that are worth a thread: 10 to 20 us.
constexpr int64_t kGrain = 4;

// The rows of a level in one image, which are numbered as the labels are.
template <typename Pointer>
struct ImageRows {
  Pointer data;
  ScalarType dtype;
  int64_t start, per_row, stride;

  ImageRows(const LevelRows<Pointer>& level, int64_t image, int64_t first_row)
      : data(level.data),
        dtype(level.dtype),
        start(image * level.per_image - first_row * level.per_position),
        per_row(level.per_position),
        stride(level.stride) {}
  FCOS_INLINE int64_t offset(int64_t row) const { return start + row * per_row; }
};

struct Sums {
  double box = 0, centerness = 0, weight = 0;
  int64_t count = 0, ignored = 0;

  void operator+=(const Sums& other) {
    box += other.box;
    centerness += other.centerness;
    weight += other.weight;
    count += other.count;
    ignored += other.ignored;
  }
};

// A run of rows of one level and image.
struct Run {
  const BoxLevel& level;
  int64_t image;
  int64_t level_row;   // first row of the level in this image, and the range of the run,
  int64_t begin, end;  // as the labels are numbered
};

template <typename acc>
struct Columns {
  LtrbColumns<acc> pred, target;
  // What the scores learn, and the weights of the boxes.
  Column<acc> centerness, quality, weight;
};

// Sets the rows of a run, of so many values, to 0: side by side, in planes, or one by one.
inline void clear_rows(const LevelRows<void*>& level, const Run& run, int64_t values) {
  const ImageRows rows(level, run.image, run.level_row);
  with_dtype(level.dtype, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(rows.data) + rows.offset(run.begin);
    const int64_t n = run.end - run.begin;
    if (rows.per_row == values && rows.stride == 1) {
      std::fill_n(data, n * values, zero);
    } else {
      for (int64_t k = 0; k < values; ++k)
        if (rows.per_row == 1)
          std::fill_n(data + k * rows.stride, n, zero);
        else
          for (int64_t i = 0; i < n; ++i) data[k * rows.stride + i * rows.per_row] = zero;
    }
  });
}

template <typename acc>
struct Worker {
  const BoxCall& call;
  Integers labels;
  acc smooth, eps;
  acc scale_box, scale_centerness;  // of gradients

  FCOS_INLINE Sums run(const Run& run) const {
    Sums sums;
    if (call.writes && !call.only_if_not_one) {  // what is there already has its zeros
      clear_rows(run.level.by_pred, run, 4);
      clear_rows(run.level.by_centerness, run, 1);
    }
    const ImageRows pred(run.level.pred, run.image, run.level_row);
    const ImageRows centerness(run.level.centerness, run.image, run.level_row);
    Columns<acc> c;
    sums.ignored = for_each_row_block(labels, call.num_classes, run.begin, run.end,
                                      [&](const int64_t* rows, int n) {
                                        gather(pred, rows, n, c.pred);
                                        gather(call.target, rows, n, c.target);
                                        gather(centerness, rows, n, c.centerness);
                                        weigh(c, rows, n);
                                        if (call.sums) add(c, n, sums);
                                        if (call.writes) write(c, rows, n, run);
                                      });
    return sums;
  }

 private:
  FCOS_INLINE void weigh(Columns<acc>& c, const int64_t* rows, int n) const {
    if (call.centerness_target.data)
      gather(call.centerness_target, rows, n, c.weight);
    else
      for (int i = 0; i < n; ++i)
        c.weight[i] = centerness_of(c.target[i].l, c.target[i].t, c.target[i].r, c.target[i].b);
    if (call.iou_quality)
      for (int i = 0; i < n; ++i) c.quality[i] = overlap_of(c.pred[i], c.target[i], smooth, eps);
    else
      std::copy_n(c.weight.values, n, c.quality.values);
    if (!call.weighted) std::fill_n(c.weight.values, n, acc(1));
  }

  FCOS_INLINE void add(const Columns<acc>& c, int n, Sums& sums) const {
    double centerness = 0, weight = 0;
#pragma omp simd reduction(+ : centerness, weight)
    for (int i = 0; i < n; ++i) {
      centerness += cross_entropy(c.centerness[i], c.quality[i]).loss;
      weight += c.weight[i];
    }
    sums.centerness += centerness;
    sums.weight += weight;
    sums.count += n;
    dispatch_kind(call.kind, [&](auto k) {
      double box = 0;
#pragma omp simd reduction(+ : box)
      for (int i = 0; i < n; ++i)
        box += box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).loss * c.weight[i];
      sums.box += box;
    });
  }

  FCOS_INLINE void write(const Columns<acc>& c, const int64_t* rows, int n, const Run& run) const {
    LtrbColumns<acc> by_pred;
    Column<acc> by_centerness;
    for (int i = 0; i < n; ++i)
      by_centerness[i] = scale_centerness * cross_entropy(c.centerness[i], c.quality[i]).derivative;
    scatter(by_centerness, rows, n, ImageRows(run.level.by_centerness, run.image, run.level_row));
    dispatch_kind(call.kind, [&](auto k) {
      for (int i = 0; i < n; ++i) {
        const acc factor = scale_box * c.weight[i];
        const Ltrb<acc> g = box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).gradient;
        by_pred.set(i, {g.l * factor, g.t * factor, g.r * factor, g.b * factor});
      }
    });
    scatter(by_pred, rows, n, ImageRows(run.level.by_pred, run.image, run.level_row));
  }
};

// The sums of a tile, rows [first, last) of a level counted through its images.
template <typename acc>
FCOS_INLINE Sums run_tile(const Worker<acc>& worker, const BoxLevel& level, int64_t first,
                          int64_t last) {
  Sums sums;
  while (first < last) {  // image by image
    const int64_t image = first / level.positions, position = first % level.positions;
    const int64_t n = std::min(last - first, level.positions - position);
    const int64_t level_row = image * worker.call.rows_per_image + level.first_row;
    const int64_t begin = level_row + position;
    sums += worker.run({level, image, level_row, begin, begin + n});
    first += n;
  }
  return sums;
}

template <typename acc>
Sums run_all(const Worker<acc>& worker) {
  struct Tile {
    const BoxLevel* level;
    int64_t first, last;
  };
  std::vector<Tile> tiles;
  for (const BoxLevel& level : worker.call.levels) {
    const int64_t rows = worker.call.images * level.positions;
    for (int64_t first = 0; first < rows; first += kRowTile)
      tiles.push_back({&level, first, std::min(rows, first + kRowTile)});
  }
  const auto count = static_cast<int64_t>(tiles.size());
  std::vector<Sums> partials(tiles.size());
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t from, int64_t to) {
    with_cpu_isa([&] {
      for (int64_t i = from; i < to; ++i)
        partials[i] = run_tile(worker, *tiles[i].level, tiles[i].first, tiles[i].last);
    });
  });
  Sums total;
  for (const Sums& partial : partials) total += partial;
  return total;
}

struct Cpu {
  static void run(const BoxCall& call) {
    dispatch_acc(call.pred, [&](auto zero) { run_in<decltype(zero)>(call); });
  }

  template <typename acc>
  static void run_in(const BoxCall& call) {
    const auto value = [](const std::optional<Tensor>& scalar) {
      return scalar ? double(*scalar->const_data_ptr<acc>()) : 1.0;
    };
    const double grad_box = value(call.grad_box), grad_centerness = value(call.grad_centerness);
    if (call.only_if_not_one && grad_box == 1 && grad_centerness == 1) return;
    double box_divisor = 1, centerness_divisor = 1;
    if (call.normalizers) {
      const acc* sums = call.normalizers->const_data_ptr<acc>();
      centerness_divisor = std::max(1.0, double(sums[0]));
      box_divisor = call.weighted ? std::max(double(acc(kNormalizerFloor)), double(sums[1]))
                                  : centerness_divisor;
    }
    const Worker<acc> worker{
        call,          integers_of(call.labels),    acc(call.smooth),
        acc(call.eps), acc(grad_box / box_divisor), acc(grad_centerness / centerness_divisor)};
    const Sums sums = run_all(worker);
    if (!call.sums) return;
    const auto set = [](Tensor t, auto result) {
      *t.mutable_data_ptr<decltype(result)>() = result;
    };
    set(call.box, acc(sums.box / box_divisor));
    set(call.centerness, acc(sums.centerness / centerness_divisor));
    set(call.weight, acc(sums.weight));
    set(call.num_pos, sums.count);
    set(call.num_ignored, sums.ignored);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) { FCOS_IMPLEMENT_BOX_OPS(m, Cpu); }

}  // namespace fcos_ext
