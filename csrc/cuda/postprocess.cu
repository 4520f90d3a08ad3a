#include "kernel_table.cuh"
#include "launch.cuh"
#include "padded_batched_nms.cuh"
#include "padded_batched_nms_chunks.cuh"
#include "postprocess_select.cuh"

namespace fcos_ext {
namespace {

using namespace post;

// ---- the best of each level, and their boxes ----

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
  const Maps& ltrb = level.ltrb;
  const int64_t from = ltrb.offset(logits.n, y, x);
  float distances[4];
#pragma unroll
  for (int side = 0; side < 4; ++side)
    distances[side] = ltrb.numbers.at<float>(from + side * ltrb.channel);
  Box box = level.grid.decode(y, x, distances[0], distances[1], distances[2], distances[3]);
  const bool finite = is_finite(box);
  if (!finite) atomicAdd(&s.dropped, 1u);
  if (a.clip)
    box = clipped(box, a.image_sizes.at<float>(2 * logits.n),
                  a.image_sizes.at<float>(2 * logits.n + 1));
  const int64_t to = logits.n * a.candidates + level.first_candidate + at;
  a.boxes[to] = make_float4(box.x0, box.y0, box.x1, box.y1);
  a.scores[to] = score_of_key(static_cast<OrderKey<float>>(rank >> 32));
  const bool kept = finite && (a.keep_empty || has_area(box));
  a.labels[to] = kept ? static_cast<int>(flat - location * a.classes.divisor) : -1;
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

// ---- results ----

struct ResultArgs {
  const float4* boxes;    // [N, K]
  const float* scores;    // [N, K]
  const int32_t* labels;  // [N, K]
  const int64_t* keep;    // [N, D]
  Numbers image_sizes, original_sizes;
  Scoring scoring;
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
      box = make_float4(b.x * scale_x, b.y * scale_y, b.z * scale_x, b.w * scale_y);
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
  a.clip = call.clip;
  a.keep_empty = call.keep_empty;
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
  const auto [keep, counts] =
      padded_batched_nms_cuda(boxes, scores, labels, call.iou_threshold, D, call.class_agnostic);
  call.counts = counts;
  const ResultArgs results{a.boxes,
                           a.scores,
                           a.labels,
                           keep.template const_data_ptr<int64_t>(),
                           call.image_sizes,
                           call.original_sizes,
                           call.scoring,
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
    {"postprocess results", &postprocess_results_kernel, post::kThreads},
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess<Cuda>));
}

}  // namespace fcos_ext
