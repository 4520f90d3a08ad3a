#include <tuple>

#include "../padded_batched_nms.h"
#include "../padded_batched_nms_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace {

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

// The candidates of one image.
template <typename score_t, typename label_t>
struct Image {
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
template <typename score_t>
__device__ __forceinline__ int count_bins(Shared<score_t>& s) {
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
template <typename score_t, typename label_t>
__device__ __forceinline__ Rank<score_t> find_chunk(const Image<score_t, label_t>& image,
                                                    Rank<score_t> lowest, Rank<score_t> highest,
                                                    Shared<score_t>& s) {
  using R = Rank<score_t>;
  for (;;) {
    const int width = bit_width(highest - lowest);
    const int shift = width > kLogBins ? width - kLogBins : 0;
    for (int b = threadIdx.x; b < kBins; b += kThreads) s.bins[b] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < image.K; i += kThreads) {
      const R rank = image.rank(i);
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
template <typename score_t, typename label_t>
__device__ __forceinline__ int sort_chunk(const Image<score_t, label_t>& image,
                                          Rank<score_t> lowest, Rank<score_t> highest,
                                          Shared<score_t>& s) {
  using R = Rank<score_t>;
  const int thread = threadIdx.x;
  if (thread == 0) s.num_ranks = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < image.K; i += kThreads) {
    const R rank = image.rank(i);
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

// Whether a kept box suppresses box c of the batch; kThreads / kBatch threads share the work for
// one c, and each gets its own answer. All threads must call.
template <typename score_t, typename label_t>
__device__ __forceinline__ bool is_suppressed(const Image<score_t, label_t>& image, int64_t count,
                                              Shared<score_t>& s) {
  constexpr int kShares = kThreads / kBatch;
  const int c = threadIdx.x % kBatch, share = threadIdx.x / kBatch;
  const float4 b = s.batch.box[c];
  const int64_t group = s.batch.group[c];
  const float area = area_of(Box{b.x, b.y, b.z, b.w});
  const int resident = static_cast<int>(min(count, int64_t(kResident<score_t>)));
  bool hit = false;
#pragma unroll 2
  for (int k = share; k < resident && !hit; k += kShares)
    hit = s.kept.suppresses(k, b, area, group, image.iou_threshold);
  for (int64_t first = resident; first < count; first += kStaged) {
    const int size = static_cast<int>(min(count - first, int64_t(kStaged)));
    __syncthreads();  // what was staged before has been looked at
    for (int k = threadIdx.x; k < size; k += kThreads) {
      const int64_t i = image.keep[first + k];
      s.staged.box[k] = image.boxes[i];
      s.staged.group[k] = image.group(i);
    }
    __syncthreads();
#pragma unroll 1
    for (int k = share; k < size && !hit; k += kShares)
      hit = s.staged.suppresses(k, b, area, group, image.iou_threshold);
  }
  return hit;
}

// s.suppressors of the batch: bit i of j if box i would suppress box j, i < j.
template <typename score_t>
__device__ __forceinline__ void compare_batch(float iou_threshold, Shared<score_t>& s) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = threadIdx.x / 32; j < kBatch; j += kWarps) {
    const float4 b = s.batch.box[j];
    const int64_t group = s.batch.group[j];
    const float area = area_of(Box{b.x, b.y, b.z, b.w});
    Word before = 0;
    for (int first = 0; first < kBatch; first += 32) {
      const int i = first + lane;
      const bool hit = i < j && s.batch.suppresses(i, b, area, group, iou_threshold);
      before |= Word(__ballot_sync(kAllLanes, hit)) << first;
    }
    if (lane == 0) s.suppressors[j] = before;
  }
}

// Those of `alive` that stay: which no box suppresses that stays itself. As that depends on smaller
// numbers alone, each pass settles at least one more box, and mostly all.
template <typename score_t>
__device__ __forceinline__ Word resolve(Word alive, const Shared<score_t>& s) {
  const int lane = threadIdx.x % 32;
  const Word first = s.suppressors[lane], second = s.suppressors[lane + 32];
  Word stay = alive, previous;
  do {
    previous = stay;
    const Word low = __ballot_sync(kAllLanes, (first & stay) == 0);
    const Word high = __ballot_sync(kAllLanes, (second & stay) == 0);
    stay = alive & (low | high << 32);
  } while (stay != previous);
  return stay;
}

// Goes through the sorted chunk until D boxes are kept; returns how many are.
template <typename score_t, typename label_t>
__device__ __forceinline__ int64_t keep_chunk(const Image<score_t, label_t>& image, int num_ranks,
                                              int64_t count, int64_t D, Shared<score_t>& s) {
  const int c = threadIdx.x;
  int64_t group = 0;
  float4 box{};
  // The boxes of a batch are fetched while the one before is looked at.
  const auto fetch = [&](int rank) {
    if (c >= kBatch || rank >= num_ranks) return;
    const int64_t index = index_of(s.ranks[rank]);
    box = image.boxes[index];
    group = image.group(index);
  };
  fetch(c);
  for (int first = 0; first < num_ranks && count < D; first += kBatch) {
    if (c < kBatch) {
      s.batch.box[c] = box;  // beyond the last one: any box, which is not alive
      s.batch.group[c] = group;
    }
    if (c < kBatch / 32) s.suppressed[c] = 0;
    __syncthreads();
    fetch(first + kBatch + c);
    compare_batch(image.iou_threshold, s);
    const unsigned hits = __ballot_sync(kAllLanes, is_suppressed(image, count, s));
    if (c % 32 == 0 && hits) atomicOr(&s.suppressed[c % kBatch / 32], hits);
    __syncthreads();

    const int size = min(num_ranks - first, kBatch);
    const Word all = ~Word(0) >> (kBatch - size);
    const Word suppressed = s.suppressed[0] | Word(s.suppressed[1]) << 32;
    const Word stay = resolve(all & ~suppressed, s);  // by each warp for itself
    if (c < kBatch && (stay >> c & 1)) {
      const int64_t at = count + __popcll(stay & ((Word(1) << c) - 1));
      if (at < D) image.keep[at] = index_of(s.ranks[first + c]);
      if (at < kResident<score_t>) {
        s.kept.box[at] = s.batch.box[c];
        s.kept.group[at] = s.batch.group[c];
      }
    }
    count += __popcll(stay);
    __syncthreads();
  }
  return min(count, D);
}

template <typename score_t, typename label_t>
__global__ void __launch_bounds__(kThreads, 1)
    padded_batched_nms_kernel(const Args<score_t, label_t> a) {
  using R = Rank<score_t>;
  __shared__ Shared<score_t> s;
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const Image<score_t, label_t> image(a, n);
    // All ranks but 0, if they make one chunk at most; else from the lowest to the highest there
    // is.
    R lowest = 1, highest = ~R(0);
    if (a.K > kChunk) {
      find_range(image, s);
      lowest = R(s.lowest + 1) << 32;  // was found less 1
      highest = s.highest ? R(s.highest) << 32 | 0xffffffffu : R(0);
    }
    int64_t count = 0;
    while (highest >= lowest && count < a.D) {
      const R chunk = a.K > kChunk ? find_chunk(image, lowest, highest, s) : lowest;
      const int num_ranks = sort_chunk(image, chunk, highest, s);
      count = keep_chunk(image, num_ranks, count, a.D, s);
      highest = chunk - 1;
    }
    for (int64_t k = count + threadIdx.x; k < a.D; k += kThreads) image.keep[k] = -1;
    if (threadIdx.x == 0) a.counts[n] = count;
    __syncthreads();  // the next image starts to write to s
  }
}

const ListKernel kListed[] = {
    {"padded_batched_nms fp32", &padded_batched_nms_kernel<float, int64_t>, kThreads},
};

std::tuple<Tensor, Tensor> padded_batched_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                   const Tensor& labels, double iou_threshold,
                                                   int64_t max_detections, bool class_agnostic) {
  constexpr const char* kOp = "padded_batched_nms";
  check_candidates(kOp, boxes, {{"scores", scores}, {"labels", labels}}, max_detections);
  Tensor b = torch::stable::contiguous(boxes);
  if (!is_vector_aligned(b.const_data_ptr())) b = torch::stable::clone(b);
  const Tensor s = torch::stable::contiguous(scores);
  const Tensor l = torch::stable::contiguous(labels);
  const int64_t N = b.size(0), K = b.size(1), D = max_detections;
  Tensor keep = torch::stable::new_empty(b, {N, D}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(b, {N}, ScalarType::Long);
  dispatch_candidates(kOp, s, l, [&](auto score, auto label) {
    using score_t = decltype(score);
    using label_t = decltype(label);
    if (N == 0) return;
    const Args<score_t, label_t> args{reinterpret_cast<const float4*>(b.const_data_ptr<float>()),
                                      s.const_data_ptr<score_t>(),
                                      l.const_data_ptr<label_t>(),
                                      keep.mutable_data_ptr<int64_t>(),
                                      counts.mutable_data_ptr<int64_t>(),
                                      N,
                                      K,
                                      D,
                                      static_cast<float>(iou_threshold),
                                      class_agnostic};
    launch(&padded_batched_nms_kernel<score_t, label_t>, grid_for(N), dim3(kThreads), 0, b, args);
  });
  return {keep, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("padded_batched_nms", TORCH_BOX(&padded_batched_nms_cuda));
}

}  // namespace fcos_ext
