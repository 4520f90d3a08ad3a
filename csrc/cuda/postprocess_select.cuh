// How postprocess finds candidates among the logits: one read of them, one comparison for most.
//
// What passes that is scored exactly, and appended to a buffer of its image and level. Where the
// buffer overflows, the candidates have been counted in a histogram all the same: a second pass
// takes those that lie above a threshold that the histogram gives. Where so many are nearly equal
// that this overflows too, the selection of the best goes through the logits itself.
#pragma once

#include "../padded_batched_nms.h"
#include "../postprocess_args.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace post {

// The simulator gets smaller numbers, so that small inputs pass through every stage.
#ifdef FCOS_SIMT
constexpr int kThreads = 64;
constexpr int kCapacity = 48;
#else
constexpr int kThreads = 256;
constexpr int kCapacity = 8192;
#endif
// A block works on a tile at a time.
//   locations innermost: kThreads vectors of locations by kPlanes classes; a thread keeps its
//                        locations and walks the planes
//   classes innermost:   kThreads by kVectors vectors, in the order of the memory
// A thread has kVectors loads in flight.
constexpr int kPlanes = 8, kVectors = 4;
// Bins of the upper bits of a score in (0, 1]: 32 for each power of 2.
constexpr int kBinShift = 18, kBins = 4096;
static_assert((0x3f800000 >> kBinShift) < kBins);
constexpr unsigned kAllLanes = 0xffffffffu;

struct DeviceLevel {
  PostprocessLevel level;
  unsigned first_tile;
  FastDivision tiles;            // of an image
  FastDivision location_blocks;  // locations innermost: tiles of a row of planes
  FastDivision locations, width;
  bool aligned;            // for accesses of 16 bytes
  int64_t first_survivor;  // in the buffers of an image
  int capacity;
};

struct Args {
  DeviceLevel levels[kMaxPostprocessLevels];
  int num_levels;
  unsigned tiles;
  int64_t images;
  FastDivision classes;
  Scoring scoring;
  Cutoff cutoff;
  Rank<float>* survivors;  // [N, survivors_per_image]
  int64_t survivors_per_image;
  // [N, levels]: how many passed, in the first and second pass; and the bins of the first
  unsigned *counts, *second_counts, *bins;
  unsigned long long* dropped;  // [N]

  // Where the candidates of an image and level go.
  BoxCoding coding;
  Numbers image_sizes;
  bool clip, keep_empty;
  BoxEnds ends;
  int64_t candidates;
  float4* boxes;    // [N, candidates]
  float* scores;    // [N, candidates]
  int32_t* labels;  // [N, candidates]
};

// The logits of one image and level.
template <typename scalar_t>
struct Logits {
  using acc = acc_t<scalar_t>;
  const Args& a;
  const DeviceLevel& d;
  int64_t n;
  int64_t map;  // of images and levels
  const scalar_t* data;

  __device__ __forceinline__ Logits(const Args& args, int64_t image, int l)
      : a(args),
        d(args.levels[l]),
        n(image),
        map(image * args.num_levels + l),
        data(static_cast<const scalar_t*>(d.level.logits) + n * d.level.image_stride) {}

  template <typename T>
  __device__ __forceinline__ T centerness(int location) const {
    const int y = static_cast<int>(d.width.quotient(static_cast<unsigned>(location)));
    const int x = location - y * d.level.width;
    return d.level.template centerness_at<T>(n, y, x);
  }

  __device__ __forceinline__ acc location_cutoff(int location) const {
    return static_cast<acc>(a.cutoff.at(centerness<float>(location)));
  }

  // The lowest cutoff of logits [i, i + size) in the order of the memory, classes innermost.
  __device__ __forceinline__ acc cutoff(int i, int size) const {
    if (!a.scoring.on_final) return static_cast<acc>(a.cutoff.any);
    const int first = static_cast<int>(a.classes.quotient(static_cast<unsigned>(i)));
    const int last = static_cast<int>(a.classes.quotient(static_cast<unsigned>(i + size - 1)));
    acc lowest = location_cutoff(first);
    for (int location = first + 1; location <= last; ++location)
      lowest = min(lowest, location_cutoff(location));
    return lowest;
  }

  // What a logit is ranked by, as Scoring::judge() gives it, and its place in the order of
  // locations, then classes.
  __device__ __forceinline__ float score(int i, int* flat) const {
    const int C = static_cast<int>(a.classes.divisor);
    const FastDivision& inner = d.level.planes ? d.locations : a.classes;
    const int slow = static_cast<int>(inner.quotient(static_cast<unsigned>(i)));
    const int fast = i - slow * static_cast<int>(inner.divisor);
    const int location = d.level.planes ? fast : slow;
    *flat = location * C + (d.level.planes ? slow : fast);
    const float weight = sigmoid_by_series(centerness<double>(location));
    const double x = static_cast<double>(static_cast<acc>(data[i]));
    return a.scoring.judge(sigmoid_by_series(x), weight);
  }
};

// The lowest key of the second pass: as many as the level may have candidates are not below it.
// All threads must call, and get it.
template <int kThreads>
__device__ __forceinline__ unsigned find_bound(const unsigned* bins, int wanted) {
  constexpr int kEach = kBins / kThreads, kWarps = kThreads / 32;
  __shared__ unsigned warp_sums[kWarps];
  __shared__ int bound;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int highest = kBins - 1 - thread * kEach;  // the best first
  unsigned sum = 0;
  for (int b = 0; b < kEach; ++b) sum += bins[highest - b];
  unsigned before = sum;  // becomes the sum up to this thread
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) warp_sums[warp] = before;
  if (thread == 0) bound = 0;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  for (int b = 0; b < kEach; ++b) {
    const unsigned with = before + bins[highest - b];
    if (before < static_cast<unsigned>(wanted) && with >= static_cast<unsigned>(wanted))
      bound = highest - b;  // one thread's
    before = with;
  }
  __syncthreads();
  const unsigned key = 0x80000000u | static_cast<unsigned>(bound) << kBinShift;
  __syncthreads();  // the next call starts to write
  return key;
}

// Takes logit i, which has passed the cutoff.
template <bool kSecond, typename scalar_t>
__device__ __forceinline__ void take(const Logits<scalar_t>& logits, int i, unsigned bound) {
  const Args& a = logits.a;
  int flat;
  const float score = logits.score(i, &flat);
  if constexpr (!kSecond)
    if (score != score) atomicAdd(a.dropped + logits.n, 1ull);
  if (!(score > 0.0f)) return;
  const OrderKey<float> key = order_key(score);
  if (kSecond && key < bound) return;
  const unsigned at = atomicAdd((kSecond ? a.second_counts : a.counts) + logits.map, 1u);
  if constexpr (!kSecond)
    atomicAdd(a.bins + logits.map * kBins + ((key & 0x7fffffffu) >> kBinShift), 1u);
  if (at < static_cast<unsigned>(logits.d.capacity))
    a.survivors[logits.n * a.survivors_per_image + logits.d.first_survivor + at] =
        rank_of<float>(key, flat);
}

// Bits of those of N logits from i on that pass the cutoff. There may be fewer of them left. What
// equals it passes, as does -inf where the centerness is not a number.
template <int N, typename scalar_t>
__device__ __forceinline__ unsigned passing(const Logits<scalar_t>& logits, int i,
                                            acc_t<scalar_t> cutoff) {
  using acc = acc_t<scalar_t>;
  unsigned passed = 0;
  if (i + N <= logits.d.level.pairs) {
    acc x[N];
    unpack(load_streaming<N>(logits.data + i), x);
#pragma unroll
    for (int k = 0; k < N; ++k) passed |= x[k] < cutoff ? 0u : 1u << k;
  } else {
#pragma unroll 1
    for (int k = 0; i + k < logits.d.level.pairs; ++k)
      passed |= static_cast<acc>(logits.data[i + k]) < cutoff ? 0u : 1u << k;
  }
  return passed;
}

// Takes what passes of kVectors vectors, `step` logits from one to the next.
template <bool kSecond, int N, typename scalar_t>
__device__ __forceinline__ void take_vectors(const Logits<scalar_t>& logits, int i, int step,
                                             const acc_t<scalar_t> (&cutoffs)[kVectors],
                                             unsigned bound) {
  unsigned passed = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (cutoffs[v] < std::numeric_limits<acc_t<scalar_t>>::infinity())
      passed |= passing<N>(logits, i + v * step, cutoffs[v]) << (v * N);
#pragma unroll 1
  for (; passed; passed &= passed - 1) {
    const int bit = __ffs(static_cast<int>(passed)) - 1;
    take<kSecond>(logits, i + bit / N * step + bit % N, bound);
  }
}

template <bool kSecond, int N, typename scalar_t>
__device__ __forceinline__ void take_planes(const Logits<scalar_t>& logits, int tile,
                                            unsigned bound) {
  using acc = acc_t<scalar_t>;
  const DeviceLevel& d = logits.d;
  const int chunk = static_cast<int>(d.location_blocks.quotient(static_cast<unsigned>(tile)));
  const int block = tile - chunk * static_cast<int>(d.location_blocks.divisor);
  const int location = (block * kThreads + static_cast<int>(threadIdx.x)) * N;
  if (location >= d.level.locations) return;
  acc cutoff = static_cast<acc>(logits.a.cutoff.any);
  if (logits.a.scoring.on_final) {
    cutoff = logits.location_cutoff(location);
#pragma unroll 1
    for (int k = 1; k < N; ++k) cutoff = min(cutoff, logits.location_cutoff(location + k));
  }
  const int end = min((chunk + 1) * kPlanes, static_cast<int>(logits.a.classes.divisor));
#pragma unroll 1
  for (int c = chunk * kPlanes; c < end; c += kVectors) {
    acc cutoffs[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      cutoffs[v] = c + v < end ? cutoff : std::numeric_limits<acc>::infinity();
    take_vectors<kSecond, N>(logits, c * d.level.locations + location, d.level.locations, cutoffs,
                             bound);
  }
}

template <bool kSecond, int N, typename scalar_t>
__device__ __forceinline__ void take_rows(const Logits<scalar_t>& logits, int tile,
                                          unsigned bound) {
  using acc = acc_t<scalar_t>;
  constexpr int kStep = kThreads * N;
  const int first = tile * kVectors * kStep + static_cast<int>(threadIdx.x) * N;
  acc cutoffs[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = first + v * kStep, size = min(N, logits.d.level.pairs - i);
    cutoffs[v] = size > 0 ? logits.cutoff(i, size) : std::numeric_limits<acc>::infinity();
  }
  take_vectors<kSecond, N>(logits, first, kStep, cutoffs, bound);
}

template <bool kSecond, int N, typename scalar_t>
__device__ __forceinline__ void take_tile(const Logits<scalar_t>& logits, int tile,
                                          unsigned bound) {
  if (logits.d.level.planes)
    take_planes<kSecond, N>(logits, tile, bound);
  else
    take_rows<kSecond, N>(logits, tile, bound);
}

template <bool kSecond, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 3)
    postprocess_select_kernel(const __grid_constant__ Args a) {
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    int l = 0;
    while (l + 1 < a.num_levels && tile >= a.levels[l + 1].first_tile) ++l;
    const DeviceLevel& d = a.levels[l];
    const unsigned n = d.tiles.quotient(tile - d.first_tile);
    const int t = static_cast<int>(tile - d.first_tile - n * d.tiles.divisor);
    const Logits<scalar_t> logits(a, n, l);
    unsigned bound = 0;
    if constexpr (kSecond) {
      if (a.counts[logits.map] <= static_cast<unsigned>(d.capacity)) continue;
      bound = find_bound<kThreads>(a.bins + logits.map * kBins, d.level.max_candidates);
    }
    if (d.aligned)
      take_tile<kSecond, Vector<scalar_t>::kSize>(logits, t, bound);
    else
      take_tile<kSecond, 1>(logits, t, bound);
  }
}

}  // namespace post
}  // namespace fcos_ext
