// Table of contents: the schema of every operator. Kernels are in cpu/<op>.cpp and cuda/<op>.cu.
#include "common.h"

STABLE_TORCH_LIBRARY(FCOS_NAMESPACE, m) {
  m.def(
      "sigmoid_focal_loss(Tensor logits, Tensor labels, Tensor? normalizer, float alpha, "
      "float gamma, bool reduce) -> Tensor");
  m.def(
      "sigmoid_focal_loss_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? normalizer, "
      "float alpha, float gamma) -> Tensor");
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, int max_detections) "
      "-> Tensor");
}
