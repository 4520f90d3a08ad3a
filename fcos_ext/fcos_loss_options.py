"""What :func:`fcos_ext.fcos_loss` is told: its options, and the ground truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from .assign_targets import Boundary
from .box_and_centerness_loss import Quality
from .iou_loss import IoUKind

BoxWeights = Literal["centerness", "none"]


@dataclass(frozen=True)
class FCOSLossOptions:
    """What :func:`fcos_loss` computes. The defaults are those of FCOS with its improvements."""

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Of each level, in pixels."""
    size_ranges: tuple[tuple[float, float], ...] = (
        (0, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, math.inf),
    )
    """Of each level, what max(l, t, r, b) must lie in, in pixels."""
    center_sampling_radius: float = 1.5
    """Positives lie within radius * stride of the centre; 0: anywhere in the box."""
    boundary: Boundary = "inclusive"
    """Which ends belong to a size range; see :func:`fcos_ext.assign_targets`."""
    normalize_ltrb: bool = True
    """The distances are predicted in strides, not in pixels."""
    alpha: float = 0.25
    """Weight of a positive in the focal loss; -1: no weights."""
    gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    box_loss: IoUKind = "giou"
    """See :func:`fcos_ext.iou_loss`."""
    box_weights: BoxWeights = "centerness"
    """Weight of a positive's box loss: its centerness target, or "none"."""
    quality: Quality = "centerness"
    """What the centerness branch learns: the centerness, or "iou", the overlap of the predicted
    box with the true one, through which no gradient flows."""
    iou_smooth: float = 0.0
    """Added to intersection and union in the box loss and in the quality "iou", in the unit that
    distances are predicted in; see ``smooth`` of :func:`fcos_ext.iou_loss`."""
    debug: bool = False
    """Check the values that the host does not see on a GPU: a label, count or offset out of its
    range raises RuntimeError on the CPU and is a device-side assertion on a GPU, which names the
    rule and ends the program. Costs launches; off, such labels are ignored and counted, and counts
    and offsets are clamped on a GPU."""


class GroundTruth(NamedTuple):
    """The boxes of a batch, as :func:`fcos_ext.assign_targets` takes them."""

    boxes: Tensor
    """Tensor[K, 4], packed, or Tensor[N, M, 4], padded: x0, y0, x1, y1 in pixels."""
    labels: Tensor
    """Tensor[K] or Tensor[N, M]: class of each box, int64 or int32."""
    offsets: Tensor | None = None
    """Tensor[N + 1], of packed boxes: image i owns the boxes offsets[i] up to offsets[i + 1]."""
    counts: Tensor | None = None
    """Tensor[N], of padded boxes: image i owns the first counts[i] of its M boxes."""
