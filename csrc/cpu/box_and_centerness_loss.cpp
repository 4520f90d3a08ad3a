#include "../box_and_centerness_loss.h"

#include <vector>

#include "../box_and_centerness_loss_args.h"
#include "row_blocks.h"

namespace fcos_ext {
namespace {

template <typename acc>
struct Columns {
  LtrbColumns<acc> pred, target;
  Column<acc> centerness, centerness_target;
};

// Calls body(rows, n, columns) with the inputs of the rows of [begin, end) that count.
template <typename acc, typename Body>
FCOS_INLINE void for_each_block(const BoxAndCenternessInputs& in, int64_t begin, int64_t end,
                                const Body& body) {
  Columns<acc> c;
  for_each_row_block(integers_of(in.labels), begin, end, [&](const int64_t* rows, int n) {
    gather(in.pred.rows, rows, n, c.pred);
    gather(in.target.rows, rows, n, c.target);
    gather(in.centerness.rows, rows, n, c.centerness);
    if (in.centerness_target)
      gather(in.centerness_target->rows, rows, n, c.centerness_target);
    else
      for (int i = 0; i < n; ++i)
        c.centerness_target[i] =
            centerness_of(c.target[i].l, c.target[i].t, c.target[i].r, c.target[i].b);
    body(rows, n, c);
  });
}

struct Sums {
  double box = 0, centerness = 0, weight = 0;
  int64_t count = 0;
};

template <typename acc>
Sums reduce(const BoxAndCenternessInputs& in, IoUKind kind, bool weighted, acc smooth, acc eps) {
  std::vector<Sums> partials(num_row_tiles(in.rows));
  for_each_row_tile(in.rows, [&](int64_t begin, int64_t end, int64_t tile) {
    Sums sums;
    for_each_block<acc>(in, begin, end, [&](const int64_t*, int n, const Columns<acc>& c) {
      double centerness = 0, weight = 0;
#pragma omp simd reduction(+ : centerness, weight)
      for (int i = 0; i < n; ++i) {
        const acc y = c.centerness_target[i];
        centerness += cross_entropy(c.centerness[i], y).loss;
        weight += weighted ? y : acc(1);
      }
      sums.centerness += centerness;
      sums.weight += weight;
      sums.count += n;
      dispatch_kind(kind, [&](auto k) {
        double box = 0;
#pragma omp simd reduction(+ : box)
        for (int i = 0; i < n; ++i)
          box += box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).loss *
                 (weighted ? c.centerness_target[i] : acc(1));
        sums.box += box;
      });
    });
    partials[tile] = sums;
  });
  Sums total;
  for (const Sums& partial : partials) {
    total.box += partial.box;
    total.centerness += partial.centerness;
    total.weight += partial.weight;
    total.count += partial.count;
  }
  return total;
}

template <typename acc>
void gradients(const BoxAndCenternessInputs& in, IoUKind kind, bool weighted, acc smooth, acc eps,
               acc grad_box, acc grad_centerness, const MutableRows& out_pred,
               const MutableRows& out_centerness) {
  for_each_row_tile(in.rows, [&](int64_t begin, int64_t end, int64_t) {
    LtrbColumns<acc> by_pred;
    Column<acc> by_centerness;
    for_each_block<acc>(in, begin, end, [&](const int64_t* rows, int n, const Columns<acc>& c) {
      for (int i = 0; i < n; ++i)
        by_centerness[i] =
            grad_centerness * cross_entropy(c.centerness[i], c.centerness_target[i]).derivative;
      scatter(by_centerness, rows, n, out_centerness);
      dispatch_kind(kind, [&](auto k) {
        for (int i = 0; i < n; ++i) {
          const acc factor = grad_box * (weighted ? c.centerness_target[i] : acc(1));
          const Ltrb<acc> g = box_loss<k.value>(c.pred[i], c.target[i], smooth, eps).gradient;
          by_pred.set(i, {g.l * factor, g.t * factor, g.r * factor, g.b * factor});
        }
      });
      scatter(by_pred, rows, n, out_pred);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> box_and_centerness_loss_cpu(
    const Tensor& pred, const Tensor& centerness, const Tensor& target, const Tensor& labels,
    const std::optional<Tensor>& centerness_target, int64_t kind, bool weighted, double smooth,
    double eps) {
  check_box_and_centerness_loss("box_and_centerness_loss", pred, centerness, target, labels,
                                centerness_target, kind);
  const BoxAndCenternessInputs in(pred, centerness, target, labels, centerness_target);
  Tensor box = torch::stable::new_empty(pred, {}, acc_dtype(pred));
  Tensor entropy = torch::stable::new_empty(pred, {}, acc_dtype(pred));
  Tensor weight = torch::stable::new_empty(pred, {}, acc_dtype(pred));
  Tensor num_pos = torch::stable::new_empty(pred, {}, ScalarType::Long);
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    const Sums sums = reduce<acc>(in, IoUKind(kind), weighted, acc(smooth), acc(eps));
    *box.mutable_data_ptr<acc>() = static_cast<acc>(sums.box);
    *entropy.mutable_data_ptr<acc>() = static_cast<acc>(sums.centerness);
    *weight.mutable_data_ptr<acc>() = static_cast<acc>(sums.weight);
    *num_pos.mutable_data_ptr<int64_t>() = sums.count;
  });
  return {box, entropy, weight, num_pos};
}

std::tuple<Tensor, Tensor> box_and_centerness_loss_backward_cpu(
    const Tensor& grad_box, const Tensor& grad_centerness, const Tensor& pred,
    const Tensor& centerness, const Tensor& target, const Tensor& labels,
    const std::optional<Tensor>& centerness_target, int64_t kind, bool weighted, double smooth,
    double eps) {
  constexpr const char* kOp = "box_and_centerness_loss_backward";
  check_box_and_centerness_loss(kOp, pred, centerness, target, labels, centerness_target, kind);
  check_scalar(kOp, "grad_box", grad_box, "pred", pred);
  check_scalar(kOp, "grad_centerness", grad_centerness, "pred", pred);
  const BoxAndCenternessInputs in(pred, centerness, target, labels, centerness_target);
  Output by_pred(pred, pred.dim() - 1), by_centerness(centerness, centerness.dim());
  if (in.rows == 0) return {by_pred.result, by_centerness.result};
  clear_all(by_pred.written);
  clear_all(by_centerness.written);
  dispatch_acc(pred, [&](auto zero) {
    using acc = decltype(zero);
    gradients<acc>(in, IoUKind(kind), weighted, acc(smooth), acc(eps),
                   *grad_box.const_data_ptr<acc>(), *grad_centerness.const_data_ptr<acc>(),
                   by_pred.rows, by_centerness.rows);
  });
  return {by_pred.finish(), by_centerness.finish()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("box_and_centerness_loss", TORCH_BOX(&box_and_centerness_loss_cpu));
  m.impl("box_and_centerness_loss_backward", TORCH_BOX(&box_and_centerness_loss_backward_cpu));
}

}  // namespace fcos_ext
