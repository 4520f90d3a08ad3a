// How a block of sigmoid_focal_loss works on a tile of logits, in either memory layout.
#pragma once

#include "../sigmoid_focal_loss.h"
#include "../sigmoid_focal_loss_ops.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace focal {

constexpr int kThreads = 256;
// Independent loads of a thread; float64 has fewer, for lack of registers.
template <typename scalar_t>
constexpr int kInFlight = sizeof(scalar_t) == 8 ? 2 : 4;

// A block works on a tile at a time. The tiles depend on the sizes alone, which makes the sum the
// same to the bit on any GPU.
//   classes innermost:   whole locations, about kRowTile logits, seen as one run of memory
//   positions innermost: kThreads vectors of positions by kPlanes classes; a thread keeps its
//                        positions and walks the planes
template <typename scalar_t>
constexpr int kRowTile = kThreads * kInFlight<scalar_t> * Vector<scalar_t>::kSize;
constexpr int kPlanes = 8;
constexpr int kMaxRows = kThreads * 8;  // locations of a tile, so that their labels fit

// One level of one image is C x positions or positions x C.
template <typename scalar_t>
struct DeviceLevel {
  const scalar_t* logits;
  const scalar_t* grads;  // kEachGradient
  scalar_t* out;
  int64_t locations;    // of all images
  int64_t first_label;  // in the labels of an image
  unsigned first_tile;
  FastDivision positions;          // of an image
  FastDivision vectors_per_plane;  // positions innermost
  bool planes;                     // positions are innermost
  bool aligned;                    // for accesses of 16 bytes
};

template <typename scalar_t>
struct Args {
  using acc = acc_t<scalar_t>;
  DeviceLevel<scalar_t> levels[kMaxFeatureLevels];
  int num_levels;
  unsigned tiles;
  int64_t labels_per_image;
  Integers labels;
  const acc* quality;  // may be null
  FastDivision classes;
  int rows_per_tile;
  int chunks;  // of kPlanes classes
  acc positive_weight, negative_weight;
  const acc* normalizer;  // may be null
  const acc* grad;        // kGradient: that of the sum
  bool only_if_not_one;   // kGradient: the result for a grad of 1 is there already
  acc* partial;           // sums
  unsigned* ticket;       // sums
  acc* sum;               // sums
};

template <typename acc>
__device__ __forceinline__ acc divisor(const acc* normalizer) {
  return normalizer && *normalizer > acc(1) ? *normalizer : acc(1);
}

// Works on N logits as if all were negatives but those whose bit in `others` is set. Returns the
// sum of the losses, not weighted. `factor` is the weight and what multiplies it.
template <Work kWork, int N, typename scalar_t, typename Gamma>
__device__ __forceinline__ acc_t<scalar_t> negatives(Vector<scalar_t, N> packed, unsigned others,
                                                     const DeviceLevel<scalar_t>& level, int64_t i,
                                                     acc_t<scalar_t> factor, Gamma gamma) {
  using acc = acc_t<scalar_t>;
  acc x[N], g[N];
  unpack(packed, x);
  if constexpr (kWork == Work::kEachGradient) unpack(load_streaming<N>(level.grads + i), g);
  if (others) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(others >> k & 1u)) continue;
      x[k] = acc(kNever);
      g[k] = acc(0);
    }
  }
  acc sum = 0;
  Vector<scalar_t, N> y;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Term<acc> term = negative_term<scalar_t>(x[k], gamma);
    acc result = factor * (kWork == Work::kEach ? term.loss : term.derivative);
    if constexpr (kWork == Work::kEachGradient) result *= g[k];
    if constexpr (sums(kWork)) sum += term.loss;
    y.values[k] = static_cast<scalar_t>(result);
  }
  if constexpr (writes(kWork)) store_streaming(level.out + i, y);
  return sum;
}

// Works on one positive. Returns its loss, not weighted.
template <Work kWork, typename scalar_t, typename Gamma>
__device__ __forceinline__ acc_t<scalar_t> positive(const Args<scalar_t>& a,
                                                    const DeviceLevel<scalar_t>& level,
                                                    int64_t logit, int64_t label,
                                                    acc_t<scalar_t> scale, Gamma gamma) {
  using acc = acc_t<scalar_t>;
  const acc y = a.quality ? a.quality[label] : acc(1);
  const Term<acc> term = positive_term(static_cast<acc>(level.logits[logit]), y, gamma);
  acc result = scale * a.positive_weight * (kWork == Work::kEach ? term.loss : term.derivative);
  if constexpr (kWork == Work::kEachGradient) result *= static_cast<acc>(level.grads[logit]);
  if constexpr (writes(kWork)) level.out[logit] = static_cast<scalar_t>(result);
  return term.loss;
}

// Index of the label of a location, counted through the images of a level.
template <typename scalar_t>
__device__ __forceinline__ int64_t label_index(const Args<scalar_t>& a,
                                               const DeviceLevel<scalar_t>& level, int64_t row) {
  const int64_t step = a.labels_per_image - level.positions.divisor;
  // A level that is alone has nothing to skip between images, and may be of any size.
  if (step == 0) return level.first_label + row;
  return level.first_label + row + level.positions.quotient(static_cast<unsigned>(row)) * step;
}

// Bits of the logits of a vector that are no negatives. It starts at class c of a row.
template <int N>
__device__ __forceinline__ unsigned others_of_row(const int* labels, int row, int c, int C) {
  unsigned others = 0;
  int end = C - c;  // where in the vector the row ends
  for (;;) {
    const int label = labels[row];
    if (label != kBackground) {
      const int begin = end - C, positive = begin + label;
      if (label != kIgnored)
        others |= positive >= 0 && positive < N ? 1u << positive : 0u;
      else
        others |= (end < N ? (1u << end) - 1 : ~0u) & (begin > 0 ? ~0u << begin : ~0u);
    }
    if (end >= N) return others;
    end += C;
    ++row;
  }
}

// Logits [begin, end) of a tile that starts at logit `first` of the level.
template <Work kWork, int N, typename scalar_t, typename Gamma>
__device__ __forceinline__ acc_t<scalar_t> stream_rows(const DeviceLevel<scalar_t>& level,
                                                       int64_t first, const int* labels,
                                                       FastDivision classes, int begin, int end,
                                                       acc_t<scalar_t> factor, Gamma gamma) {
  const int C = static_cast<int>(classes.divisor), stride = kThreads * N;
  constexpr int kLoads = kInFlight<scalar_t>;
  acc_t<scalar_t> sum = 0;
#pragma unroll 1
  for (int i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += stride * kLoads) {
    Vector<scalar_t, N> x[kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v)
      if (i + v * stride < end) x[v] = load_streaming<N>(level.logits + first + i + v * stride);
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      const int offset = i + v * stride;
      if (offset >= end) break;
      const int row = static_cast<int>(classes.quotient(offset));
      const unsigned others = others_of_row<N>(labels, row, offset - row * C, C);
      sum += negatives<kWork, N>(x[v], others, level, first + offset, factor, gamma);
    }
  }
  return sum;
}

template <Work kWork, typename scalar_t, typename Gamma>
__device__ __forceinline__ acc_t<scalar_t> rows_tile(const Args<scalar_t>& a,
                                                     const DeviceLevel<scalar_t>& level,
                                                     unsigned tile, acc_t<scalar_t> scale,
                                                     Gamma gamma) {
  using acc = acc_t<scalar_t>;
  constexpr int N = Vector<scalar_t>::kSize;
  __shared__ int labels[kMaxRows];
  const int C = static_cast<int>(a.classes.divisor);
  const int64_t first_row = int64_t(tile) * a.rows_per_tile;
  const int64_t left = level.locations - first_row;
  const int rows = left < a.rows_per_tile ? static_cast<int>(left) : a.rows_per_tile;
  __syncthreads();  // the labels of the tile before have been used
  for (int row = threadIdx.x; row < rows; row += kThreads)
    labels[row] = label_at(a.labels, label_index(a, level, first_row + row), C);
  __syncthreads();

  const int64_t first = first_row * C;
  const acc factor = scale * a.negative_weight;
  const int n = rows * C, whole = level.aligned ? n - n % N : 0;
  acc sum = stream_rows<kWork, N>(level, first, labels, a.classes, 0, whole, factor, gamma);
  sum += stream_rows<kWork, 1>(level, first, labels, a.classes, whole, n, factor, gamma);
  sum *= a.negative_weight;

  if constexpr (writes(kWork)) __syncthreads();  // positives go over what others have written
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    if (labels[row] < 0) continue;
    const int64_t logit = first + int64_t(row) * C + labels[row];
    sum += a.positive_weight *
           positive<kWork>(a, level, logit, label_index(a, level, first_row + row), scale, gamma);
  }
  return sum;
}

template <Work kWork, int N, typename scalar_t, typename Gamma>
__device__ __forceinline__ acc_t<scalar_t> planes_tile(const Args<scalar_t>& a,
                                                       const DeviceLevel<scalar_t>& level,
                                                       unsigned tile, acc_t<scalar_t> scale,
                                                       Gamma gamma) {
  using acc = acc_t<scalar_t>;
  const int C = static_cast<int>(a.classes.divisor);
  const unsigned positions = level.positions.divisor;
  const unsigned block = tile / a.chunks;
  const int first_class = static_cast<int>(tile - block * a.chunks) * kPlanes;
  const int64_t vector = int64_t(block) * kThreads + threadIdx.x;
  if (vector * N >= level.locations) return acc(0);
  const unsigned image = level.vectors_per_plane.quotient(static_cast<unsigned>(vector));
  const unsigned position =
      (static_cast<unsigned>(vector) - image * level.vectors_per_plane.divisor) * N;
  const int64_t location = image * a.labels_per_image + level.first_label + position;
  const int64_t first = (int64_t(image) * C + first_class) * positions + position;

  // Bit c * N + k: logit k of plane c is no negative. Column: bit 0 of each plane.
  constexpr uint64_t kColumn = (~0ull >> (64 - kPlanes * N)) / ((1ull << N) - 1);
  uint64_t others = 0;
  bool any_positive = false;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int label = label_at(a.labels, location + k, C);
    if (label == kIgnored) {
      others |= kColumn << k;
    } else if (label >= first_class && label < first_class + kPlanes) {
      others |= uint64_t(1) << ((label - first_class) * N + k);
      any_positive = true;
    }
  }

  acc sum = 0;
  const acc factor = scale * a.negative_weight;
  constexpr int kLoads = kInFlight<scalar_t>;
  const int planes = C - first_class < kPlanes ? C - first_class : kPlanes;
#pragma unroll 1
  for (int c = 0; c < planes; c += kLoads) {
    Vector<scalar_t, N> x[kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v)
      if (c + v < planes)
        x[v] = load_streaming<N>(level.logits + first + int64_t(c + v) * positions);
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      if (c + v >= planes) break;
      const int64_t i = first + int64_t(c + v) * positions;
      const unsigned bits = static_cast<unsigned>(others >> ((c + v) * N)) & ((1u << N) - 1);
      sum += negatives<kWork, N>(x[v], bits, level, i, factor, gamma);
    }
  }
  sum *= a.negative_weight;
  if (!any_positive) return sum;
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    const int c = label_at(a.labels, location + k, C) - first_class;
    if (c >= 0 && c < kPlanes)
      sum += a.positive_weight * positive<kWork>(a, level, first + int64_t(c) * positions + k,
                                                 location + k, scale, gamma);
  }
  return sum;
}

}  // namespace focal
}  // namespace fcos_ext
