"""Options that ``fcos analyze`` and ``fcos targets`` share. Imports nothing heavy."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import ConfigError
from ..config_files import load_yaml
from ..presets import PRESETS
from .conventions import (
    Boundary,
    Conventions,
    Corners,
    Resize,
    conventions_of,
    paper_conventions,
)


@dataclass(frozen=True, kw_only=True)
class ConventionOptions:
    """Where boxes come from, and which location learns which."""

    data: Path
    """COCO JSON."""
    images: Path | None = None
    """Folder of the pictures. None: "images" beside the JSON, or the JSON's own folder."""
    preset: str | None = None
    """Start from the levels and sizes of this preset. None: improved."""
    config: Path | None = None
    """Start from a YAML file instead, such as runs/NAME/config.yaml."""
    conventions: Literal["ours", "paper"] = "ours"
    """"paper": as the tables of the FCOS paper were made: preset paper, shorter side 800, longer at
    most 1333, --resize truncate, --corners pixels; add --levels P4 for its rows without a pyramid.
    Options below come on top."""
    strides: tuple[int, ...] | None = None
    """Stride of each level in pixels. None: the preset's, as in all that follows."""
    size_ranges: tuple[tuple[float, float], ...] | None = None
    """Per level, the range in pixels that max(l, t, r, b) must fall into: 0 64 64 128 128 inf."""
    levels: tuple[str, ...] = ()
    """Keep only these, such as P4 P5: P3 has stride 8, P4 16 and so on. The first of them then
    learns smaller boxes too, and the last larger ones."""
    boundary: Boundary | None = None
    """Whether a size range contains its ends: both, neither, or only the lower one."""
    center_sampling_radius: float | None = None
    """Positives lie within radius * stride of the box centre; 0: anywhere inside the box."""
    min_size: int | None = None
    """Shorter side of the pictures after resizing. None: the preset's; the last one, that of
    evaluation, where training draws among several."""
    max_size: int | None = None
    """The longer side is never resized beyond this."""
    resize: Resize | None = None
    """New sizes are rounded, with opencv too; truncated, as Python's int() and so the original code
    has it; rounded down, as in torchvision; or none: pictures keep the size of their file. None:
    the preset's."""
    corners: Corners | None = None
    """Boxes end at their right and lower edges, x + width; or at their last pixels, x + width - 1,
    before resizing, as the original code has it. None: the preset's."""
    crowd: bool = False
    """Take crowd boxes for boxes like all others, instead of leaving them out."""

    def resolve(self) -> Conventions:
        """The conventions that all of these stand for.

        Raises:
            ConfigError: The preset, a level or the file is unknown, or a value cannot be.
        """
        if self.preset is not None and self.config is not None:
            raise ConfigError("take one of --preset and --config, not both")
        if self.preset is not None and self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown preset {self.preset}; known are {', '.join(PRESETS)}{hint}")
        in_paper = self.conventions == "paper"
        if self.config is not None:
            config = load_yaml(self.config)
        else:
            config = PRESETS[self.preset or ("paper" if in_paper else "improved")]()
        start = conventions_of(config)
        changes: dict[str, Any] = {"crowd": self.crowd}
        if in_paper:
            paper = paper_conventions()
            for name in ("min_size", "max_size", "resize", "corners"):
                changes[name] = getattr(paper, name)
        for name in (
            *("strides", "size_ranges", "boundary", "center_sampling_radius"),
            *("min_size", "max_size", "resize", "corners"),
        ):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        resolved = replace(start, **changes)
        return resolved.only(self.levels) if self.levels else resolved
