// The argument rules of sigmoid_focal_loss, the same for CPU and CUDA.
#pragma once

#include "common.h"
#include "sigmoid_focal_loss.h"

namespace fcos_ext {

inline void check_sigmoid_focal_loss(const Tensor& logits, const Tensor& labels,
                                     const std::optional<Tensor>& normalizer) {
  constexpr const char* kOp = "sigmoid_focal_loss";
  STD_TORCH_CHECK(logits.dim() >= 1, kOp, ": logits must be [..., C], got a 0-d tensor");
  bool rows_agree = labels.dim() == logits.dim() - 1;
  for (int64_t d = 0; rows_agree && d < labels.dim(); ++d)
    rows_agree = labels.size(d) == logits.size(d);
  STD_TORCH_CHECK(rows_agree, kOp,
                  ": labels must have the shape of logits without its last dimension");
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long || labels.scalar_type() == ScalarType::Int, kOp,
      ": labels must be int64 or int32, got ", torch::headeronly::toString(labels.scalar_type()));
  check_same_device(kOp, "logits", logits, "labels", labels);
  if (!normalizer) return;
  STD_TORCH_CHECK(normalizer->dim() == 0, kOp, ": normalizer must be a 0-d tensor, got ",
                  normalizer->dim(), " dimensions");
  STD_TORCH_CHECK(normalizer->scalar_type() == acc_dtype(logits), kOp, ": normalizer must be ",
                  torch::headeronly::toString(acc_dtype(logits)), ", got ",
                  torch::headeronly::toString(normalizer->scalar_type()));
  check_same_device(kOp, "logits", logits, "normalizer", *normalizer);
}

// `grad` is that of the sum (0-d, the dtype of sums) or that of each loss (like logits).
inline void check_sigmoid_focal_loss_grad(const Tensor& grad, const Tensor& logits) {
  constexpr const char* kOp = "sigmoid_focal_loss_backward";
  check_same_device(kOp, "logits", logits, "grad", grad);
  if (grad.dim() == 0) {
    STD_TORCH_CHECK(grad.scalar_type() == acc_dtype(logits), kOp,
                    ": the gradient of the sum must be ",
                    torch::headeronly::toString(acc_dtype(logits)), ", got ",
                    torch::headeronly::toString(grad.scalar_type()));
    return;
  }
  STD_TORCH_CHECK(grad.sizes().equals(logits.sizes()) && grad.scalar_type() == logits.scalar_type(),
                  kOp, ": grad must be 0-d, or have the shape and dtype of logits");
}

inline Labels labels_of(const Tensor& labels) {
  return {labels.const_data_ptr(), labels.scalar_type() == ScalarType::Long};
}

}  // namespace fcos_ext
