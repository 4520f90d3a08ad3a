#include "../iou_loss.h"

#include <vector>

#include "../iou_loss_args.h"
#include "row_blocks.h"

namespace fcos_ext {
namespace {

// What forward and backward read.
struct Inputs {
  Input pred, target;
  std::optional<Input> weights;
  std::optional<Tensor> labels_tensor;
  Integers labels;
  int64_t rows;

  Inputs(const Tensor& p, const Tensor& t, const std::optional<Tensor>& w,
         const std::optional<Tensor>& l)
      : pred(p, p.dim() - 1), target(t, p.dim() - 1), labels{}, rows(p.numel() / 4) {
    if (w) weights.emplace(*w, p.dim() - 1);
    if (!l) return;
    labels_tensor = torch::stable::contiguous(*l);
    labels = integers_of(*labels_tensor);
  }
};

template <typename acc>
struct Columns {
  LtrbColumns<acc> pred, target;
  Column<acc> weights;
};

// Calls body(rows, n, columns) with the inputs of the rows of [begin, end) that count.
template <typename acc, typename Body>
FCOS_INLINE void for_each_block(const Inputs& inputs, int64_t begin, int64_t end,
                                const Body& body) {
  Columns<acc> columns;
  std::fill_n(columns.weights.values, kRowBlock, acc(1));
  for_each_row_block(inputs.labels, kAnyClass, begin, end, [&](const int64_t* rows, int n) {
    gather(inputs.pred.rows, rows, n, columns.pred);
    gather(inputs.target.rows, rows, n, columns.target);
    if (inputs.weights) gather(inputs.weights->rows, rows, n, columns.weights);
    body(rows, n, columns);
  });
}

struct Partial {
  double sum = 0;
  int64_t count = 0;
};

template <typename acc>
Partial reduce(const Inputs& inputs, IoUKind kind, acc smooth, acc eps) {
  std::vector<Partial> partials(num_row_tiles(inputs.rows));
  for_each_row_tile(inputs.rows, [&](int64_t begin, int64_t end, int64_t tile) {
    Partial partial;
    for_each_block<acc>(inputs, begin, end, [&](const int64_t*, int n, const Columns<acc>& c) {
      dispatch_kind(kind, [&](auto k) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; ++i)
          sum += box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).loss * c.weights[i];
        partial.sum += sum;
      });
      partial.count += n;
    });
    partials[tile] = partial;
  });
  Partial total;
  for (const Partial& partial : partials) {
    total.sum += partial.sum;
    total.count += partial.count;
  }
  return total;
}

template <typename acc>
void each_loss(const Inputs& inputs, IoUKind kind, acc smooth, acc eps, const MutableRows& out) {
  for_each_row_tile(inputs.rows, [&](int64_t begin, int64_t end, int64_t) {
    Column<acc> losses;
    for_each_block<acc>(inputs, begin, end, [&](const int64_t* rows, int n, const auto& c) {
      dispatch_kind(kind, [&](auto k) {
        for (int i = 0; i < n; ++i)
          losses[i] = box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).loss * c.weights[i];
      });
      scatter(losses, rows, n, out);
    });
  });
}

// out = gradient of each row's loss, times scale, times grads[row] if that is given.
template <typename acc>
void each_gradient(const Inputs& inputs, IoUKind kind, acc smooth, acc eps,
                   const std::optional<Input>& grads, acc scale, const MutableRows& out) {
  for_each_row_tile(inputs.rows, [&](int64_t begin, int64_t end, int64_t) {
    LtrbColumns<acc> gradients;
    Column<acc> factors;
    std::fill_n(factors.values, kRowBlock, scale);
    for_each_block<acc>(inputs, begin, end, [&](const int64_t* rows, int n, const auto& c) {
      if (grads) gather(grads->rows, rows, n, factors);
      dispatch_kind(kind, [&](auto k) {
        for (int i = 0; i < n; ++i) {
          const acc factor = factors[i] * c.weights[i];
          const Ltrb<acc> g = box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).gradient;
          gradients.set(i, {g.l * factor, g.t * factor, g.r * factor, g.b * factor});
        }
      });
      scatter(gradients, rows, n, out);
    });
  });
}

std::tuple<Tensor, Tensor> iou_loss_cpu(const Tensor& pred, const Tensor& target,
                                        const std::optional<Tensor>& weights,
                                        const std::optional<Tensor>& labels,
                                        const std::optional<Tensor>& normalizer, int64_t kind,
                                        int64_t reduction, double smooth, double eps) {
  check_iou_loss("iou_loss", pred, target, weights, labels, kind);
  check_reduction("iou_loss", reduction, pred, normalizer);
  const Inputs inputs(pred, target, weights, labels);
  const bool reduce_all = reduction != static_cast<int64_t>(Reduction::kNone);
  Tensor out = reduce_all ? torch::stable::new_empty(pred, {}, acc_dtype(pred))
                          : torch::stable::new_empty(pred, batch_sizes(pred));
  Tensor divisor = torch::stable::new_empty(pred, {}, acc_dtype(pred));
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    double divide_by = 1;
    if (reduce_all) {
      const Partial total = reduce<acc>(inputs, IoUKind(kind), acc(smooth), acc(eps));
      if (reduction == static_cast<int64_t>(Reduction::kMean))
        divide_by = static_cast<double>(std::max<int64_t>(1, total.count));
      else if (normalizer)
        divide_by = std::max<double>(acc(kNormalizerFloor), *normalizer->const_data_ptr<acc>());
      *out.mutable_data_ptr<acc>() = static_cast<acc>(total.sum / divide_by);
    } else if (inputs.rows > 0) {
      if (labels) clear_all(out);
      const auto rows = find_rows(out.mutable_data_ptr(), out, out.dim());
      each_loss<acc>(inputs, IoUKind(kind), acc(smooth), acc(eps), *rows);
    }
    *divisor.mutable_data_ptr<acc>() = static_cast<acc>(divide_by);
  });
  return {out, divisor};
}

Tensor iou_loss_backward_cpu(const Tensor& grad, const Tensor& pred, const Tensor& target,
                             const std::optional<Tensor>& weights,
                             const std::optional<Tensor>& labels,
                             const std::optional<Tensor>& divisor, int64_t kind, double smooth,
                             double eps) {
  check_iou_loss("iou_loss_backward", pred, target, weights, labels, kind);
  check_iou_loss_grad("iou_loss_backward", grad, pred, divisor);
  Output out(pred, pred.dim() - 1);
  const Inputs inputs(pred, target, weights, labels);
  if (inputs.rows == 0) return out.result;
  if (labels) clear_all(out.written);
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    std::optional<Input> grads;
    acc scale = 1;
    if (divisor)
      scale = *grad.const_data_ptr<acc>() / *divisor->const_data_ptr<acc>();
    else
      grads.emplace(grad, grad.dim());
    each_gradient<acc>(inputs, IoUKind(kind), acc(smooth), acc(eps), grads, scale, out.rows);
  });
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("iou_loss", TORCH_BOX(&iou_loss_cpu));
  m.impl("iou_loss_backward", TORCH_BOX(&iou_loss_backward_cpu));
}

}  // namespace fcos_ext
