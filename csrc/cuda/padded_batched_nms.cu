#include "kernel_table.cuh"
#include "launch.cuh"
#include "padded_batched_nms.cuh"
#include "padded_batched_nms_chunks.cuh"

namespace fcos_ext {
namespace {

using namespace padded;

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
      if (s.highest) lowest = R(s.lowest + 1) << 32;  // was found less 1
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

}  // namespace

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

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("padded_batched_nms", TORCH_BOX(&padded_batched_nms_cuda));
}

}  // namespace fcos_ext
