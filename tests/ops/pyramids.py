"""Random outputs of an FCOS head and ground truth, for the tests of losses on feature levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcos_ext import FCOSLossOptions, GroundTruth
from fcos_ext.iou_loss import KIND_NUMBERS

#: (H, W) of levels: odd, and of a single location.
SIZES = ((9, 13), (5, 7), (3, 4), (1, 1))
LAYOUTS = ("contiguous", "channels_last", "mixed", "sliced")


class Pyramid(NamedTuple):
    """Levels of [N, C, H_l, W_l], [N, 4, H_l, W_l] and [N, 1, H_l, W_l]."""

    logits: list[Tensor]
    ltrb: list[Tensor]
    centerness: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [level for part in self for level in part]

    def to(self, *dtypes: torch.dtype) -> Pyramid:
        """New leaves of one dtype, or of one for each part, in the same layouts."""
        dtypes = dtypes * 3 if len(dtypes) == 1 else dtypes
        parts = (
            [level.detach().to(dtype).requires_grad_() for level in part]
            for part, dtype in zip(self, dtypes, strict=True)
        )
        return Pyramid(*parts)


def in_layout(level: Tensor, layout: str, number: int) -> Tensor:
    """The same values; sliced: channels from the middle of a tensor of more."""
    if layout == "channels_last" or (layout == "mixed" and number % 2 == 0):
        return level.contiguous(memory_format=torch.channels_last)
    if layout != "sliced":
        return level
    N, C, H, W = level.shape
    whole = torch.full((N, C + 2, H, W), math.nan, dtype=level.dtype, device=level.device)
    whole[:, 1:-1] = level
    return whole[:, 1:-1]


def make_pyramid(
    C: int = 3,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    images: int = 2,
    sizes: Sequence[tuple[int, int]] = SIZES,
    layout: str = "contiguous",
    reach: float = 4.0,
) -> Pyramid:
    """Predictions; distances of up to ``reach``, some of them 0, as ReLU makes them."""

    def level(values: Tensor, number: int) -> Tensor:
        return in_layout(values.to(device, dtype), layout, number).detach().requires_grad_()

    parts: list[list[Tensor]] = [[], [], []]
    for number, (H, W) in enumerate(sizes):
        logits = torch.randn(images, C, H, W, dtype=torch.float64) * 2 - 1
        ltrb = torch.rand(images, 4, H, W, dtype=torch.float64) * reach + 0.05
        centerness = torch.randn(images, 1, H, W, dtype=torch.float64) * 2
        for part, values in zip(parts, (logits, ltrb, centerness), strict=True):
            part.append(level(values, number + len(part)))
    return Pyramid(*parts)


def make_options(sizes: Sequence[tuple[int, int]] = SIZES, **changes: Any) -> FCOSLossOptions:
    """Strides 8, 16, ... and size ranges that small boxes fill."""
    count = len(sizes)
    ends = [0.0, *(24.0 * 2**i for i in range(count - 1)), math.inf]
    ranges = tuple(zip(ends[:-1], ends[1:], strict=True))
    standard = {"strides": tuple(8 << i for i in range(count)), "size_ranges": ranges}
    return FCOSLossOptions(**(standard | changes))


def make_truth(
    C: int = 3,
    device: str = "cpu",
    *,
    images: int = 2,
    extent: tuple[float, float] = (72.0, 104.0),
    most: int = 5,
    padded: bool = False,
    label_dtype: torch.dtype = torch.int64,
) -> GroundTruth:
    """Up to ``most`` boxes an image, and sometimes none."""
    height, width = extent
    counts = torch.randint(0, most + 1, (images,))
    total = images * most if padded else int(counts.sum())
    corner = torch.rand(total, 2) * torch.tensor([width, height]) * 0.6
    sides = torch.rand(total, 2) * torch.tensor([width, height]) * 0.5 + 6
    boxes = torch.cat((corner, corner + sides), dim=1).to(device)
    labels = torch.randint(C, (total,)).to(device, label_dtype)
    if padded:
        boxes, labels = boxes.view(images, most, 4), labels.view(images, most)
        return GroundTruth(boxes, labels, counts=counts.to(device))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return GroundTruth(boxes, labels, offsets.to(device))


class Targets(NamedTuple):
    """Of locations: true distances [N, L, 4], labels [N, L], weights [N, L], and normalisers."""

    target: Tensor
    labels: Tensor
    centerness_target: Tensor | None
    normalizers: Tensor | None


def make_targets(
    pyramid: Pyramid,
    *,
    given: bool = True,
    normalized: bool = True,
    positive: float = 0.4,
    label_dtype: torch.dtype = torch.int64,
) -> Targets:
    """Random targets, whether a box could have made them or not."""
    first = pyramid.ltrb[0]
    shape = (first.shape[0], sum(x.shape[2] * x.shape[3] for x in pyramid.ltrb))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    labels = torch.where(torch.rand(shape) < positive, torch.randint(12, shape), -1)
    labels = torch.where(torch.rand(shape) < 0.1, -2, labels)
    return Targets(
        (torch.rand(*shape, 4) * 4 + 0.1).to(first.device),
        labels.to(first.device, label_dtype),
        torch.rand(shape).to(first.device) if given else None,
        torch.tensor([3.5, 1.25], dtype=dtype, device=first.device) if normalized else None,
    )


class BoxOptions(NamedTuple):
    """Numbers of the operators of box_and_centerness_loss, in their order."""

    num_classes: int = 10
    kind: int = KIND_NUMBERS["giou"]
    weighted: bool = True
    iou_quality: bool = False
    smooth: float = 0.0
    eps: float = 1e-7

    def keywords(self) -> dict[str, Any]:
        """The same for the public functions."""
        return {
            "num_classes": self.num_classes,
            "kind": list(KIND_NUMBERS)[self.kind],
            "weighted": self.weighted,
            "quality": "iou" if self.iou_quality else "centerness",
            "smooth": self.smooth,
            "eps": self.eps,
        }
