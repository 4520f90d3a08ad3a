#include "kernel_table.cuh"
#include "launch.cuh"
#include "padded_batched_nms.cuh"
#include "postprocess_best.cuh"

namespace fcos_ext {
namespace {

using namespace post;

// ---- what overlaps are computed of ----

// One block for each image: its boxes, or, if they are not too many, moved_apart().
__global__ void __launch_bounds__(post::kThreads)
    postprocess_apart_kernel(const float4* boxes, const int32_t* labels, float4* moved,
                             unsigned images, int K, int64_t max_apart) {
  __shared__ unsigned highest;  // key of a coordinate
  __shared__ unsigned present;
  const int thread = static_cast<int>(threadIdx.x);
  for (unsigned n = blockIdx.x; n < images; n += gridDim.x) {
    const float4* from = boxes + int64_t(n) * K;
    const int32_t* classes = labels + int64_t(n) * K;
    float4* to = moved + int64_t(n) * K;
    if (thread == 0) highest = present = 0;
    __syncthreads();
    unsigned key = 0, count = 0;
    for (int i = thread; i < K; i += post::kThreads) {
      const float4 b = from[i];
      const unsigned of_box = order_key(fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
      const bool is_present = classes[i] >= 0;
      key = max(key, is_present ? of_box : 0u);
      count += is_present;
    }
    atomicMax(&highest, key);
    atomicAdd(&present, count);
    __syncthreads();
    const bool apart = present > 0 && static_cast<int64_t>(present) <= max_apart;
    const float step = apart ? number_of_key(highest) + 1.0f : 0.0f;
    for (int i = thread; i < K; i += post::kThreads) {
      const float4 b = from[i];
      // Of a box that is not present nothing is asked.
      const Box box = moved_apart({b.x, b.y, b.z, b.w}, max(classes[i], 0), step);
      to[i] = make_float4(box.x0, box.y0, box.x1, box.y1);
    }
    __syncthreads();  // the next image starts to write
  }
}

// ---- results ----

struct ResultArgs {
  const float4* boxes;    // [N, K]
  const float* scores;    // [N, K]
  const int32_t* labels;  // [N, K]
  const int64_t* keep;    // [N, D]
  Numbers image_sizes, original_sizes;
  Scoring scoring;
  BoxEnds ends;
  int64_t K, D, total;
  float4* out_boxes;    // [N, D]
  float* out_scores;    // [N, D]
  int64_t* out_labels;  // [N, D]
};

__global__ void __launch_bounds__(post::kThreads) postprocess_results_kernel(const ResultArgs a) {
  for (int64_t i = int64_t(blockIdx.x) * post::kThreads + threadIdx.x; i < a.total;
       i += int64_t(gridDim.x) * post::kThreads) {
    const int64_t index = a.keep[i], n = i / a.D;
    float4 box = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float score = 0.0f;
    int64_t label = -1;
    if (index >= 0) {
      const int64_t from = n * a.K + index;
      const float scale_y = PostprocessCall::scale(a.original_sizes, a.image_sizes, 2 * n);
      const float scale_x = PostprocessCall::scale(a.original_sizes, a.image_sizes, 2 * n + 1);
      const float4 b = a.boxes[from];
      const Box result = a.ends.result({b.x, b.y, b.z, b.w}, scale_y, scale_x);
      box = make_float4(result.x0, result.y0, result.x1, result.y1);
      score = a.scoring.final_of(a.scores[from]);
      label = a.labels[from];
    }
    a.out_boxes[i] = box;
    a.out_scores[i] = score;
    a.out_labels[i] = label;
  }
}

// ---- launch ----

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Advances `tiles` and `survivors` by those that the level has.
template <typename scalar_t>
DeviceLevel device_level(const PostprocessCall& call, const PostprocessLevel& level, int64_t& tiles,
                         int64_t& survivors) {
  constexpr int kN = Vector<scalar_t>::kSize;
  DeviceLevel d{};
  d.level = level;
  d.aligned = is_vector_aligned(level.logits) && level.image_stride % kN == 0 &&
              (!level.planes || level.locations % kN == 0);
  const int64_t width = d.aligned ? kN : 1;
  const int64_t location_blocks = divide_up(level.locations, width * post::kThreads);
  const int64_t tiles_per_image = level.planes
                                      ? location_blocks * divide_up(call.classes, kPlanes)
                                      : divide_up(level.pairs, width * post::kThreads * kVectors);
  d.first_tile = static_cast<unsigned>(tiles);
  d.tiles = FastDivision(static_cast<uint32_t>(tiles_per_image));
  d.location_blocks = FastDivision(static_cast<uint32_t>(location_blocks));
  d.locations = FastDivision(static_cast<uint32_t>(level.locations));
  d.width = FastDivision(static_cast<uint32_t>(level.width));
  d.first_survivor = survivors;
  d.capacity = static_cast<int>(
      std::min<int64_t>(level.pairs, std::max<int64_t>(kCapacity, 2 * level.max_candidates)));
  tiles += call.images * tiles_per_image;
  STD_TORCH_CHECK(tiles < (int64_t(1) << 31), "postprocess: too many logits");
  survivors += d.capacity;
  return d;
}

template <typename scalar_t>
void run_on_gpu(PostprocessCall& call, const Tensor& on) {
  const int64_t N = call.images, K = call.candidates, D = call.max_detections;
  const int64_t maps = N * static_cast<int64_t>(call.levels.size());
  int64_t tiles = 0, survivors = 0;
  Args a{{},
         0,
         0,
         N,
         FastDivision(static_cast<uint32_t>(call.classes)),
         call.scoring,
         Cutoff(call.scoring)};
  for (const PostprocessLevel& level : call.levels)
    a.levels[a.num_levels++] = device_level<scalar_t>(call, level, tiles, survivors);
  a.tiles = static_cast<unsigned>(tiles);
  a.survivors_per_image = survivors;
  a.image_sizes = call.image_sizes;
  a.coding = call.coding;
  a.clip = call.clip;
  a.keep_empty = call.keep_empty;
  a.ends = call.ends;
  a.candidates = K;

  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(on, {sizes.begin(), sizes.size()}, dtype);
  };
  Tensor buffers = empty({N, survivors}, ScalarType::Long);
  Tensor counters = empty({maps * (2 + post::kBins)}, ScalarType::Int);
  Tensor boxes = empty({N, K, 4}, ScalarType::Float), scores = empty({N, K}, ScalarType::Float);
  Tensor labels = empty({N, K}, ScalarType::Int);
  a.survivors = static_cast<Rank<float>*>(buffers.mutable_data_ptr());
  a.counts = static_cast<unsigned*>(counters.mutable_data_ptr());
  a.second_counts = a.counts + maps;
  a.bins = a.second_counts + maps;
  a.dropped = static_cast<unsigned long long*>(Tensor(call.dropped).mutable_data_ptr());
  a.boxes = static_cast<float4*>(boxes.mutable_data_ptr());
  a.scores = scores.mutable_data_ptr<float>();
  a.labels = labels.mutable_data_ptr<int32_t>();
  clear(a.counts, sizeof(unsigned) * static_cast<size_t>(counters.numel()), on);
  clear(a.dropped, sizeof(*a.dropped) * static_cast<size_t>(N), on);

  launch(&postprocess_select_kernel<false, scalar_t>, grid_for(tiles), dim3(post::kThreads), 0, on,
         a);
  launch(&postprocess_select_kernel<true, scalar_t>, grid_for(tiles), dim3(post::kThreads), 0, on,
         a);
  launch(&postprocess_best_kernel<scalar_t>, grid_for(maps), dim3(padded::kThreads), 0, on, a);
  Tensor compared = boxes;
  if (call.max_apart > 0) {
    compared = empty({N, K, 4}, ScalarType::Float);
    launch(&postprocess_apart_kernel, grid_for(N), dim3(post::kThreads), 0, on, a.boxes, a.labels,
           static_cast<float4*>(compared.mutable_data_ptr()), static_cast<unsigned>(N),
           static_cast<int>(K), call.max_apart);
  }
  const auto [keep, counts] =
      padded_batched_nms_cuda(compared, scores, labels, call.iou_threshold, D, call.class_agnostic);
  call.counts = counts;
  const ResultArgs results{a.boxes,
                           a.scores,
                           a.labels,
                           keep.template const_data_ptr<int64_t>(),
                           call.image_sizes,
                           call.original_sizes,
                           call.scoring,
                           call.ends,
                           K,
                           D,
                           N * D,
                           static_cast<float4*>(Tensor(call.boxes).mutable_data_ptr()),
                           Tensor(call.scores).mutable_data_ptr<float>(),
                           Tensor(call.labels).mutable_data_ptr<int64_t>()};
  launch(&postprocess_results_kernel, grid_for(divide_up(N * D, post::kThreads)),
         dim3(post::kThreads), 0, on, results);
}

struct Cuda {
  static void run(PostprocessCall& call, const Tensor& on) {
    dispatch_floating(call.dtype, "postprocess",
                      [&](auto zero) { run_on_gpu<decltype(zero)>(call, on); });
  }
};

using torch::headeronly::BFloat16;
const ListKernel kListed[] = {
    {"postprocess select bf16", &postprocess_select_kernel<false, BFloat16>, post::kThreads},
    {"postprocess select fp32", &postprocess_select_kernel<false, float>, post::kThreads},
    {"postprocess second pass bf16", &postprocess_select_kernel<true, BFloat16>, post::kThreads},
    {"postprocess second pass fp32", &postprocess_select_kernel<true, float>, post::kThreads},
    {"postprocess best bf16", &postprocess_best_kernel<BFloat16>, padded::kThreads},
    {"postprocess best fp32", &postprocess_best_kernel<float>, padded::kThreads},
    {"postprocess apart", &postprocess_apart_kernel, post::kThreads},
    {"postprocess results", &postprocess_results_kernel, post::kThreads},
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess<Cuda>));
}

}  // namespace fcos_ext
