#include <tuple>

#include "../soft_nms.h"
#include "../soft_nms_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace {

// One block for each image: it selects the best box, lets all others decay, and so on. Scores are
// in shared memory if there are not more than kResident.
#ifdef FCOS_SIMT
constexpr int kThreads = 64;
constexpr int kResident = 48;
#else
constexpr int kThreads = 1024;
constexpr int kResident = 8192;
#endif
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Args {
  const float4* boxes;    // [N, K]
  const float* scores;    // [N, K]
  const int64_t* groups;  // [N, K] or null
  float* left;            // [N, K], where scores do not fit into shared memory
  int64_t* keep;          // [N, D]
  float* kept_scores;     // [N, D]
  int64_t* counts;        // [N]
  int64_t N, K, D;
  SoftNms rule;
};

// Live score and index in one number, the higher the better, of equal scores the lower index.
using Best = unsigned long long;

__device__ __forceinline__ Best best_of(float live, int i) {
  return Best(static_cast<unsigned>(bits_of(live))) << 32 | ~static_cast<unsigned>(i);
}

// The highest of the block, for all threads. Calls in a row need different `maxima`.
__device__ __forceinline__ Best block_best(Best best, Best (&maxima)[kWarps]) {
  for (int offset = 16; offset > 0; offset /= 2)
    best = max(best, __shfl_xor_sync(kAllLanes, best, offset));
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = best;
  __syncthreads();
  best = maxima[threadIdx.x % kWarps];
  for (int offset = 16; offset > 0; offset /= 2)
    best = max(best, __shfl_xor_sync(kAllLanes, best, offset));
  return best;
}

template <bool kGaussian>
__global__ void __launch_bounds__(kThreads, 1) soft_nms_kernel(const Args a) {
  __shared__ float resident[kResident];
  __shared__ Best maxima[2][kWarps];
  const int K = static_cast<int>(a.K);
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const float4* boxes = a.boxes + n * a.K;
    const int64_t* groups = a.groups ? a.groups + n * a.K : nullptr;
    float* left = K <= kResident ? resident : a.left + n * a.K;  // a thread uses its own alone
    Best best = 0;
    for (int i = threadIdx.x; i < K; i += kThreads) {
      const float score = a.rule.live(a.scores[n * a.K + i]);
      left[i] = score;
      best = max(best, best_of(score, i));
    }
    int64_t count = 0;
    for (; count < a.D; ++count) {
      best = block_best(best, maxima[count % 2]);
      if (best >> 32 == 0) break;
      const int selected = static_cast<int>(~static_cast<unsigned>(best));
      if (threadIdx.x == 0) {
        a.keep[n * a.D + count] = selected;
        a.kept_scores[n * a.D + count] = __uint_as_float(static_cast<unsigned>(best >> 32));
      }
      const float4 b = __ldg(boxes + selected);
      const Box box{b.x, b.y, b.z, b.w};
      const float area = area_of(box);
      const int64_t group = groups ? groups[selected] : 0;
      best = 0;
#pragma unroll 2
      for (int i = threadIdx.x; i < K; i += kThreads) {
        float score = left[i];
        if (score == 0.0f) continue;
        if (!groups || groups[i] == group) {
          const float4 o = __ldg(boxes + i);
          const Box other{o.x, o.y, o.z, o.w};
          const float iou = iou_of(box, area, other, area_of(other));
          score = i == selected ? 0.0f : a.rule.decayed<kGaussian>(score, iou);
          left[i] = score;
        }
        best = max(best, best_of(score, i));
      }
    }
    for (int64_t k = count + threadIdx.x; k < a.D; k += kThreads) {
      a.keep[n * a.D + k] = -1;
      a.kept_scores[n * a.D + k] = 0.0f;
    }
    if (threadIdx.x == 0) a.counts[n] = count;
    __syncthreads();  // the next image starts to write to maxima
  }
}

const ListKernel kListed[] = {
    {"soft_nms linear", &soft_nms_kernel<false>, kThreads},
    {"soft_nms gaussian", &soft_nms_kernel<true>, kThreads},
};

std::tuple<Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                 const std::optional<Tensor>& groups,
                                                 double iou_threshold, double sigma,
                                                 double score_threshold, bool gaussian,
                                                 int64_t max_detections) {
  check_soft_nms(boxes, scores, groups, score_threshold, max_detections);
  Tensor b = torch::stable::contiguous(boxes);
  if (!is_vector_aligned(b.const_data_ptr())) b = torch::stable::clone(b);
  const Tensor s = torch::stable::contiguous(scores);
  const Tensor g = groups ? torch::stable::contiguous(*groups) : s;
  const int64_t N = b.size(0), K = b.size(1), D = max_detections;
  Tensor keep = torch::stable::new_empty(b, {N, D}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(b, {N, D}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(b, {N}, ScalarType::Long);
  if (N == 0) return {keep, kept_scores, counts};
  Tensor left = torch::stable::new_empty(b, {K > kResident ? N * K : 0}, ScalarType::Float);
  const Args args{reinterpret_cast<const float4*>(b.const_data_ptr<float>()),
                  s.const_data_ptr<float>(),
                  groups ? g.const_data_ptr<int64_t>() : nullptr,
                  left.mutable_data_ptr<float>(),
                  keep.mutable_data_ptr<int64_t>(),
                  kept_scores.mutable_data_ptr<float>(),
                  counts.mutable_data_ptr<int64_t>(),
                  N,
                  K,
                  D,
                  SoftNms{static_cast<float>(iou_threshold), static_cast<float>(sigma),
                          static_cast<float>(score_threshold)}};
  launch(gaussian ? &soft_nms_kernel<true> : &soft_nms_kernel<false>, grid_for(N), dim3(kThreads),
         0, b, args);
  return {keep, kept_scores, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms_cuda));
}

}  // namespace fcos_ext
