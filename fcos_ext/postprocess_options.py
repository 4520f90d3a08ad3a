"""The options of :func:`fcos_ext.postprocess`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .grids import Grid, check_grid

#: As many as the kernels take in one launch.
MAX_LEVELS = 8


@dataclass(frozen=True)
class PostprocessOptions:
    """What :func:`postprocess` does with the outputs of a network."""

    strides: tuple[int | Grid, ...] = (8, 16, 32, 64, 128)
    """Pixels between two locations of each level, finest level first; or a :class:`Grid`, whose
    ``reach`` does not matter here. One for each level, also where anchors are given instead."""
    normalize_ltrb: bool = True
    """Distances are in strides of their level, or sides of their anchor; False: in pixels."""
    coding: Literal["ltrb", "deltas"] = "ltrb"
    """What is regressed: distances from the location to left, top, right and bottom side; or, of
    each anchor, the way to the centre of the box (x, y) in its sides, and the logarithms of the
    sides of the box (width, height) in its own, as in arXiv 1506.01497."""
    delta_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """That the deltas are divided by."""
    delta_limit: float = math.log(1000 / 16)
    """Logarithms of sides are cut off here."""
    score: Literal["sqrt", "product"] = "sqrt"
    """Final score: sqrt(class score * centerness), or the product itself. The order is the same.
    Without centerness it counts as 1."""
    score_threshold: float = 0.05
    """In 0..1, rounded to float32. Scores up to this one are no candidates."""
    threshold_on: Literal["class", "final"] = "class"
    """Which score that is: the class score before it meets the centerness, or the final score."""
    topk_candidates: int = 1000
    """Best candidates kept per level and image; of equal scores the first location, then class."""
    topk_by: Literal["final", "class"] = "final"
    """By which score those are the best. What follows goes by the final score either way."""
    iou_threshold: float = 0.6
    """Of two boxes of one class that overlap by more, the lower-scored one is dropped."""
    max_detections: int = 100
    """Best detections kept per image: D."""
    class_agnostic: bool = False
    """Boxes of all classes suppress each other."""
    corners: Literal["edges", "pixels"] = "edges"
    """Where a predicted box ends: at its right and lower edges; or, as in code that descends from
    maskrcnn-benchmark, at its last column and row of pixels. Then boxes are cut off at one less
    than width and height, and have 1 added to both ends in overlaps, and in the results after they
    were scaled: those end at edges either way."""
    overlaps: Literal["exact", "torchvision", "edges"] = "exact"
    """Of what the overlaps are that NMS compares: of the boxes; or, as in torchvision's
    ``batched_nms`` of up to 1,000 candidates of an image (25,000 on a GPU), of the boxes of each
    class moved to a place of their own, by which coordinates are rounded, the same to the bit; or
    of boxes of pixels as if they ended at edges, so that single columns and rows have no area."""
    clip: bool = True
    """Cut boxes off at the border of the image."""
    keep_empty: bool = False
    """Keep boxes without area, also where that is what clipping left of them."""
    locations: Literal["half_stride", "torchvision"] = "half_stride"
    """Where the locations (x, y) of a level with stride s are: at ``floor(s / 2) + s x`` (the
    paper's), or, as in torchvision's FCOS, at ``x`` times the width of the padded image divided by
    that of the level, rounded down, so that the first one is at 0."""

    def __post_init__(self) -> None:
        plain = [stride for stride in self.strides if not isinstance(stride, Grid)]
        if not 1 <= len(self.strides) <= MAX_LEVELS or any(stride < 1 for stride in plain):
            raise ValueError(
                f"postprocess: strides must be 1 to {MAX_LEVELS} numbers >= 1, got {self.strides}"
            )
        for level, stride in enumerate(self.strides):
            if isinstance(stride, Grid):
                check_grid("postprocess", stride, level)
        for name, choices in (
            ("coding", ("ltrb", "deltas")),
            ("score", ("sqrt", "product")),
            ("threshold_on", ("class", "final")),
            ("topk_by", ("final", "class")),
            ("corners", ("edges", "pixels")),
            ("overlaps", ("exact", "torchvision", "edges")),
            ("locations", ("half_stride", "torchvision")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"postprocess: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        if len(self.delta_weights) != 4 or not all(weight > 0 for weight in self.delta_weights):
            raise ValueError(
                f"postprocess: delta_weights must be 4 numbers above 0, got {self.delta_weights}"
            )
        if not self.delta_limit > -math.inf:
            raise ValueError(f"postprocess: delta_limit must be above -inf, got {self.delta_limit}")
        for name in ("score_threshold", "iou_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"postprocess: {name} must be in [0, 1], got {getattr(self, name)}"
                )
        for name in ("topk_candidates", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"postprocess: {name} must be at least 1, got {getattr(self, name)}"
                )
