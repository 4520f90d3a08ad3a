#include "../box_and_centerness_loss.h"
#include "../box_and_centerness_loss_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "reduction.cuh"
#include "row_access.cuh"

namespace fcos_ext {
namespace {

template <typename acc>
struct Args {
  ConstRows pred, centerness, target, centerness_target;  // the last one's data may be null
  Integers labels;
  int64_t rows;
  bool weighted;
  acc smooth, eps;
};

template <typename acc>
struct ForwardArgs {
  Args<acc> in;
  acc *box, *centerness, *weight;
  int64_t* num_pos;
  acc* partials;  // [4, tiles]: of these four
  unsigned* ticket;
};

template <typename acc>
struct BackwardArgs {
  Args<acc> in;
  const acc *grad_box, *grad_centerness;
  MutableRows by_pred, by_centerness;
};

template <typename acc>
__device__ __forceinline__ acc centerness_target_of(const Args<acc>& a, int64_t row,
                                                    const Ltrb<acc>& target) {
  return a.centerness_target.data ? load_value<acc>(a.centerness_target, row)
                                  : centerness_of(target.l, target.t, target.r, target.b);
}

template <IoUKind kKind, typename acc>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    box_and_centerness_loss_kernel(const ForwardArgs<acc> a) {
  const int64_t tiles = num_row_tiles(a.in.rows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kRowTile + threadIdx.x;
    const unsigned counting = rows_that_count(a.in.labels, a.in.rows, first);
    acc box = 0, centerness = 0, weight = 0;
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      if (!(counting >> k & 1u)) continue;
      const int64_t row = first + k * kRowThreads;
      const Ltrb<acc> target = load_ltrb<acc>(a.in.target, row);
      const acc y = centerness_target_of(a.in, row, target);
      const acc w = a.in.weighted ? y : acc(1);
      centerness += cross_entropy(load_value<acc>(a.in.centerness, row), y).loss;
      weight += w;
      box +=
          w * box_loss<kKind>(load_ltrb<acc>(a.in.pred, row), target, a.in.smooth, a.in.eps).loss;
    }
    box = block_sum<kRowThreads>(box);
    centerness = block_sum<kRowThreads>(centerness);
    weight = block_sum<kRowThreads>(weight);
    const int count = block_sum<kRowThreads>(__popc(counting));
    if (threadIdx.x != 0) continue;
    a.partials[tile] = box;
    a.partials[tiles + tile] = centerness;
    a.partials[2 * tiles + tile] = weight;
    a.partials[3 * tiles + tile] = static_cast<acc>(count);
  }
  if (!is_last_block(a.ticket)) return;
  const double box = sum_partials<kRowThreads>(a.partials, tiles);
  const double centerness = sum_partials<kRowThreads>(a.partials + tiles, tiles);
  const double weight = sum_partials<kRowThreads>(a.partials + 2 * tiles, tiles);
  const double count = sum_partials<kRowThreads>(a.partials + 3 * tiles, tiles);
  if (threadIdx.x != 0) return;
  *a.box = static_cast<acc>(box);
  *a.centerness = static_cast<acc>(centerness);
  *a.weight = static_cast<acc>(weight);
  *a.num_pos = static_cast<int64_t>(count);  // exact: whole numbers, in double
}

template <IoUKind kKind, typename acc>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    box_and_centerness_loss_backward_kernel(const BackwardArgs<acc> a) {
  const int64_t tiles = num_row_tiles(a.in.rows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kRowTile + threadIdx.x;
    const unsigned counting = rows_that_count(a.in.labels, a.in.rows, first);
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t row = first + k * kRowThreads;
      if (row >= a.in.rows) break;
      Ltrb<acc> g{0, 0, 0, 0};
      acc by_centerness = 0;
      if (counting >> k & 1u) {
        const Ltrb<acc> target = load_ltrb<acc>(a.in.target, row);
        g = box_loss<kKind>(load_ltrb<acc>(a.in.pred, row), target, a.in.smooth, a.in.eps).gradient;
        const acc y = centerness_target_of(a.in, row, target);
        const acc factor = a.in.weighted ? *a.grad_box * y : *a.grad_box;
        g = {g.l * factor, g.t * factor, g.r * factor, g.b * factor};
        by_centerness =
            *a.grad_centerness * cross_entropy(load_value<acc>(a.in.centerness, row), y).derivative;
      }
      store_ltrb(a.by_pred, row, g);
      store_value(a.by_centerness, row, by_centerness);
    }
  }
}

const ListKernel kListed[] = {
    {"box_and_centerness_loss", &box_and_centerness_loss_kernel<IoUKind::kGIoU, float>,
     kRowThreads},
    {"box_and_centerness_loss gradient",
     &box_and_centerness_loss_backward_kernel<IoUKind::kGIoU, float>, kRowThreads},
};

template <typename acc>
Args<acc> arguments(const BoxAndCenternessInputs& in, bool weighted, double smooth, double eps) {
  return {in.pred.rows,
          in.centerness.rows,
          in.target.rows,
          in.centerness_target ? in.centerness_target->rows : ConstRows{},
          integers_of(in.labels),
          in.rows,
          weighted,
          static_cast<acc>(smooth),
          static_cast<acc>(eps)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> box_and_centerness_loss_cuda(
    const Tensor& pred, const Tensor& centerness, const Tensor& target, const Tensor& labels,
    const std::optional<Tensor>& centerness_target, int64_t kind, bool weighted, double smooth,
    double eps) {
  check_box_and_centerness_loss("box_and_centerness_loss", pred, centerness, target, labels,
                                centerness_target, kind);
  const auto scalar = [&](ScalarType dtype) {
    return pred.numel() == 0 ? torch::stable::new_zeros(pred, {}, dtype)
                             : torch::stable::new_empty(pred, {}, dtype);
  };
  Tensor box = scalar(acc_dtype(pred)), entropy = scalar(acc_dtype(pred));
  Tensor weight = scalar(acc_dtype(pred)), num_pos = scalar(ScalarType::Long);
  if (pred.numel() == 0) return {box, entropy, weight, num_pos};
  const BoxAndCenternessInputs in(pred, centerness, target, labels, centerness_target);
  const int64_t tiles = num_row_tiles(in.rows);
  Tensor partials = torch::stable::new_empty(pred, {4 * tiles}, acc_dtype(pred));
  Tensor ticket = new_ticket(pred);
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    const ForwardArgs<acc> args{arguments<acc>(in, weighted, smooth, eps),
                                box.mutable_data_ptr<acc>(),
                                entropy.mutable_data_ptr<acc>(),
                                weight.mutable_data_ptr<acc>(),
                                num_pos.mutable_data_ptr<int64_t>(),
                                partials.mutable_data_ptr<acc>(),
                                static_cast<unsigned*>(ticket.mutable_data_ptr())};
    dispatch_kind(IoUKind(kind), [&](auto k) {
      launch(&box_and_centerness_loss_kernel<k.value, acc>, grid_for(tiles), dim3(kRowThreads), 0,
             pred, args);
    });
  });
  return {box, entropy, weight, num_pos};
}

std::tuple<Tensor, Tensor> box_and_centerness_loss_backward_cuda(
    const Tensor& grad_box, const Tensor& grad_centerness, const Tensor& pred,
    const Tensor& centerness, const Tensor& target, const Tensor& labels,
    const std::optional<Tensor>& centerness_target, int64_t kind, bool weighted, double smooth,
    double eps) {
  constexpr const char* kOp = "box_and_centerness_loss_backward";
  check_box_and_centerness_loss(kOp, pred, centerness, target, labels, centerness_target, kind);
  check_scalar(kOp, "grad_box", grad_box, "pred", pred);
  check_scalar(kOp, "grad_centerness", grad_centerness, "pred", pred);
  Output by_pred(pred, pred.dim() - 1), by_centerness(centerness, centerness.dim());
  if (pred.numel() == 0) return {by_pred.result, by_centerness.result};
  const BoxAndCenternessInputs in(pred, centerness, target, labels, centerness_target);
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    const BackwardArgs<acc> args{
        arguments<acc>(in, weighted, smooth, eps), grad_box.const_data_ptr<acc>(),
        grad_centerness.const_data_ptr<acc>(), by_pred.rows, by_centerness.rows};
    dispatch_kind(IoUKind(kind), [&](auto k) {
      launch(&box_and_centerness_loss_backward_kernel<k.value, acc>,
             grid_for(num_row_tiles(in.rows)), dim3(kRowThreads), 0, pred, args);
    });
  });
  return {by_pred.finish(), by_centerness.finish()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("box_and_centerness_loss", TORCH_BOX(&box_and_centerness_loss_cuda));
  m.impl("box_and_centerness_loss_backward", TORCH_BOX(&box_and_centerness_loss_backward_cuda));
}

}  // namespace fcos_ext
