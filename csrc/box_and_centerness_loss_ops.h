// The operators of box_and_centerness_loss, the same for CPU and CUDA: argument rules, results.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "box_and_centerness_loss.h"
#include "checks.h"
#include "integers.h"
#include "iou_loss_args.h"
#include "levels.h"
#include "rows.h"

namespace fcos_ext {

// One level of both branches, or all rows.
struct BoxLevel {
  Tensor pred_tensor, centerness_tensor;    // kept alive
  int64_t positions;                        // H W, or L
  int64_t first_row;                        // of the level, in the rows of an image
  LevelRows<const void*> pred, centerness;  // what is read,
  LevelRows<void*> by_pred, by_centerness;  // and, if gradients are made, written
};

// Everything that a kernel is told. Rows are locations, counted through levels and then images.
struct BoxCall {
  // Of target, labels and centerness_target: 2, [N, L]; or, if there is only one image, 1, [L].
  int64_t batch_dims;
  bool rows_given;  // and not levels [N, 4, H, W] and [N, 1, H, W]
  std::vector<BoxLevel> levels;
  int64_t images, rows_per_image;
  Tensor pred;                                     // the first level: dtype of the math, device
  Tensor target_tensor;                            // [N, L, 4] or [L, 4]
  std::optional<Tensor> centerness_target_tensor;  // [N, L] or [L]
  ConstRows target, centerness_target;  // the last one's data is null if it is to be computed
  Tensor labels;                        // [N, L] or [L]
  int64_t num_classes;
  std::optional<Tensor> normalizers;  // [2]: number of positives, sum of centerness targets
  IoUKind kind;
  bool weighted, iou_quality;
  double smooth, eps;

  bool sums = false;                                // are to be computed
  Tensor box, centerness, weight;                   // 0-d, in the dtype of sums
  Tensor num_pos, num_ignored;                      // 0-d, int64
  bool writes = false;                              // gradients
  std::optional<Tensor> grad_box, grad_centerness;  // of the sums; none: 1
  bool only_if_not_one = false;                     // what is right for 1 is there already

  int64_t rows() const { return images * rows_per_image; }
};

using MaybeTensor = std::optional<Tensor>;

inline void check_box_levels(const char* op, const Tensors& pred, const Tensors& centerness) {
  STD_TORCH_CHECK(!pred.empty() && pred.size() <= kMaxFeatureLevels, op, ": pred must have 1 to ",
                  kMaxFeatureLevels, " levels, got ", pred.size());
  STD_TORCH_CHECK(centerness.size() == pred.size(), op, ": centerness must have ", pred.size(),
                  " levels, as pred, got ", centerness.size());
  check_floating(op, "pred", pred[0]);
  check_floating(op, "centerness", centerness[0]);
  for (size_t l = 0; l < pred.size(); ++l) {
    check_same_device(op, "pred", pred[0], "pred of every level", pred[l]);
    check_same_device(op, "pred", pred[0], "centerness of every level", centerness[l]);
  }
}

inline void check_levels(const char* op, const Tensors& pred, const Tensors& centerness) {
  for (size_t l = 0; l < pred.size(); ++l) {
    const Tensor &p = pred[l], &c = centerness[l];
    STD_TORCH_CHECK(p.dim() == 4 && p.size(1) == 4 && p.size(0) == pred[0].size(0), op,
                    ": pred must be levels [N, 4, H, W] of the same N, got ", p.dim(),
                    " dimensions at level ", l);
    STD_TORCH_CHECK(c.dim() == 4 && c.size(1) == 1 && c.size(0) == p.size(0) &&
                        c.size(2) == p.size(2) && c.size(3) == p.size(3),
                    op, ": centerness must be levels [N, 1, H, W] like those of pred, level ", l,
                    " is not");
    STD_TORCH_CHECK(
        p.scalar_type() == pred[0].scalar_type() && c.scalar_type() == centerness[0].scalar_type(),
        op, ": all levels must have the same dtype");
  }
}

// Whether t has the sizes of `rows` [N, L] or [L], and so many values a row, if not 0.
inline bool is_of_rows(const Tensor& t, const BoxCall& call, int64_t values) {
  const int64_t d = call.batch_dims;
  return t.dim() == d + (values > 0) && (d == 1 || t.size(0) == call.images) &&
         t.size(d - 1) == call.rows_per_image && (values == 0 || t.size(d) == values);
}

// Where the rows of a level are. nullopt: its locations have no one stride.
template <typename Pointer>
std::optional<LevelRows<Pointer>> find_rows_of_level(const BoxCall& call, Pointer data,
                                                     const Tensor& t) {
  if (call.rows_given) return level_rows_of(data, t, call.batch_dims);
  return find_level_rows(data, t);
}

// The same, and what keeps it alive: a copy where need be.
inline LevelRows<const void*> level_rows(const BoxCall& call, Tensor& t) {
  auto found = find_rows_of_level(call, t.const_data_ptr(), t);
  if (found) return *found;
  t = torch::stable::contiguous(t);
  return *find_rows_of_level(call, t.const_data_ptr(), t);
}

inline void add_level(BoxCall& call, const Tensor& pred, const Tensor& centerness,
                      int64_t positions) {
  BoxLevel level{pred, centerness, positions, call.rows_per_image};
  level.pred = level_rows(call, level.pred_tensor);
  level.centerness = level_rows(call, level.centerness_tensor);
  call.levels.push_back(level);
  call.rows_per_image += positions;
}

inline BoxCall make_call(const char* op, const Tensors& pred, const Tensors& centerness,
                         const Tensor& target, const Tensor& labels,
                         const MaybeTensor& centerness_target, const MaybeTensor& normalizers,
                         int64_t num_classes, int64_t kind, bool weighted, bool iou_quality,
                         double smooth, double eps) {
  check_box_levels(op, pred, centerness);
  BoxCall call{};
  call.pred = pred[0];
  const int64_t dims = pred[0].dim();
  call.rows_given = pred.size() == 1 && (dims == 2 || dims == 3);
  call.batch_dims = call.rows_given ? dims - 1 : 2;
  if (call.rows_given) {
    call.images = dims == 3 ? pred[0].size(0) : 1;
    STD_TORCH_CHECK(pred[0].size(dims - 1) == 4, op, ": rows of pred must have 4 values, got ",
                    pred[0].size(dims - 1));
    STD_TORCH_CHECK(centerness[0].dim() == dims - 1 &&
                        centerness[0].numel() * 4 == pred[0].numel() &&
                        centerness[0].size(0) == pred[0].size(0),
                    op, ": centerness must have a value for each row of pred");
    add_level(call, pred[0], centerness[0], pred[0].size(dims - 2));
  } else {
    check_levels(op, pred, centerness);
    call.images = pred[0].size(0);
    for (size_t l = 0; l < pred.size(); ++l)
      add_level(call, pred[l], centerness[l], pred[l].size(2) * pred[l].size(3));
  }

  const int64_t N = call.images, L = call.rows_per_image;
  check_floating(op, "target", target);
  STD_TORCH_CHECK(is_of_rows(target, call, 4), op,
                  ": target must be [N, L, 4], a row for each location, N = ", N, " and L = ", L);
  check_integer(op, "labels", labels);
  STD_TORCH_CHECK(is_of_rows(labels, call, 0), op, ": labels must be [N, L], N = ", N,
                  " and L = ", L);
  check_same_device(op, "pred", call.pred, "target", target);
  check_same_device(op, "pred", call.pred, "labels", labels);
  call.target_tensor = torch::stable::contiguous(target);
  call.target =
      *find_rows(call.target_tensor.const_data_ptr(), call.target_tensor, call.batch_dims);
  call.labels = torch::stable::contiguous(labels);
  if (centerness_target) {
    check_floating(op, "centerness_target", *centerness_target);
    STD_TORCH_CHECK(centerness_target->sizes().equals(labels.sizes()), op,
                    ": centerness_target must have the shape of labels");
    check_same_device(op, "pred", call.pred, "centerness_target", *centerness_target);
    call.centerness_target_tensor = torch::stable::contiguous(*centerness_target);
    call.centerness_target = *find_rows(call.centerness_target_tensor->const_data_ptr(),
                                        *call.centerness_target_tensor, call.batch_dims);
  }
  if (normalizers) {
    STD_TORCH_CHECK(normalizers->dim() == 1 && normalizers->size(0) == 2, op,
                    ": normalizers must have shape [2]");
    STD_TORCH_CHECK(normalizers->scalar_type() == acc_dtype(call.pred), op,
                    ": normalizers must be ", torch::headeronly::toString(acc_dtype(call.pred)),
                    ", got ", torch::headeronly::toString(normalizers->scalar_type()));
    check_same_device(op, "pred", call.pred, "normalizers", *normalizers);
    call.normalizers = torch::stable::contiguous(*normalizers);
  }
  STD_TORCH_CHECK(num_classes >= 0, op, ": num_classes must be >= 0, got ", num_classes);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(IoUKind::kCIoU), op,
                  ": kind must lie in 0..4, got ", kind);
  call.num_classes = num_classes;
  call.kind = static_cast<IoUKind>(kind);
  call.weighted = weighted;
  call.iou_quality = iou_quality;
  call.smooth = smooth;
  call.eps = eps;
  return call;
}

inline void new_sums(BoxCall& call) {
  const auto scalar = [&](ScalarType dtype) {
    return torch::stable::new_empty(call.pred, {}, dtype);
  };
  call.sums = true;
  call.box = scalar(acc_dtype(call.pred));
  call.centerness = scalar(acc_dtype(call.pred));
  call.weight = scalar(acc_dtype(call.pred));
  call.num_pos = scalar(ScalarType::Long);
  call.num_ignored = scalar(ScalarType::Long);
}

// In the layout of t; a level with gaps: contiguous.
inline Tensor new_gradient(const BoxCall& call, const Tensor& t) {
  return call.rows_given || is_dense(t, true) || is_dense(t, false)
             ? torch::stable::empty_like(t)
             : torch::stable::new_empty(t, t.sizes());
}

// `pred` and `centerness`: the gradients by them, to write.
inline void set_gradients(const char* op, BoxCall& call, const Tensors& pred,
                          const Tensors& centerness) {
  call.writes = true;
  for (size_t l = 0; l < call.levels.size(); ++l) {
    BoxLevel& level = call.levels[l];
    Tensor by_pred = pred[l], by_centerness = centerness[l];
    const auto rows = find_rows_of_level(call, by_pred.mutable_data_ptr(), by_pred);
    const auto values = find_rows_of_level(call, by_centerness.mutable_data_ptr(), by_centerness);
    STD_TORCH_CHECK(rows && values, op, ": gradients must have one stride between locations");
    level.by_pred = *rows;
    level.by_centerness = *values;
  }
}

inline std::tuple<Tensors, Tensors> new_gradients(const char* op, BoxCall& call,
                                                  const Tensors& pred, const Tensors& centerness) {
  Tensors by_pred, by_centerness;
  for (const Tensor& level : pred) by_pred.push_back(new_gradient(call, level));
  for (const Tensor& level : centerness) by_centerness.push_back(new_gradient(call, level));
  set_gradients(op, call, by_pred, by_centerness);
  return {by_pred, by_centerness};
}

// The operators. Backend::run(const BoxCall&) does the work.
template <typename Backend>
struct BoxOps {
  using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using SumsAndGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors>;

  static Sums loss(const Tensors& pred, const Tensors& centerness, const Tensor& target,
                   const Tensor& labels, const MaybeTensor& centerness_target,
                   const MaybeTensor& normalizers, int64_t num_classes, int64_t kind, bool weighted,
                   bool iou_quality, double smooth, double eps) {
    BoxCall call =
        make_call("box_and_centerness_loss", pred, centerness, target, labels, centerness_target,
                  normalizers, num_classes, kind, weighted, iou_quality, smooth, eps);
    new_sums(call);
    Backend::run(call);
    return {call.box, call.centerness, call.weight, call.num_pos, call.num_ignored};
  }

  static SumsAndGradients with_gradient(const Tensors& pred, const Tensors& centerness,
                                        const Tensor& target, const Tensor& labels,
                                        const MaybeTensor& centerness_target,
                                        const MaybeTensor& normalizers, int64_t num_classes,
                                        int64_t kind, bool weighted, bool iou_quality,
                                        double smooth, double eps) {
    constexpr const char* kOp = "box_and_centerness_loss_with_gradient";
    BoxCall call = make_call(kOp, pred, centerness, target, labels, centerness_target, normalizers,
                             num_classes, kind, weighted, iou_quality, smooth, eps);
    new_sums(call);
    auto [by_pred, by_centerness] = new_gradients(kOp, call, pred, centerness);
    Backend::run(call);
    return {call.box,         call.centerness, call.weight,  call.num_pos,
            call.num_ignored, by_pred,         by_centerness};
  }

  static std::tuple<Tensors, Tensors> backward(
      const Tensor& grad_box, const Tensor& grad_centerness, const Tensors& pred,
      const Tensors& centerness, const Tensor& target, const Tensor& labels,
      const MaybeTensor& centerness_target, const MaybeTensor& normalizers, int64_t num_classes,
      int64_t kind, bool weighted, bool iou_quality, double smooth, double eps) {
    constexpr const char* kOp = "box_and_centerness_loss_backward";
    BoxCall call = make_call(kOp, pred, centerness, target, labels, centerness_target, normalizers,
                             num_classes, kind, weighted, iou_quality, smooth, eps);
    set_grads(kOp, call, grad_box, grad_centerness);
    auto results = new_gradients(kOp, call, pred, centerness);
    Backend::run(call);
    return results;
  }

  // by_pred, by_centerness: the gradients for grads of 1, which become those for any others.
  static void rescale_(const Tensors& by_pred, const Tensors& by_centerness, const Tensor& grad_box,
                       const Tensor& grad_centerness, const Tensors& pred,
                       const Tensors& centerness, const Tensor& target, const Tensor& labels,
                       const MaybeTensor& centerness_target, const MaybeTensor& normalizers,
                       int64_t num_classes, int64_t kind, bool weighted, bool iou_quality,
                       double smooth, double eps) {
    constexpr const char* kOp = "box_and_centerness_loss_rescale_";
    BoxCall call = make_call(kOp, pred, centerness, target, labels, centerness_target, normalizers,
                             num_classes, kind, weighted, iou_quality, smooth, eps);
    set_grads(kOp, call, grad_box, grad_centerness);
    check_same_levels(kOp, "by_pred", by_pred, "pred", pred);
    check_same_levels(kOp, "by_centerness", by_centerness, "centerness", centerness);
    set_gradients(kOp, call, by_pred, by_centerness);
    call.only_if_not_one = true;
    Backend::run(call);
  }

 private:
  static void set_grads(const char* op, BoxCall& call, const Tensor& box,
                        const Tensor& centerness) {
    check_scalar(op, "grad_box", box, "pred", call.pred);
    check_scalar(op, "grad_centerness", centerness, "pred", call.pred);
    call.grad_box = box;
    call.grad_centerness = centerness;
  }
};

// Registers them, from within STABLE_TORCH_LIBRARY_IMPL.
#define FCOS_IMPLEMENT_BOX_OPS(m, Backend)                                                     \
  m.impl("box_and_centerness_loss", TORCH_BOX(&BoxOps<Backend>::loss));                        \
  m.impl("box_and_centerness_loss_backward", TORCH_BOX(&BoxOps<Backend>::backward));           \
  m.impl("box_and_centerness_loss_with_gradient", TORCH_BOX(&BoxOps<Backend>::with_gradient)); \
  m.impl("box_and_centerness_loss_rescale_", TORCH_BOX(&BoxOps<Backend>::rescale_))

}  // namespace fcos_ext
