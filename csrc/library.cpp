// Table of contents: the schema of every operator. Kernels are in cpu/<op>.cpp and cuda/<op>.cu.
#include "common.h"

STABLE_TORCH_LIBRARY(FCOS_NAMESPACE, m) {
  // logits: levels [N, C, H, W]; labels, quality: [N, L], L over all levels
  m.def(
      "sigmoid_focal_loss(Tensor[] logits, Tensor labels, Tensor? quality, Tensor? normalizer, "
      "float alpha, float gamma) -> Tensor");
  m.def(
      "sigmoid_focal_loss_backward(Tensor grad, Tensor[] logits, Tensor labels, Tensor? quality, "
      "Tensor? normalizer, float alpha, float gamma) -> Tensor[]");
  m.def(
      "sigmoid_focal_loss_with_gradient(Tensor[] logits, Tensor labels, Tensor? quality, "
      "Tensor? normalizer, float alpha, float gamma) -> (Tensor, Tensor[])");
  m.def(
      "sigmoid_focal_loss_rescale_(Tensor(a!)[] gradients, Tensor grad, Tensor[] logits, "
      "Tensor labels, Tensor? quality, Tensor? normalizer, float alpha, float gamma) -> ()");
  m.def(
      "sigmoid_focal_loss_each(Tensor[] logits, Tensor labels, Tensor? quality, float alpha, "
      "float gamma) -> Tensor[]");
  m.def(
      "sigmoid_focal_loss_each_backward(Tensor[] grads, Tensor[] logits, Tensor labels, "
      "Tensor? quality, float alpha, float gamma) -> Tensor[]");
  m.def(
      "iou_loss(Tensor pred, Tensor target, Tensor? weights, Tensor? labels, Tensor? normalizer, "
      "int kind, int reduction, float smooth, float eps) -> (Tensor loss, Tensor divisor)");
  m.def(
      "iou_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor? weights, Tensor? labels, "
      "Tensor? divisor, int kind, float smooth, float eps) -> Tensor");
  // pred, centerness: levels [N, 4, H, W] and [N, 1, H, W]; target [N, L, 4]; labels, ... [N, L];
  // normalizers [2]
  m.def(
      "box_and_centerness_loss(Tensor[] pred, Tensor[] centerness, Tensor target, Tensor labels, "
      "Tensor? centerness_target, Tensor? normalizers, int num_classes, int kind, bool weighted, "
      "bool iou_quality, float smooth, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "box_and_centerness_loss_backward(Tensor grad_box, Tensor grad_centerness, Tensor[] pred, "
      "Tensor[] centerness, Tensor target, Tensor labels, Tensor? centerness_target, "
      "Tensor? normalizers, int num_classes, int kind, bool weighted, bool iou_quality, "
      "float smooth, float eps) -> (Tensor[], Tensor[])");
  m.def(
      "box_and_centerness_loss_with_gradient(Tensor[] pred, Tensor[] centerness, Tensor target, "
      "Tensor labels, Tensor? centerness_target, Tensor? normalizers, int num_classes, int kind, "
      "bool weighted, bool iou_quality, float smooth, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])");
  m.def(
      "box_and_centerness_loss_rescale_(Tensor(a!)[] by_pred, Tensor(b!)[] by_centerness, "
      "Tensor grad_box, Tensor grad_centerness, Tensor[] pred, Tensor[] centerness, "
      "Tensor target, Tensor labels, Tensor? centerness_target, Tensor? normalizers, "
      "int num_classes, int kind, bool weighted, bool iou_quality, float smooth, float eps) -> ()");
  m.def("fcos_normalizers(Tensor labels, Tensor centerness, int num_classes) -> Tensor");
  m.def(
      "fcos_normalizers_and_labels(Tensor labels, Tensor centerness, int num_classes) -> "
      "(Tensor, Tensor)");
  m.def(
      "assign_targets(Tensor boxes, Tensor labels, Tensor extents, int[] feature_sizes, "
      "float[] grids, float[] size_ranges, int boundary, bool normalize, int ties, "
      "bool pixels=False) -> "
      "(Tensor labels, Tensor ltrb, Tensor centerness, Tensor matched, Tensor num_pos)");
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, int max_detections) "
      "-> Tensor");
  m.def(
      "padded_batched_nms(Tensor boxes, Tensor scores, Tensor labels, float iou_threshold, "
      "int max_detections, bool class_agnostic) -> (Tensor keep, Tensor counts)");
  // logits, regression, centerness: levels [N, C or 4 or 1, H, W], the last may be missing;
  // anchors: levels [H W, 4] or none; grids: step_y, step_x, first_y, first_x and the unit of the
  // distances of each level; deltas: weights of x, y, width and height, and the limit of logarithms
  m.def(
      "postprocess(Tensor[] logits, Tensor[] regression, Tensor[] centerness, Tensor[] anchors, "
      "Tensor image_sizes, Tensor? original_sizes, float[] grids, float[] deltas, "
      "float score_threshold, float iou_threshold, int topk_candidates, int max_detections, "
      "int max_apart, bool root, bool on_final, bool by_class, bool class_agnostic, bool clip, "
      "bool in_pixels, bool keep_empty, bool pixels, bool overlap_edges) -> "
      "(Tensor boxes, Tensor scores, Tensor labels, Tensor counts, Tensor dropped)");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, float sigma, "
      "float score_threshold, bool gaussian, int max_detections) -> "
      "(Tensor keep, Tensor kept_scores, Tensor counts)");
}
