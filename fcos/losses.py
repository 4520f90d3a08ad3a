"""The training loss of a batch: focal + box + centerness.

Targets depend on the ground truth and the image size alone, so they are made before the network
runs. That lets a step that is split over processes and over accumulation passes share its
normalisers, and have the same result as one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fcos_ext
from fcos_ext.assign_targets import AssignedTargets

from .config import LossConfig, ModelConfig
from .locations import feature_sizes, level_grids
from .model import Predictions

# detectron2's
_MOVING_START, _MOVING_DECAY = 300.0, 0.9


class Normalizers(NamedTuple):
    """What the losses are divided by: sums over a step's passes and, mostly, processes."""

    sums: Tensor
    """float32 [2]: the two that follow."""

    @property
    def num_pos(self) -> Tensor:
        """Positive locations, 0-d."""
        return self.sums[0]

    @property
    def centerness(self) -> Tensor:
        """Sum of their centerness targets, 0-d."""
        return self.sums[1]


def assign(
    image_size: tuple[int, int], config: ModelConfig, boxes: Tensor, labels: Tensor, counts: Tensor
) -> AssignedTargets:
    """What each location of a batch is to learn; see :func:`fcos_ext.assign_targets`.

    Args:
        image_size: (height, width) of the padded images.
        config: strides and the rules of the assignment.
        boxes, labels, counts: as those of :class:`fcos.data.batches.Batch`.
    """
    if config.corners == "pixels":
        boxes = torch.cat((boxes[..., :2], boxes[..., 2:] - 1), dim=-1)
    return fcos_ext.assign_targets(
        boxes,
        labels,
        counts=counts,
        feature_sizes=feature_sizes(image_size, config.strides, config.backbone),
        strides=level_grids(image_size, config.strides, config.locations),
        size_ranges=config.size_ranges,
        center_sampling_radius=config.center_sampling_radius,
        boundary=config.boundary,
        normalize=config.normalize_ltrb,
        ties=config.ties,
        corners=config.corners,
    )


def step_normalizers(
    targets: Sequence[AssignedTargets],
    config: LossConfig | None = None,
    moving: Tensor | None = None,
) -> Normalizers:
    """Normalisers of an optimiser step whose passes have these targets.

    Every process calls this once a step, positives or not.

    Args:
        targets: of each pass of this process.
        config: whose ``normalizer`` says over which images; None: those of all processes.
        moving (Tensor[]): the moving average of the positives, float32, see
            :func:`start_of_moving`; it is updated in place. For ``normalizer="moving"`` alone.
    """
    each = [fcos_ext.fcos_normalizers(t.labels, t.centerness) for t in targets]
    sums = each[0] if len(each) == 1 else torch.stack(each).sum(dim=0)
    together = dist.is_available() and dist.is_initialized()
    if config is None or config.normalizer == "all_reduced":
        if together:
            dist.all_reduce(sums)
        return Normalizers(sums)
    # As the losses keep them from 0; here, as the next step divides them further.
    sums = torch.maximum(sums, sums.new_tensor([1.0, 1e-6]))
    if config.normalizer == "moving":
        if moving is None:
            raise ValueError("step_normalizers: moving must be given for normalizer moving")
        moving.lerp_(sums[0], 1 - _MOVING_DECAY)
        sums = torch.stack([moving, sums[1]])
    # The processes' losses add up: so they become the average of what each would have alone.
    return Normalizers(sums * dist.get_world_size() if together else sums)


def start_of_moving(device: torch.device) -> Tensor:
    """The moving average of the positives of a process, before the first step."""
    return torch.full((), _MOVING_START, device=device)


def fcos_losses(
    predictions: Predictions,
    targets: AssignedTargets,
    normalizers: Normalizers,
    config: LossConfig,
) -> dict[str, Tensor]:
    """The three loss terms of one pass; those of a step's passes and processes add up.

    Args:
        predictions: outputs of the network.
        targets: see :func:`assign`.
        normalizers: see :func:`step_normalizers`.
        config: kinds and parameters.

    Returns:
        "cls": focal loss of all logits, divided by the number of positives; "box": overlap loss
        of the positives, weighted by their centerness targets and divided by their sum, or, with
        box_weights "none", divided by the number of positives; "centerness": binary cross-entropy
        of the positives with their centerness target or, with quality "iou", with the overlap of
        their box, divided by their number. Each a 0-d float32 tensor, also if there are no
        positives at all. The third does not approach 0: the cross-entropy of a target between 0
        and 1 is at least its entropy, about 0.6 in practice.
    """
    options = fcos_ext.FCOSLossOptions(
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        box_loss=config.box_loss,
        iou_smooth=config.iou_smooth,
        box_weights=config.box_weights,
        quality=config.quality,
    )
    loss = fcos_ext.fcos_loss(predictions, targets, options, normalizers=normalizers.sums)
    return {"cls": loss.cls, "box": loss.box, "centerness": loss.centerness}
