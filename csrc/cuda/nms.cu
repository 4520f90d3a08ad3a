#include <algorithm>
#include <array>

#include "../nms_args.h"
#include "kernel_table.cuh"
#include "nms_kernels.cuh"

namespace fcos_ext {
namespace {

using namespace bands;

template <bool kGrouped>
void launch_bands(const Args& a, const Tensor& on) {
  for (int64_t start = 0; start < a.n; start += kBand) {
    const int64_t size = std::min<int64_t>(kBand, a.n - start);
    const int tiles = static_cast<int>((size + kTile - 1) / kTile);
    if (start > 0) {
      // No more can have been kept than there were ranks, or than are wanted.
      const int64_t kept = std::min(start, a.limit);
      dim3 grid = grid_for(std::min<int64_t>(64, (kept + kThreads - 1) / kThreads));
      grid.y = static_cast<unsigned>((size + kThreads - 1) / kThreads);
      launch(&suppress_kernel<kGrouped>, grid, dim3(kThreads), 0, on, a, start);
    }
    const int pairs = tiles * (tiles + 1) / 2;
    launch(&mask_kernel<kGrouped>, grid_for(pairs), dim3(kThreads), 0, on, a, start, pairs);
    launch(&scan_kernel, dim3(1), dim3(kScanThreads), 0, on, a, start, tiles);
  }
}

const ListKernel kListed[] = {
    {"nms start fp32", &start_kernel<float>, kThreads},
    {"nms suppress", &suppress_kernel<false>, kThreads},
    {"nms suppress, grouped", &suppress_kernel<true>, kThreads},
    {"nms mask", &mask_kernel<false>, kThreads},
    {"nms mask, grouped", &mask_kernel<true>, kThreads},
    {"nms scan", &scan_kernel, kScanThreads},
};

struct Sorted {
  Tensor values, indices;
};

// By falling value, of equal ones the lower index first. The headers of early versions of torch do
// not have torch::stable::sort.
Sorted sort_falling(const Tensor& t) {
  std::array<StableIValue, 4> stack = {
      torch::stable::detail::from(t), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The one value on the host: waits for the device.
int64_t value_of(const Tensor& scalar) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return *torch::stable::to(scalar, cpu).const_data_ptr<int64_t>();
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
                double iou_threshold, int64_t max_detections) {
  check_nms(boxes, scores, groups);
  Tensor b = float_boxes(boxes);
  if (!is_vector_aligned(b.const_data_ptr())) b = torch::stable::clone(b);
  const int64_t n = b.size(0), limit = keep_limit(n, max_detections);
  Tensor keep = torch::stable::new_empty(b, {limit}, ScalarType::Long);
  if (limit == 0) return keep;

  const Sorted sorted = sort_falling(scores);
  const int64_t padded = (n + kTile - 1) / kTile * kTile;
  const int64_t mask_words = std::min<int64_t>(padded / kTile, kBandTiles) * kBand;
  Tensor mask = torch::stable::new_empty(b, {mask_words}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(b, {padded / 32}, ScalarType::Int);
  Tensor count = torch::stable::new_empty(b, {}, ScalarType::Long);
  std::optional<Tensor> g;
  if (groups) g = torch::stable::contiguous(*groups);

  const Args args = {static_cast<const Box*>(b.const_data_ptr()),
                     g ? g->const_data_ptr<int64_t>() : nullptr,
                     sorted.indices.const_data_ptr<int64_t>(),
                     n,
                     static_cast<float>(iou_threshold),
                     limit,
                     static_cast<unsigned*>(removed.mutable_data_ptr()),
                     static_cast<Word*>(mask.mutable_data_ptr()),
                     keep.mutable_data_ptr<int64_t>(),
                     count.mutable_data_ptr<int64_t>()};
  dispatch_floating(sorted.values.scalar_type(), "nms", [&](auto zero) {
    using scalar_t = decltype(zero);
    launch(&start_kernel<scalar_t>, grid_for((padded + kThreads - 1) / kThreads), dim3(kThreads), 0,
           b, sorted.values.const_data_ptr<scalar_t>(), n, padded, args.removed, args.count);
  });
  if (g)
    launch_bands<true>(args, b);
  else
    launch_bands<false>(args, b);
  return torch::stable::narrow(keep, 0, 0, value_of(count));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) { m.impl("nms", TORCH_BOX(&nms_cuda)); }

}  // namespace fcos_ext
