// How padded_batched_nms takes the candidates of an image: the best first, a sorted chunk at a
// time. postprocess takes those of a level in the same way.
#pragma once

#include "../padded_batched_nms.h"
#include "../padded_batched_nms_args.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace padded {

// One block for each image. It does not sort the candidates: it takes the best kChunk that it has
// not had, sorts those, goes through them kBatch at a time, and stops once it has kept enough.
//
// The simulator gets smaller numbers, so that small inputs pass through every stage.
constexpr int kBatch = 64;
#ifdef FCOS_SIMT
constexpr int kThreads = 128;
constexpr int kLogBins = 5;
template <typename score_t>
constexpr int kResident = 48;
constexpr int kStaged = 16;
#else
constexpr int kThreads = 512;
constexpr int kLogBins = 11;
// Kept boxes that stay in shared memory, as many as fit into 48 KiB beside the rest; the others
// come by from global memory, kStaged at a time.
template <typename score_t>
constexpr int kResident = sizeof(score_t) == 8 ? 512 : 1024;
constexpr int kStaged = 256;
#endif
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 2 * kThreads;  // each thread sorts one pair
constexpr int kBins = 1 << kLogBins;
constexpr unsigned kAllLanes = 0xffffffffu;
using Word = unsigned long long;  // a bit for each box of a batch
static_assert(kBatch == 8 * sizeof(Word) && kThreads % kBatch == 0);

template <typename score_t, typename label_t>
struct Args {
  const float4* boxes;    // [N, K]
  const score_t* scores;  // [N, K]
  const label_t* labels;  // [N, K]
  int64_t* keep;          // [N, D]
  int64_t* counts;        // [N]
  int64_t N, K, D;
  float iou_threshold;
  bool class_agnostic;
};

// The candidates of one image. What the functions below take as a source are K ranks, of which
// those that are absent are 0.
template <typename score_t, typename label_t>
struct Image {
  using R = Rank<score_t>;
  static constexpr int kUnroll = 4;  // reads at a time

  const float4* boxes;
  const score_t* scores;
  const label_t* labels;
  int64_t* keep;
  int K;
  float iou_threshold;
  bool class_agnostic;

  __device__ __forceinline__ Image(const Args<score_t, label_t>& a, int64_t n)
      : boxes(a.boxes + n * a.K),
        scores(a.scores + n * a.K),
        labels(a.labels + n * a.K),
        keep(a.keep + n * a.D),
        K(static_cast<int>(a.K)),
        iou_threshold(a.iou_threshold),
        class_agnostic(a.class_agnostic) {}

  __device__ __forceinline__ OrderKey<score_t> key(int i) const {
    return labels[i] < 0 ? 0 : order_key(scores[i]);
  }
  // 0 if absent.
  __device__ __forceinline__ Rank<score_t> rank(int i) const {
    const OrderKey<score_t> k = key(i);
    return k ? rank_of<score_t>(k, i) : Rank<score_t>(0);
  }
  __device__ __forceinline__ int64_t group(int64_t i) const {
    return class_agnostic ? 0 : static_cast<int64_t>(labels[i]);
  }
};

// Boxes with their groups, in shared memory.
template <int kSize>
struct Boxes {
  float4 box[kSize];
  int64_t group[kSize];

  __device__ __forceinline__ bool suppresses(int k, const float4& b, float area, int64_t g,
                                             float iou_threshold) const {
    if (group[k] != g) return false;
    const Box ours{box[k].x, box[k].y, box[k].z, box[k].w};
    return iou_of(ours, area_of(ours), Box{b.x, b.y, b.z, b.w}, area) > iou_threshold;
  }
};

template <typename score_t>
struct Shared {
  Rank<score_t> ranks[kChunk];
  Boxes<kResident<score_t>> kept;
  Boxes<kBatch> batch;
  union {  // a selection is over when its boxes are looked at
    unsigned bins[kBins];
    Boxes<kStaged> staged;
  };
  Word suppressors[kBatch];  // of each box of the batch: those before it that would suppress it
  unsigned suppressed[kBatch / 32];
  OrderKey<score_t> highest, lowest;
  unsigned warp_sums[kWarps];
  int num_ranks, num_bins;
};

template <typename R>
__device__ __forceinline__ int bit_width(R x) {
  if constexpr (sizeof(R) == 8) return 64 - __clzll(static_cast<long long>(x));
  const auto high = static_cast<unsigned long long>(x >> (8 * sizeof(R) - 64));
  if (high) return 128 - __clzll(static_cast<long long>(high));
  return 64 - __clzll(static_cast<long long>(x));
}

// Range of the keys that are not 0; highest is 0 if there are none.
template <typename score_t, typename label_t>
__device__ __forceinline__ void find_range(const Image<score_t, label_t>& image,
                                           Shared<score_t>& s) {
  using Key = OrderKey<score_t>;
  if (threadIdx.x == 0) {
    s.highest = 0;
    s.lowest = ~Key(0);
  }
  __syncthreads();
  Key highest = 0, lowest = ~Key(0);
#pragma unroll 4
  for (int i = threadIdx.x; i < image.K; i += kThreads) {
    const Key key = image.key(i);
    highest = max(highest, key);
    lowest = min(lowest, key - 1);  // absent ones become the highest
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    highest = max(highest, __shfl_xor_sync(kAllLanes, highest, offset));
    lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, offset));
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(&s.highest, highest);
    atomicMin(&s.lowest, lowest);
  }
  __syncthreads();
}

// How many of the first bins have at most kChunk ranks together, for all threads.
template <typename S>
__device__ __forceinline__ int count_bins(S& s) {
  constexpr int kEach = kBins < kThreads ? 1 : kBins / kThreads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  unsigned sum = 0;
  if (thread * kEach < kBins)
    for (int b = 0; b < kEach; ++b) sum += s.bins[thread * kEach + b];
  unsigned before = sum;  // becomes the sum up to this thread
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) s.warp_sums[warp] = before;
  if (thread == 0) s.num_bins = kBins;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += s.warp_sums[w];
  if (thread * kEach < kBins)
    for (int b = 0; b < kEach; ++b) {
      const unsigned with = before + s.bins[thread * kEach + b];
      if (before <= kChunk && with > kChunk) s.num_bins = thread * kEach + b;  // one thread's
      before = with;
    }
  __syncthreads();
  return s.num_bins;
}

// Finds the lowest rank of a chunk: at most kChunk candidates, and one at least if there are any,
// lie between it and `highest`.
template <typename Source, typename S>
__device__ __forceinline__ typename Source::R find_chunk(const Source& source,
                                                         typename Source::R lowest,
                                                         typename Source::R highest, S& s) {
  using R = typename Source::R;
  for (;;) {
    const int width = bit_width(highest - lowest);
    const int shift = width > kLogBins ? width - kLogBins : 0;
    for (int b = threadIdx.x; b < kBins; b += kThreads) s.bins[b] = 0;
    __syncthreads();
#pragma unroll(Source::kUnroll)
    for (int i = threadIdx.x; i < source.K; i += kThreads) {
      const R rank = source.rank(i);
      if (rank >= lowest && rank <= highest)
        atomicAdd(&s.bins[static_cast<int>((highest - rank) >> shift)], 1u);
    }
    __syncthreads();
    const int bins = count_bins(s);
    if (bins > static_cast<int>((highest - lowest) >> shift)) return lowest;
    if (bins > 0) return highest - (R(bins) << shift) + 1;
    // The first bin alone is too much: many scores are equal, or nearly. Look into it.
    lowest = highest - ((R(1) << shift) - 1);
  }
}

// Puts the ranks from lowest to highest into s.ranks, best first. Returns how many there are.
template <typename Source, typename S>
__device__ __forceinline__ int sort_chunk(const Source& source, typename Source::R lowest,
                                          typename Source::R highest, S& s) {
  using R = typename Source::R;
  const int thread = threadIdx.x;
  if (thread == 0) s.num_ranks = 0;
  __syncthreads();
#pragma unroll(Source::kUnroll)
  for (int i = thread; i < source.K; i += kThreads) {
    const R rank = source.rank(i);
    if (rank >= lowest && rank <= highest) s.ranks[atomicAdd(&s.num_ranks, 1)] = rank;
  }
  __syncthreads();
  const int count = s.num_ranks;
  int size = 64;  // whole warps of pairs
  while (size < count) size *= 2;
  for (int i = count + thread; i < size; i += kThreads) s.ranks[i] = 0;

  // Bitonic: K. E. Batcher, "Sorting networks and their applications", 1968.
  for (int run = 2; run <= size; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
      // Up to a step of 32 a warp's pairs are 64 neighbours, which no other warp touches.
      if (step > 32 || (step == 32 && run > 64) || run == 2)
        __syncthreads();
      else
        __syncwarp();
      const int i = 2 * thread - (thread & (step - 1));
      if (i >= size) continue;
      const R a = s.ranks[i], b = s.ranks[i + step];
      if ((a < b) == ((i & run) == 0)) {
        s.ranks[i] = b;
        s.ranks[i + step] = a;
      }
    }
  __syncthreads();
  return count;
}

}  // namespace padded
}  // namespace fcos_ext
