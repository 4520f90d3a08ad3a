#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernel_table.cuh"
#include "launch.cuh"
#include "reduction.cuh"
#include "sigmoid_focal_loss_tiles.cuh"

namespace fcos_ext {
namespace {

using namespace focal;

// Resident blocks that a multiprocessor must have room for: as many as leave each thread the
// registers it needs. Not told, the compiler spills a few bytes here and there for one block more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 2;
#else
constexpr int kMostBlocks = 3;
#endif
template <Work kWork, typename scalar_t>
constexpr int kMinBlocks = sizeof(scalar_t) == 8 || kWork == Work::kEachGradient ? 2 : kMostBlocks;

template <Work kWork, typename scalar_t, typename Gamma>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kWork, scalar_t>))
    sigmoid_focal_loss_kernel(const __grid_constant__ Args<scalar_t> a, const Gamma gamma) {
  using acc = acc_t<scalar_t>;
  acc scale = acc(1);
  if constexpr (kWork == Work::kGradient) {
    if (a.only_if_not_one && *a.grad == acc(1)) return;
    scale = *a.grad;
  }
  if constexpr (kWork == Work::kGradient || kWork == Work::kSumAndGradient)
    scale /= divisor(a.normalizer);
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    int l = 0;
    while (l + 1 < a.num_levels && tile >= a.levels[l + 1].first_tile) ++l;
    const DeviceLevel<scalar_t>& level = a.levels[l];
    const unsigned t = tile - level.first_tile;
    acc sum;
    if (!level.planes)
      sum = rows_tile<kWork>(a, level, t, scale, gamma);
    else if (level.aligned)
      sum = planes_tile<kWork, Vector<scalar_t>::kSize>(a, level, t, scale, gamma);
    else
      sum = planes_tile<kWork, 1>(a, level, t, scale, gamma);
    if constexpr (sums(kWork)) {
      sum = block_sum<kThreads>(sum);
      if (threadIdx.x == 0) a.partial[tile] = sum;
    }
  }
  if constexpr (sums(kWork)) {
    if (!is_last_block(a.ticket)) return;
    const double total = sum_partials<kThreads>(a.partial, a.tiles);
    if (threadIdx.x == 0) *a.sum = static_cast<acc>(total / divisor(a.normalizer));
  }
}

// ---- launch ----

template <typename acc>
const acc* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<acc>() : nullptr;
}

// Locations of a tile whose classes are innermost: about kRowTile logits, and so that each tile
// starts at a whole vector.
int64_t rows_per_tile(int64_t C, int64_t vector_size, int64_t tile_size) {
  const int64_t step = vector_size / std::gcd(vector_size, C);
  const int64_t rows = std::min<int64_t>(tile_size / C, kMaxRows);
  return std::max(rows - rows % step, step);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The level as the kernel takes it. Advances `tiles` by the tiles that it has.
template <typename scalar_t, Work kWork>
DeviceLevel<scalar_t> device_level(const FocalCall& call, const FocalLevel& level,
                                   const Args<scalar_t>& a, int64_t& tiles) {
  constexpr int kN = Vector<scalar_t>::kSize;
  DeviceLevel<scalar_t> d{};
  d.logits = level.logits.template const_data_ptr<scalar_t>();
  bool aligned = is_vector_aligned(d.logits);
  if constexpr (kWork == Work::kEachGradient) {
    d.grads = level.grad.template const_data_ptr<scalar_t>();
    aligned = aligned && is_vector_aligned(d.grads);
  }
  if constexpr (writes(kWork)) {
    d.out = Tensor(level.out).mutable_data_ptr<scalar_t>();
    aligned = aligned && is_vector_aligned(d.out);
  }
  d.aligned = aligned && (!level.planes || level.positions % kN == 0);
  d.planes = level.planes;
  d.locations = call.images * level.positions;
  d.first_label = level.first_label;
  d.first_tile = static_cast<unsigned>(tiles);
  // Divisions within a level are of 32 bits, unless there is nothing to divide.
  STD_TORCH_CHECK((!level.planes && call.labels_per_image == level.positions) ||
                      d.locations < (int64_t(1) << 31),
                  "sigmoid_focal_loss: at most 2^31 - 1 locations in a level, got ", d.locations);
  const int64_t width = d.aligned ? kN : 1;
  d.positions = FastDivision(static_cast<uint32_t>(level.positions));
  d.vectors_per_plane = FastDivision(static_cast<uint32_t>(divide_up(level.positions, width)));
  tiles += level.planes ? divide_up(d.locations, width * kThreads) * a.chunks
                        : divide_up(d.locations, a.rows_per_tile);
  STD_TORCH_CHECK(tiles < (int64_t(1) << 31), "sigmoid_focal_loss: too many logits");
  return d;
}

template <typename scalar_t, Work kWork>
void run_on_gpu(const FocalCall& call) {
  using acc = acc_t<scalar_t>;
  constexpr int kN = Vector<scalar_t>::kSize;
  const Tensor& on = call.logits();
  Args<scalar_t> a{};
  a.labels = integers_of(call.labels);
  a.labels_per_image = call.labels_per_image;
  a.quality = pointer_or_null<acc>(call.quality);
  a.classes = FastDivision(static_cast<uint32_t>(std::max<int64_t>(call.classes, 1)));
  a.rows_per_tile = static_cast<int>(rows_per_tile(a.classes.divisor, kN, kRowTile<scalar_t>));
  a.chunks = static_cast<int>(divide_up(call.classes, kPlanes));
  a.positive_weight = static_cast<acc>(call.positive_weight);
  a.negative_weight = static_cast<acc>(call.negative_weight);
  a.normalizer = pointer_or_null<acc>(call.normalizer);
  a.grad = pointer_or_null<acc>(call.grad);
  a.only_if_not_one = call.only_if_not_one;
  int64_t tiles = 0;
  for (const FocalLevel& level : call.levels)
    if (level.logits.numel() > 0)
      a.levels[a.num_levels++] = device_level<scalar_t, kWork>(call, level, a, tiles);
  a.tiles = static_cast<unsigned>(tiles);

  Tensor sum = call.sum, partial, ticket;
  if constexpr (sums(kWork)) {
    if (tiles == 0) return clear(sum.mutable_data_ptr(), sizeof(acc), on);
    partial = torch::stable::new_empty(on, {tiles}, acc_dtype(on));
    ticket = new_ticket(on);
    a.sum = sum.mutable_data_ptr<acc>();
    a.partial = partial.mutable_data_ptr<acc>();
    a.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
  }
  if (tiles == 0) return;
  const auto start = [&](auto gamma) {
    launch(&sigmoid_focal_loss_kernel<kWork, scalar_t, decltype(gamma)>, grid_for(tiles),
           dim3(kThreads), 0, on, a, gamma);
  };
  // The sums, which training runs on, are compiled for the usual gamma.
  if constexpr (!std::is_same_v<scalar_t, double> && kWork != Work::kEach &&
                kWork != Work::kEachGradient)
    if (call.gamma == 2.0) return start(GammaTwo{});
  start(GammaAny{call.gamma});
}

struct Cuda {
  template <Work kWork>
  static void run(const FocalCall& call) {
    dispatch_floating(call.logits().scalar_type(), "sigmoid_focal_loss",
                      [&](auto zero) { run_on_gpu<decltype(zero), kWork>(call); });
  }
};

using torch::headeronly::BFloat16;
const ListKernel kListed[] = {
    {"sigmoid_focal_loss sum bf16", &sigmoid_focal_loss_kernel<Work::kSum, BFloat16, GammaTwo>,
     kThreads},
    {"sigmoid_focal_loss sum and gradient bf16",
     &sigmoid_focal_loss_kernel<Work::kSumAndGradient, BFloat16, GammaTwo>, kThreads},
    {"sigmoid_focal_loss gradient bf16",
     &sigmoid_focal_loss_kernel<Work::kGradient, BFloat16, GammaTwo>, kThreads},
    {"sigmoid_focal_loss sum fp32", &sigmoid_focal_loss_kernel<Work::kSum, float, GammaTwo>,
     kThreads},
    {"sigmoid_focal_loss sum and gradient fp32",
     &sigmoid_focal_loss_kernel<Work::kSumAndGradient, float, GammaTwo>, kThreads},
    {"sigmoid_focal_loss gradient fp32",
     &sigmoid_focal_loss_kernel<Work::kGradient, float, GammaTwo>, kThreads},
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) { FCOS_IMPLEMENT_FOCAL_OPS(m, Cuda); }

}  // namespace fcos_ext
