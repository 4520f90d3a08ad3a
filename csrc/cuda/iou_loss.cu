#include "../iou_loss.h"
#include "../iou_loss_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "reduction.cuh"
#include "row_access.cuh"

namespace fcos_ext {
namespace {

template <typename acc>
struct Args {
  ConstRows pred, target, weights;  // weights.data may be null
  Integers labels;                  // and so may these
  int64_t rows;
  acc smooth, eps;
};

template <typename acc>
struct ForwardArgs {
  Args<acc> in;
  Reduction reduction;
  MutableRows losses;     // kNone
  const acc* normalizer;  // kSum; may be null
  acc *out, *divisor;
  acc* partials;  // [2, tiles]: sum of the losses, number of rows that count
  unsigned* ticket;
};

template <typename acc>
struct BackwardArgs {
  Args<acc> in;
  ConstRows grads;                   // of each loss; or, if null,
  const acc *grad_of_sum, *divisor;  // of the sum
  MutableRows out;
};

template <IoUKind kKind, typename acc>
__device__ __forceinline__ BoxLoss<acc> loss_of_row(const Args<acc>& a, int64_t row) {
  return box_loss<kKind>(load_ltrb<acc>(a.pred, row), load_ltrb<acc>(a.target, row), a.smooth,
                         a.eps);
}

// out = sum / divisor, by one block.
template <typename acc>
__device__ __forceinline__ void finish(const ForwardArgs<acc>& a, int64_t tiles) {
  const double sum = sum_partials<kRowThreads>(a.partials, tiles);
  const double count = sum_partials<kRowThreads>(a.partials + tiles, tiles);
  if (threadIdx.x != 0) return;
  acc divisor = 1;
  if (a.reduction == Reduction::kMean) divisor = static_cast<acc>(count > 1 ? count : 1);
  if (a.normalizer)
    divisor = *a.normalizer > acc(kNormalizerFloor) ? *a.normalizer : acc(kNormalizerFloor);
  *a.divisor = divisor;
  *a.out = static_cast<acc>(sum / divisor);
}

template <IoUKind kKind, typename acc>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    iou_loss_kernel(const ForwardArgs<acc> a) {
  const int64_t tiles = num_row_tiles(a.in.rows);
  const bool reduce = a.reduction != Reduction::kNone;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kRowTile + threadIdx.x;
    const unsigned counting = rows_that_count(a.in.labels, a.in.rows, first);
    acc sum = 0;
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t row = first + k * kRowThreads;
      acc loss = 0;
      if (counting >> k & 1u) {
        loss = loss_of_row<kKind>(a.in, row).loss;
        if (a.in.weights.data) loss *= load_value<acc>(a.in.weights, row);
      }
      sum += loss;
      if (!reduce && row < a.in.rows) store_value(a.losses, row, loss);
    }
    if (!reduce) continue;
    sum = block_sum<kRowThreads>(sum);
    const int count = block_sum<kRowThreads>(__popc(counting));
    if (threadIdx.x != 0) continue;
    a.partials[tile] = sum;
    a.partials[tiles + tile] = static_cast<acc>(count);
  }
  if (!reduce) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.divisor = acc(1);
    return;
  }
  if (is_last_block(a.ticket)) finish(a, tiles);
}

template <IoUKind kKind, typename acc>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    iou_loss_backward_kernel(const BackwardArgs<acc> a) {
  const int64_t tiles = num_row_tiles(a.in.rows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kRowTile + threadIdx.x;
    const unsigned counting = rows_that_count(a.in.labels, a.in.rows, first);
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t row = first + k * kRowThreads;
      if (row >= a.in.rows) break;
      Ltrb<acc> g{0, 0, 0, 0};
      if (counting >> k & 1u) {
        g = loss_of_row<kKind>(a.in, row).gradient;
        // Late, and for each row again: held in a register it would have to be spilled.
        acc factor = a.grads.data ? load_value<acc>(a.grads, row) : *a.grad_of_sum / *a.divisor;
        if (a.in.weights.data) factor *= load_value<acc>(a.in.weights, row);
        g = {g.l * factor, g.t * factor, g.r * factor, g.b * factor};
      }
      store_ltrb(a.out, row, g);
    }
  }
}

template <IoUKind kKind>
struct List {
  ListKernel forward{"iou_loss", &iou_loss_kernel<kKind, float>, kRowThreads};
  ListKernel backward{"iou_loss gradient", &iou_loss_backward_kernel<kKind, float>, kRowThreads};
};
const List<IoUKind::kGIoU> kListed;

// Tensors that must live until the launch, and what the kernels take.
struct Inputs {
  Input pred, target;
  std::optional<Input> weights;
  std::optional<Tensor> labels;
  int64_t rows;

  Inputs(const Tensor& p, const Tensor& t, const std::optional<Tensor>& w,
         const std::optional<Tensor>& l)
      : pred(p, p.dim() - 1), target(t, p.dim() - 1), rows(p.numel() / 4) {
    if (w) weights.emplace(*w, p.dim() - 1);
    if (l) labels = torch::stable::contiguous(*l);
  }

  template <typename acc>
  Args<acc> args(double smooth, double eps) const {
    return {pred.rows,
            target.rows,
            weights ? weights->rows : ConstRows{},
            labels ? integers_of(*labels) : Integers{},
            rows,
            static_cast<acc>(smooth),
            static_cast<acc>(eps)};
  }
};

std::tuple<Tensor, Tensor> iou_loss_cuda(const Tensor& pred, const Tensor& target,
                                         const std::optional<Tensor>& weights,
                                         const std::optional<Tensor>& labels,
                                         const std::optional<Tensor>& normalizer, int64_t kind,
                                         int64_t reduction, double smooth, double eps) {
  check_iou_loss("iou_loss", pred, target, weights, labels, kind);
  check_reduction("iou_loss", reduction, pred, normalizer);
  const bool reduce = Reduction(reduction) != Reduction::kNone;
  if (pred.numel() == 0) {
    Tensor divisor = torch::stable::new_empty(pred, {}, acc_dtype(pred));
    torch::stable::fill_(divisor, 1.0);
    if (!reduce) return {torch::stable::new_empty(pred, batch_sizes(pred)), divisor};
    return {torch::stable::new_zeros(pred, {}, acc_dtype(pred)), divisor};
  }
  const Inputs inputs(pred, target, weights, labels);
  Tensor out = reduce ? torch::stable::new_empty(pred, {}, acc_dtype(pred))
                      : torch::stable::new_empty(pred, batch_sizes(pred));
  Tensor divisor = torch::stable::new_empty(pred, {}, acc_dtype(pred));
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    const int64_t tiles = num_row_tiles(inputs.rows);
    ForwardArgs<acc> args{};
    args.in = inputs.args<acc>(smooth, eps);
    args.reduction = Reduction(reduction);
    args.divisor = divisor.mutable_data_ptr<acc>();
    std::optional<Tensor> partials, ticket;
    if (reduce) {
      partials = torch::stable::new_empty(pred, {2 * tiles}, acc_dtype(pred));
      ticket = new_ticket(pred);
      args.normalizer = normalizer ? normalizer->const_data_ptr<acc>() : nullptr;
      args.out = out.mutable_data_ptr<acc>();
      args.partials = partials->mutable_data_ptr<acc>();
      args.ticket = static_cast<unsigned*>(ticket->mutable_data_ptr());
    } else {
      args.losses = *find_rows(out.mutable_data_ptr(), out, out.dim());
    }
    dispatch_kind(IoUKind(kind), [&](auto k) {
      launch(&iou_loss_kernel<k.value, acc>, grid_for(tiles), dim3(kRowThreads), 0, pred, args);
    });
  });
  return {out, divisor};
}

Tensor iou_loss_backward_cuda(const Tensor& grad, const Tensor& pred, const Tensor& target,
                              const std::optional<Tensor>& weights,
                              const std::optional<Tensor>& labels,
                              const std::optional<Tensor>& divisor, int64_t kind, double smooth,
                              double eps) {
  check_iou_loss("iou_loss_backward", pred, target, weights, labels, kind);
  check_iou_loss_grad("iou_loss_backward", grad, pred, divisor);
  Output out(pred, pred.dim() - 1);
  if (pred.numel() == 0) return out.result;
  const Inputs inputs(pred, target, weights, labels);
  std::optional<Input> grads;
  if (!divisor) grads.emplace(grad, grad.dim());
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    BackwardArgs<acc> args{};
    args.in = inputs.args<acc>(smooth, eps);
    args.out = out.rows;
    if (grads) {
      args.grads = grads->rows;
    } else {
      args.grad_of_sum = grad.const_data_ptr<acc>();
      args.divisor = divisor->const_data_ptr<acc>();
    }
    const dim3 grid = grid_for(num_row_tiles(inputs.rows));
    dispatch_kind(IoUKind(kind), [&](auto k) {
      launch(&iou_loss_backward_kernel<k.value, acc>, grid, dim3(kRowThreads), 0, pred, args);
    });
  });
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("iou_loss", TORCH_BOX(&iou_loss_cuda));
  m.impl("iou_loss_backward", TORCH_BOX(&iou_loss_backward_cuda));
}

}  // namespace fcos_ext
