// The operators of sigmoid_focal_loss, the same for CPU and CUDA: argument rules, layouts, results.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "sigmoid_focal_loss.h"

namespace fcos_ext {

// One level [N, C, H, W], dense: each image is C x positions (planes) or positions x C.
struct FocalLevel {
  Tensor logits;
  int64_t positions;    // H W
  int64_t first_label;  // of the level, in the labels of an image
  bool planes;
  Tensor grad;  // kEachGradient: of the losses, in the layout of the logits
  Tensor out;   // unless kSum: also
};

// Everything that a kernel is told.
struct FocalCall {
  std::vector<FocalLevel> levels;
  int64_t images, classes, labels_per_image;
  Tensor labels;                  // [N, labels_per_image]
  std::optional<Tensor> quality;  // like labels, in the dtype of sums
  double positive_weight, negative_weight, gamma;
  std::optional<Tensor> normalizer;  // 0-d, in the dtype of sums
  std::optional<Tensor> grad;        // kGradient: of the sum; 0-d, in the dtype of sums
  bool only_if_not_one = false;      // kGradient: the result for a grad of 1 is in `out` already
  Tensor sum;                        // kSum, kSumAndGradient: 0-d

  // Of any level: they all agree.
  const Tensor& logits() const { return levels[0].logits; }
};

inline FocalCall make_call(const char* op, const Tensors& logits, const Tensor& labels,
                           const std::optional<Tensor>& quality,
                           const std::optional<Tensor>& normalizer, double alpha, double gamma) {
  STD_TORCH_CHECK(!logits.empty() && logits.size() <= kMaxFeatureLevels, op,
                  ": logits must have 1 to ", kMaxFeatureLevels, " levels, got ", logits.size());
  check_floating(op, "logits", logits[0]);
  FocalCall call{};
  for (const Tensor& level : logits) {
    STD_TORCH_CHECK(level.dim() == 4, op, ": a level must be [N, C, H, W], got ", level.dim(),
                    " dimensions");
    STD_TORCH_CHECK(level.size(0) == logits[0].size(0) && level.size(1) == logits[0].size(1) &&
                        level.scalar_type() == logits[0].scalar_type(),
                    op, ": all levels must have the same N, C and dtype");
    check_same_device(op, "logits", logits[0], "logits of every level", level);
    const int64_t positions = level.size(2) * level.size(3);
    const bool rows = is_dense(level, false), planes = !rows && is_dense(level, true);
    call.levels.push_back({rows || planes ? level : torch::stable::contiguous(level),
                           positions,
                           call.labels_per_image,
                           !rows,
                           {},
                           {}});
    call.labels_per_image += positions;
  }
  call.images = logits[0].size(0);
  call.classes = logits[0].size(1);
  STD_TORCH_CHECK(call.classes < (1 << 27), op, ": at most 2^27 - 1 classes, got ", call.classes);

  STD_TORCH_CHECK(
      labels.dim() == 2 && labels.size(0) == call.images && labels.size(1) == call.labels_per_image,
      op, ": labels must be [N, L] with a label for each location, N = ", call.images,
      " and L = ", call.labels_per_image);
  check_integer(op, "labels", labels);
  check_same_device(op, "logits", logits[0], "labels", labels);
  call.labels = torch::stable::contiguous(labels);
  if (quality) {
    STD_TORCH_CHECK(quality->sizes().equals(labels.sizes()), op,
                    ": quality must have the shape of labels");
    STD_TORCH_CHECK(quality->scalar_type() == acc_dtype(logits[0]), op, ": quality must be ",
                    torch::headeronly::toString(acc_dtype(logits[0])), ", got ",
                    torch::headeronly::toString(quality->scalar_type()));
    check_same_device(op, "logits", logits[0], "quality", *quality);
    call.quality = torch::stable::contiguous(*quality);
  }
  if (normalizer) check_scalar(op, "normalizer", *normalizer, "logits", logits[0]);
  call.normalizer = normalizer;
  call.positive_weight = alpha < 0 ? 1.0 : alpha;
  call.negative_weight = alpha < 0 ? 1.0 : 1.0 - alpha;
  call.gamma = gamma;
  return call;
}

// Results in the layout of the logits.
inline Tensors new_outputs(FocalCall& call) {
  Tensors out;
  for (FocalLevel& level : call.levels)
    out.push_back(level.out = torch::stable::empty_like(level.logits));
  return out;
}

inline Tensor& new_sum(FocalCall& call) {
  return call.sum = torch::stable::new_empty(call.logits(), {}, acc_dtype(call.logits()));
}

// The operators. Backend::run<Work>(const FocalCall&) does the work.
template <typename Backend>
struct FocalOps {
  using MaybeTensor = std::optional<Tensor>;

  static Tensor loss(const Tensors& logits, const Tensor& labels, const MaybeTensor& quality,
                     const MaybeTensor& normalizer, double alpha, double gamma) {
    FocalCall call =
        make_call("sigmoid_focal_loss", logits, labels, quality, normalizer, alpha, gamma);
    new_sum(call);
    Backend::template run<Work::kSum>(call);
    return call.sum;
  }

  static Tensors backward(const Tensor& grad, const Tensors& logits, const Tensor& labels,
                          const MaybeTensor& quality, const MaybeTensor& normalizer, double alpha,
                          double gamma) {
    constexpr const char* kOp = "sigmoid_focal_loss_backward";
    FocalCall call = make_call(kOp, logits, labels, quality, normalizer, alpha, gamma);
    check_scalar(kOp, "grad", grad, "logits", logits[0]);
    call.grad = grad;
    Tensors out = new_outputs(call);
    Backend::template run<Work::kGradient>(call);
    return out;
  }

  static std::tuple<Tensor, Tensors> with_gradient(const Tensors& logits, const Tensor& labels,
                                                   const MaybeTensor& quality,
                                                   const MaybeTensor& normalizer, double alpha,
                                                   double gamma) {
    FocalCall call = make_call("sigmoid_focal_loss_with_gradient", logits, labels, quality,
                               normalizer, alpha, gamma);
    new_sum(call);
    Tensors out = new_outputs(call);
    Backend::template run<Work::kSumAndGradient>(call);
    return {call.sum, out};
  }

  // gradients: those of a grad of 1, which become those of any other.
  static void rescale_(const Tensors& gradients, const Tensor& grad, const Tensors& logits,
                       const Tensor& labels, const MaybeTensor& quality,
                       const MaybeTensor& normalizer, double alpha, double gamma) {
    constexpr const char* kOp = "sigmoid_focal_loss_rescale_";
    FocalCall call = make_call(kOp, logits, labels, quality, normalizer, alpha, gamma);
    check_scalar(kOp, "grad", grad, "logits", logits[0]);
    check_same_levels(kOp, "gradients", gradients, "logits", logits);
    call.grad = grad;
    call.only_if_not_one = true;
    for (size_t l = 0; l < logits.size(); ++l) {
      STD_TORCH_CHECK(is_dense(gradients[l], call.levels[l].planes), kOp,
                      ": gradients must have the memory format of logits");
      call.levels[l].out = gradients[l];
    }
    Backend::template run<Work::kGradient>(call);
  }

  static Tensors each(const Tensors& logits, const Tensor& labels, const MaybeTensor& quality,
                      double alpha, double gamma) {
    FocalCall call =
        make_call("sigmoid_focal_loss_each", logits, labels, quality, std::nullopt, alpha, gamma);
    Tensors out = new_outputs(call);
    Backend::template run<Work::kEach>(call);
    return out;
  }

  static Tensors each_backward(const Tensors& grads, const Tensors& logits, const Tensor& labels,
                               const MaybeTensor& quality, double alpha, double gamma) {
    constexpr const char* kOp = "sigmoid_focal_loss_each_backward";
    FocalCall call = make_call(kOp, logits, labels, quality, std::nullopt, alpha, gamma);
    check_same_levels(kOp, "grads", grads, "logits", logits);
    Tensors out = new_outputs(call);
    for (size_t l = 0; l < logits.size(); ++l) {
      FocalLevel& level = call.levels[l];
      level.grad = grads[l];
      if (is_dense(grads[l], level.planes)) continue;
      level.grad = torch::stable::empty_like(level.logits);
      torch::stable::copy_(level.grad, grads[l]);
    }
    Backend::template run<Work::kEachGradient>(call);
    return out;
  }
};

// Registers them, from within STABLE_TORCH_LIBRARY_IMPL.
#define FCOS_IMPLEMENT_FOCAL_OPS(m, Backend)                                                \
  m.impl("sigmoid_focal_loss", TORCH_BOX(&FocalOps<Backend>::loss));                        \
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&FocalOps<Backend>::backward));           \
  m.impl("sigmoid_focal_loss_with_gradient", TORCH_BOX(&FocalOps<Backend>::with_gradient)); \
  m.impl("sigmoid_focal_loss_rescale_", TORCH_BOX(&FocalOps<Backend>::rescale_));           \
  m.impl("sigmoid_focal_loss_each", TORCH_BOX(&FocalOps<Backend>::each));                   \
  m.impl("sigmoid_focal_loss_each_backward", TORCH_BOX(&FocalOps<Backend>::each_backward))

}  // namespace fcos_ext
