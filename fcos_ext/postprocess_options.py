"""The options of :func:`fcos_ext.postprocess`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: As many as the kernels take in one launch.
MAX_LEVELS = 8


@dataclass(frozen=True)
class PostprocessOptions:
    """What :func:`postprocess` does with the outputs of a network."""

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Pixels between two locations of each level, finest level first."""
    normalize_ltrb: bool = True
    """Distances are in strides of their level; False: in pixels."""
    score: Literal["sqrt", "product"] = "sqrt"
    """Final score: sqrt(class score * centerness), or the product itself. The order is the same."""
    score_threshold: float = 0.05
    """In 0..1, rounded to float32. Scores up to this one are no candidates."""
    threshold_on: Literal["class", "final"] = "class"
    """Which score that is: the class score before it meets the centerness, or the final score."""
    topk_candidates: int = 1000
    """Best candidates kept per level and image; of equal scores the first location, then class."""
    iou_threshold: float = 0.6
    """Of two boxes of one class that overlap by more, the lower-scored one is dropped."""
    max_detections: int = 100
    """Best detections kept per image: D."""
    class_agnostic: bool = False
    """Boxes of all classes suppress each other."""
    clip: bool = True
    """Cut boxes off at the border of the image."""
    keep_empty: bool = False
    """Keep boxes that have no area, before or after they are cut off, as torchvision's detectors
    do. They suppress nothing."""
    locations: Literal["half_stride", "torchvision"] = "half_stride"
    """Where the locations (x, y) of a level with stride s are: at ``floor(s / 2) + s x`` (the
    paper's), or, as in torchvision's FCOS, at ``x`` times the width of the padded image divided by
    that of the level, rounded down, so that the first one is at 0."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.strides) <= MAX_LEVELS or min(self.strides) < 1:
            raise ValueError(
                f"postprocess: strides must be 1 to {MAX_LEVELS} numbers >= 1, got {self.strides}"
            )
        for name, choices in (
            ("score", ("sqrt", "product")),
            ("threshold_on", ("class", "final")),
            ("locations", ("half_stride", "torchvision")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"postprocess: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )
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
