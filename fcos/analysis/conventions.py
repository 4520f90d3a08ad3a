"""What decides which location learns which box: the geometry of a preset, and how boxes are read.

The published FCOS disagree on the details, and so do their figures: each detail is a field here.
This module imports neither torch nor anything heavy: the command line starts from it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config import Config, ConfigError
from ..presets import paper

Boundary = Literal["inclusive", "strict", "half_open"]
Resize = Literal["round", "truncate", "torchvision", "opencv", "none"]
Corners = Literal["edges", "pixels"]


@dataclass(frozen=True)
class Conventions:
    """From a box in a file to the locations that learn it."""

    strides: tuple[int, ...]
    """Of the feature levels, in pixels."""
    size_ranges: tuple[tuple[float, float], ...]
    """Per level, the range in pixels that max(l, t, r, b) must fall into."""
    boundary: Boundary = "inclusive"
    """Whether a size range contains its ends: both, neither, or only the lower one."""
    center_sampling_radius: float = 1.5
    """Positives lie within radius * stride of the box centre; 0: anywhere inside the box."""
    ties: Literal["exact", "torchvision"] = "exact"
    """Which of several boxes a location learns; see ``fcos.config.ModelConfig``."""
    locations: Literal["half_stride", "torchvision"] = "half_stride"
    """Where locations are; likewise. Of torchvision's, those of a picture that is alone in its
    batch."""
    min_size: int = 800
    """Shorter side of the picture after resizing, in pixels."""
    max_size: int = 1333
    """The longer side is never resized beyond this."""
    resize: Resize = "round"
    """New sizes are rounded to the nearest pixel, as in OpenCV's rule; or truncated, as Python's
    int() and so the original code has it; or rounded down, as in torchvision; or the pictures keep
    the size of their file."""
    corners: Corners = "edges"
    """Where a box ends: at its right and lower edge, x + width; or at its last pixel,
    x + width - 1, before resizing, as the original code has it, by which areas have 1 added to both
    sides."""
    crowd: bool = False
    """Crowd boxes are boxes like all others, instead of left out."""

    def __post_init__(self) -> None:
        rules = [
            (
                "strides",
                bool(self.strides) and all(s >= 1 for s in self.strides) and len(self.strides) < 33,
                "1 to 32 whole numbers >= 1",
            ),
            (
                "size_ranges",
                len(self.size_ranges) == len(self.strides)
                and all(low <= high for low, high in self.size_ranges),
                f"a pair low <= high for each of the {len(self.strides)} strides",
            ),
            (
                "center_sampling_radius",
                0 <= self.center_sampling_radius < math.inf,
                ">= 0 and finite",
            ),
            ("min_size", self.min_size >= 1, ">= 1"),
            ("max_size", self.max_size >= 1, ">= 1"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name} must be {rule}, got {getattr(self, name)}")

    @property
    def level_names(self) -> tuple[str, ...]:
        """P3 for stride 8, P4 for 16 and so on; a stride that is no power of two by its number."""
        return tuple(
            f"P{s.bit_length() - 1}" if s & (s - 1) == 0 else f"stride {s}" for s in self.strides
        )

    def only(self, levels: Sequence[str]) -> Conventions:
        """With these levels alone, by name.

        The first of them also learns what is smaller than its range, and the last what is larger,
        so that a single level learns boxes of any size.

        Raises:
            ConfigError: A name is unknown, or there is none.
        """
        names = self.level_names
        if not levels:
            raise ConfigError("levels must name at least one level")
        for name in levels:
            if name not in names:
                near = difflib.get_close_matches(name.upper(), names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown level {name}; known are {', '.join(names)}{hint}")
        kept = [i for i, name in enumerate(names) if name in levels]
        ranges = [self.size_ranges[i] for i in kept]
        ranges[0] = (0.0, ranges[0][1])
        ranges[-1] = (ranges[-1][0], math.inf)
        return replace(
            self, strides=tuple(self.strides[i] for i in kept), size_ranges=tuple(ranges)
        )


def conventions_of(config: Config) -> Conventions:
    """Those that training and evaluation with these settings follow.

    Where training draws among several sizes (``data.min_sizes``), the one of evaluation, the last.
    """
    return Conventions(
        strides=config.model.strides,
        size_ranges=config.model.size_ranges,
        boundary=config.model.boundary,
        center_sampling_radius=config.model.center_sampling_radius,
        min_size=config.data.min_sizes[-1],
        max_size=config.data.max_size,
        resize=config.data.resize,
        ties=config.model.ties,
        locations=config.model.locations,
        corners=config.model.corners,
    )


def paper_conventions() -> Conventions:
    """Those of the recall and ambiguity tables of arXiv 1904.01355, tables 1 and 2.

    The ``paper`` preset's levels at 800 x 1333, whole boxes positive, as its authors' code reads
    boxes: sizes truncated, boxes end at their last pixel, crowd boxes left out. Take
    ``.only(["P4"])`` for the rows without a pyramid.
    """
    return replace(
        conventions_of(paper()), min_size=800, max_size=1333, resize="truncate", corners="pixels"
    )
