"""torchvision's RetinaNet, its classification loss and post-processing on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import boxes as box_ops

from .detect import detect, options_of
from .fcos import Target, check_labels, focal_loss


class AcceleratedRetinaNet(RetinaNet):
    """A torchvision RetinaNet that computes the same, faster. See :func:`accelerate`.

    Matching and box regression are torchvision's own, as is post-processing in float64 and with
    thresholds beyond 0 and 1.
    """

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal and box losses, each over max(1, positives) of the image, averaged over images."""
        matched = [
            self._match(target["boxes"], of_image)
            for target, of_image in zip(targets, anchors, strict=True)
        ]
        # Not indexed: of each index the gradient would be as large as that of the whole batch.
        logits = head_outputs["cls_logits"].unbind()  # each [L, C]
        losses = []
        for target, of_image, rows in zip(targets, logits, matched, strict=True):
            labels = _labels_of(target["labels"], rows, of_image.shape[-1])
            losses.append(focal_loss(of_image, labels, (rows >= 0).sum()))
        return {
            "classification": torch.stack(losses).sum() / len(targets),
            "bbox_regression": self.head.regression_head.compute_loss(
                targets, head_outputs, anchors, matched
            ),
        }

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Box of each anchor [L], -1 background, -2 neither."""
        if boxes.numel() == 0:
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        matched: Tensor = self.proposal_matcher(box_ops.box_iou(boxes, anchors))
        return matched

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, best first."""
        options = options_of(self, head_outputs)
        if options is None:
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        return detect(head_outputs, anchors[0], image_shapes, options)


def _labels_of(labels: Tensor, matched: Tensor, num_classes: int) -> Tensor:
    """Class of each anchor [L]; -1 and -2 as in ``matched``."""
    labels = labels.long()
    check_labels(labels, num_classes)
    if len(labels) == 0:
        return matched
    return torch.where(matched >= 0, labels[matched.clamp(min=0)], matched)
