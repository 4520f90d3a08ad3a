// The best of what postprocess_select.cuh found of each level, in order, and their boxes.
#pragma once

#include "padded_batched_nms_chunks.cuh"
#include "postprocess_select.cuh"

namespace fcos_ext {
namespace post {

// What has been appended to a buffer.
struct Survivors {
  using R = Rank<float>;
  static constexpr int kUnroll = 4;
  const R* ranks;
  int K;
  __device__ __forceinline__ R rank(int i) const { return ranks[i]; }
};

// All logits, each scored again whenever it is asked for.
template <typename scalar_t>
struct AllPairs {
  using R = Rank<float>;
  static constexpr int kUnroll = 1;
  const Logits<scalar_t>& logits;
  int K;
  __device__ __forceinline__ R rank(int i) const {
    using acc = acc_t<scalar_t>;
    if (static_cast<acc>(logits.data[i]) <= static_cast<acc>(logits.a.cutoff.any)) return 0;
    int flat;
    const float score = logits.score(i, &flat);
    return score > 0.0f ? rank_of<float>(order_key(score), flat) : R(0);
  }
};

struct ChunkShared {
  Rank<float> ranks[padded::kChunk];
  unsigned bins[padded::kBins];
  unsigned warp_sums[padded::kWarps];
  int num_ranks, num_bins;
  unsigned dropped;
};

// Writes candidate number `at` of an image and level.
template <typename scalar_t>
__device__ __forceinline__ void write_candidate(const Logits<scalar_t>& logits, Rank<float> rank,
                                                int at, ChunkShared& s) {
  const Args& a = logits.a;
  const PostprocessLevel& level = logits.d.level;
  const unsigned flat = static_cast<unsigned>(index_of(rank));
  const unsigned location = a.classes.quotient(flat);
  const int y = static_cast<int>(logits.d.width.quotient(location));
  const int x = static_cast<int>(location) - y * level.width;
  Box box = level.decode(a.coding, logits.n, y, x);
  const bool finite = is_finite(box);
  if (!finite) atomicAdd(&s.dropped, 1u);
  if (a.clip)
    box = a.ends.clipped(box, a.image_sizes.at<float>(2 * logits.n),
                         a.image_sizes.at<float>(2 * logits.n + 1));
  box = a.ends.compared(box);
  const int64_t to = logits.n * a.candidates + level.first_candidate + at;
  a.boxes[to] = make_float4(box.x0, box.y0, box.x1, box.y1);
  a.scores[to] = level.product_of(a.scoring, rank, logits.n, y, x);
  a.labels[to] = finite && (a.keep_empty || has_area(box))
                     ? static_cast<int>(flat - location * a.classes.divisor)
                     : -1;
}

// Writes the best of a source, whose ranks are not below `lowest`. Returns how many.
template <typename Source, typename scalar_t>
__device__ __forceinline__ int write_best(const Source& source, Rank<float> lowest,
                                          const Logits<scalar_t>& logits, ChunkShared& s) {
  using R = Rank<float>;
  const int wanted = logits.d.level.max_candidates;
  R highest = R(0xbf800000u) << 32 | 0xffffffffu;  // of a score of 1
  int count = 0;
  while (highest >= lowest && count < wanted) {
    const R chunk =
        source.K > padded::kChunk ? padded::find_chunk(source, lowest, highest, s) : lowest;
    const int num_ranks = padded::sort_chunk(source, chunk, highest, s);
    for (int r = threadIdx.x; r < num_ranks && count + r < wanted; r += padded::kThreads)
      write_candidate(logits, s.ranks[r], count + r, s);
    count = min(count + num_ranks, wanted);
    highest = chunk - 1;
    __syncthreads();  // the next chunk starts to write to s
  }
  return count;
}

// One block for each image and level.
template <typename scalar_t>
__global__ void __launch_bounds__(padded::kThreads, 1)
    postprocess_best_kernel(const __grid_constant__ Args a) {
  __shared__ ChunkShared s;
  for (int64_t map = blockIdx.x; map < a.images * a.num_levels; map += gridDim.x) {
    const int64_t n = map / a.num_levels;
    const Logits<scalar_t> logits(a, n, static_cast<int>(map - n * a.num_levels));
    if (threadIdx.x == 0) s.dropped = 0;
    __syncthreads();
    const DeviceLevel& d = logits.d;
    unsigned size = a.counts[map];
    if (size > static_cast<unsigned>(d.capacity)) size = a.second_counts[map];
    int count;
    if (size <= static_cast<unsigned>(d.capacity)) {
      const Survivors survivors{a.survivors + n * a.survivors_per_image + d.first_survivor,
                                static_cast<int>(size)};
      count = write_best(survivors, Rank<float>(1), logits, s);
    } else {
      const unsigned bound =
          find_bound<padded::kThreads>(a.bins + map * post::kBins, d.level.max_candidates);
      const AllPairs<scalar_t> pairs{logits, d.level.pairs};
      count = write_best(pairs, Rank<float>(bound) << 32, logits, s);
    }
    // The rest is padding: no box is read where the label is negative.
    for (int r = count + static_cast<int>(threadIdx.x); r < d.level.max_candidates;
         r += padded::kThreads) {
      const int64_t to = n * a.candidates + d.level.first_candidate + r;
      a.boxes[to] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      a.scores[to] = 0.0f;
      a.labels[to] = -1;
    }
    __syncthreads();
    if (threadIdx.x == 0 && s.dropped)
      atomicAdd(a.dropped + n, static_cast<unsigned long long>(s.dropped));
    __syncthreads();  // the next image and level starts to write to s
  }
}

}  // namespace post
}  // namespace fcos_ext
