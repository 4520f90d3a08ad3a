// Fused multiply-adds are welcome here. Before any header, or what they define stays without.
#pragma GCC optimize("fp-contract=fast")

#include "../sigmoid_focal_loss.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "../sigmoid_focal_loss_ops.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Logits of one work item with classes innermost, and with positions innermost. Fixed sizes,
// whatever the number of threads, make the sum the same to the bit on any of them.
constexpr int64_t kRowTile = 16384;
constexpr int64_t kPlaneTile = 65536;
// Locations of a work item at most: their labels are gathered first.
constexpr int64_t kLocations = 4096;
// Logits that are computed at a time, in a buffer that stays in the L1 cache.
constexpr int64_t kBlock = 1024;
// Loops run over multiples of this, so that no vector is left in part.
constexpr int64_t kPadding = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
double value_of(const std::optional<Tensor>& scalar, double otherwise) {
  return scalar ? double(*static_cast<const acc_t<scalar_t>*>(scalar->const_data_ptr()))
                : otherwise;
}

// One level of a call. Its tiles are
//   classes innermost:   rows_per_tile whole locations, seen as one run of memory
//   positions innermost: kLocations of an image (or all) by planes_per_tile classes
template <Work kWork, typename scalar_t, typename Gamma>
struct LevelWorker {
  using acc = acc_t<scalar_t>;

  const scalar_t* logits = nullptr;
  const scalar_t* grads = nullptr;  // kEachGradient
  scalar_t* out = nullptr;
  int64_t images, positions, C, labels_per_image, first_label;
  Integers labels;
  const acc* quality = nullptr;
  acc positive_weight, negative_weight, scale;
  Gamma gamma;
  bool planes;
  int64_t rows_per_tile = 0, planes_per_tile = 0, stretches = 0, chunks = 0;
  int64_t first_tile = 0, tiles = 0;

  LevelWorker(const FocalCall& call, const FocalLevel& level, double scale, Gamma gamma)
      : logits(level.logits.template const_data_ptr<scalar_t>()),
        images(call.images),
        positions(level.positions),
        C(call.classes),
        labels_per_image(call.labels_per_image),
        first_label(level.first_label),
        labels(integers_of(call.labels)),
        positive_weight(static_cast<acc>(call.positive_weight)),
        negative_weight(static_cast<acc>(call.negative_weight)),
        scale(static_cast<acc>(scale)),
        gamma(gamma),
        planes(level.planes) {
    if constexpr (kWork == Work::kEachGradient)
      grads = level.grad.template const_data_ptr<scalar_t>();
    if constexpr (writes(kWork)) out = Tensor(level.out).mutable_data_ptr<scalar_t>();
    if (call.quality) quality = call.quality->template const_data_ptr<acc>();
    if (level.logits.numel() == 0) return;
    rows_per_tile = std::clamp<int64_t>(kRowTile / C, 1, kLocations);
    planes_per_tile = std::clamp<int64_t>(kPlaneTile / std::min(positions, kLocations), 1, C);
    stretches = divide_up(positions, kLocations);
    chunks = divide_up(C, planes_per_tile);
    tiles = planes ? images * stretches * chunks : divide_up(images * positions, rows_per_tile);
  }

  // Weighted sum of the losses of a tile.
  FCOS_INLINE double run_tile(int64_t tile) const {
    return planes ? run_planes(tile) : run_rows(tile);
  }

  // Works on n logits in x, all negatives or kNever, that come from index i of the level. Returns
  // the sum of their losses, not weighted.
  FCOS_INLINE acc negatives(acc* x, int64_t n, int64_t i) const {
    const int size = static_cast<int>(divide_up(n, kPadding) * kPadding);
    for (int k = static_cast<int>(n); k < size; ++k) x[k] = acc(kNever);
    const acc factor = scale * negative_weight;
    acc sum = 0;
    if constexpr (kWork == Work::kSum) {
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < size; ++k) sum += negative_term<scalar_t>(x[k], gamma).loss;
      return sum;
    }
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < size; ++k) {
      const Term<acc> term = negative_term<scalar_t>(x[k], gamma);
      if constexpr (sums(kWork)) sum += term.loss;
      x[k] = factor * (kWork == Work::kEach ? term.loss : term.derivative);
    }
    if constexpr (kWork == Work::kEachGradient)
      // nothing times a gradient that is not finite is nothing, too
      for (int k = 0; k < n; ++k)
        x[k] = x[k] == acc(0) ? acc(0) : x[k] * static_cast<acc>(grads[i + k]);
    for (int k = 0; k < n; ++k) out[i + k] = static_cast<scalar_t>(x[k]);
    return sum;
  }

  // Works on the positive at index i. Returns its loss, not weighted.
  FCOS_INLINE acc positive(int64_t i, int64_t location) const {
    const acc y = quality ? quality[location] : acc(1);
    const Term<acc> term = positive_term(static_cast<acc>(logits[i]), y, gamma);
    acc result = scale * positive_weight * (kWork == Work::kEach ? term.loss : term.derivative);
    if constexpr (kWork == Work::kEachGradient) result *= static_cast<acc>(grads[i]);
    if constexpr (writes(kWork)) out[i] = static_cast<scalar_t>(result);
    return term.loss;
  }

  FCOS_INLINE int64_t label_index(int64_t row) const {
    return row / positions * labels_per_image + first_label + row % positions;
  }

  FCOS_INLINE double run_rows(int64_t tile) const {
    const int64_t first_row = tile * rows_per_tile;
    const int64_t rows = std::min(rows_per_tile, images * positions - first_row);
    int label[kLocations];
    for (int64_t row = 0; row < rows;) {  // image by image, each a run of memory
      const int64_t from = label_index(first_row + row);
      const int64_t n = std::min(rows - row, positions - (first_row + row) % positions);
      for (int64_t k = 0; k < n; ++k)
        label[row + k] = label_at(labels, from + k, static_cast<int>(C));
      row += n;
    }

    const int64_t first = first_row * C;
    alignas(64) acc x[kBlock];
    double negative_sum = 0, positive_sum = 0;
    for (int64_t i = 0, row = 0; i < rows * C; i += kBlock) {
      const int64_t n = std::min(kBlock, rows * C - i);
      for (int64_t k = 0; k < n; ++k) x[k] = static_cast<acc>(logits[first + i + k]);
      for (;; ++row) {
        const int64_t begin = row * C - i;  // where in the block the row starts
        if (label[row] == kIgnored)
          std::fill(x + std::max<int64_t>(begin, 0), x + std::min(begin + C, n), acc(kNever));
        else if (label[row] >= 0 && begin + label[row] >= 0 && begin + label[row] < n)
          x[begin + label[row]] = acc(kNever);
        if (begin + C > n) break;  // goes on in the next block
        if (begin + C == n) {
          ++row;
          break;
        }
      }
      negative_sum += negatives(x, n, first + i);
    }
    for (int64_t row = 0; row < rows; ++row)
      if (label[row] >= 0)
        positive_sum += positive(first + row * C + label[row], label_index(first_row + row));
    return double(negative_weight) * negative_sum + double(positive_weight) * positive_sum;
  }

  FCOS_INLINE double run_planes(int64_t tile) const {
    const int64_t chunk = tile % chunks, stretch = tile / chunks % stretches;
    const int64_t image = tile / chunks / stretches;
    const int64_t position = stretch * kLocations;
    const int64_t n = std::min(kLocations, positions - position);
    const int64_t first_class = chunk * planes_per_tile;
    const int64_t last_class = std::min(first_class + planes_per_tile, C);
    const int64_t location = image * labels_per_image + first_label + position;
    int label[kLocations];
    for (int64_t k = 0; k < n; ++k) label[k] = label_at(labels, location + k, static_cast<int>(C));

    alignas(64) acc x[kBlock];
    double negative_sum = 0, positive_sum = 0;
    for (int64_t c = first_class; c < last_class; ++c)
      for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t first = (image * C + c) * positions + position + begin;
        const int size = static_cast<int>(std::min(kBlock, n - begin));
        const int this_class = static_cast<int>(c);
        for (int k = 0; k < size; ++k) {
          const int l = label[begin + k];
          const acc logit = static_cast<acc>(logits[first + k]);
          x[k] = (l != this_class) & (l != kIgnored) ? logit : acc(kNever);
        }
        negative_sum += negatives(x, size, first);
      }
    for (int64_t k = 0; k < n; ++k)
      if (label[k] >= first_class && label[k] < last_class)
        positive_sum += positive((image * C + label[k]) * positions + position + k, location + k);
    return double(negative_weight) * negative_sum + double(positive_weight) * positive_sum;
  }
};

template <Work kWork, typename scalar_t, typename Gamma>
void run_on_cpu(const FocalCall& call, Gamma gamma) {
  // A sum is divided by at least 1, so that a batch without positives is ordinary.
  const double divisor = std::max(1.0, value_of<scalar_t>(call.normalizer, 1.0));
  const double grad = value_of<scalar_t>(call.grad, 1.0);
  if (call.only_if_not_one && grad == 1.0) return;
  const bool scaled = kWork == Work::kGradient || kWork == Work::kSumAndGradient;

  std::vector<LevelWorker<kWork, scalar_t, Gamma>> levels;
  int64_t tiles = 0;
  for (const FocalLevel& level : call.levels) {
    levels.emplace_back(call, level, scaled ? grad / divisor : 1.0, gamma);
    levels.back().first_tile = tiles;
    tiles += levels.back().tiles;
  }
  std::vector<double> partial(tiles);
  // Tiles differ in size, and cores in speed: whoever is free takes the next.
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tiles, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    with_cpu_isa([&] {
      auto level = levels.begin();
      for (int64_t tile; (tile = next.fetch_add(1)) < tiles;) {
        while (tile >= level->first_tile + level->tiles) ++level;
        partial[tile] = level->run_tile(tile - level->first_tile);
      }
    });
  });
  if constexpr (sums(kWork)) {
    double sum = 0;
    for (double p : partial) sum += p;
    Tensor out = call.sum;
    *out.mutable_data_ptr<acc_t<scalar_t>>() = static_cast<acc_t<scalar_t>>(sum / divisor);
  }
}

struct Cpu {
  template <Work kWork>
  static void run(const FocalCall& call) {
    dispatch_floating(call.logits().scalar_type(), "sigmoid_focal_loss", [&](auto zero) {
      using scalar_t = decltype(zero);
      // The sums, which training runs on, are compiled for the usual gamma.
      if constexpr (!std::is_same_v<scalar_t, double> && kWork != Work::kEach &&
                    kWork != Work::kEachGradient)
        if (call.gamma == 2.0) return run_on_cpu<kWork, scalar_t>(call, GammaTwo{});
      run_on_cpu<kWork, scalar_t>(call, GammaAny{call.gamma});
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) { FCOS_IMPLEMENT_FOCAL_OPS(m, Cpu); }

}  // namespace fcos_ext
