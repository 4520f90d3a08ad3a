"""Which measured rows the README and docs/benchmarks.md show, and the goals they are held to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .harness import OURS, RESULTS

EAGER, COMPILED = "reference, eager", "torch.compile of reference"
Row = dict[str, Any]
Settings = Mapping[str, Any]

_FOCAL: Settings = {"mode": "forward + backward", "form": "rows"}
_FUSED = "fcos_ext, fused gradient"
_LEVELS: Settings = {"mode": "forward + backward", "form": "levels"}
_LOSS: Settings = {"section": "loss, forward and backward"}
_DETECT: Settings = {"section": "post-processing"}


@dataclass(frozen=True)
class Line:
    """A line of the README's table: one case, or several of them, of one benchmark."""

    title: str
    op: str
    cases: Sequence[Settings] = ({},)
    ours: str = OURS
    torchvision: str = "torchvision"
    """Name of the provider."""


LINES = (
    Line(
        "whole loss section + gradient, 2 images, 80 classes: `fcos_loss`",
        "fcos_loss",
        [{"mode": "forward + backward"}],
    ),
    Line(
        "`postprocess`, 2 images, 650 / 4,000 candidates each",
        "postprocess",
        [{"candidates": 650, "layout": "contiguous"}, {"candidates": 4000, "layout": "contiguous"}],
    ),
    Line(
        "focal loss + gradient, 44,800 locations, 80 classes, `fused_gradient=True`",
        "sigmoid_focal_loss",
        [_FOCAL],
        _FUSED,
        "torchvision, one-hot made",
    ),
    Line(
        "the same, gradient recomputed in the backward pass",
        "sigmoid_focal_loss",
        [_FOCAL],
        torchvision="torchvision, one-hot made",
    ),
    Line(
        "GIoU and centerness loss + gradient, 44,800 locations",
        "iou_loss",
        [{"mode": "forward + backward"}],
        torchvision="torchvision, compacted",
    ),
    Line(
        "target assignment, 2 images, 22,400 locations, 8 / 50 / 500 boxes",
        "assign_targets",
        [{"boxes": boxes} for boxes in (8, 50, 500)],
    ),
    Line(
        "`nms`, 5,000 boxes / of which the first 100",
        "nms",
        [
            {"mode": mode, "shape": [5000, 4], "boxes": "random", "groups": 1}
            for mode in ("keep all", "keep 100")
        ],
    ),
    Line(
        "`batched_nms`, 5,000 boxes, 80 classes",
        "nms",
        [{"mode": "keep all", "shape": [5000, 4], "boxes": "random", "groups": 80}],
    ),
    Line(
        "`padded_batched_nms`, 16 images of 5,000 boxes, 100 each",
        "padded_batched_nms",
        [{"shape": [16, 5000]}],
        torchvision="torchvision, image by image",
    ),
)


@dataclass(frozen=True)
class Goal:
    """How many times our time another provider is to take, in every case that it names."""

    title: str
    op: str
    against: str
    at_least: float
    where: Settings = field(default_factory=dict)
    ours: str = OURS
    suffix: str = ""
    """Of the file of results."""


GOALS = (
    Goal("focal loss + gradient, recomputed", "sigmoid_focal_loss", EAGER, 10, _FOCAL),
    Goal("focal loss + gradient, recomputed", "sigmoid_focal_loss", COMPILED, 4, _FOCAL),
    Goal("focal loss + gradient, recomputed, levels", "sigmoid_focal_loss", EAGER, 10, _LEVELS),
    Goal("focal loss + gradient, recomputed, levels", "sigmoid_focal_loss", COMPILED, 4, _LEVELS),
    Goal("focal loss + gradient, fused", "sigmoid_focal_loss", EAGER, 10, _FOCAL, _FUSED),
    Goal("focal loss + gradient, fused", "sigmoid_focal_loss", COMPILED, 4, _FOCAL, _FUSED),
    Goal(
        "focal loss + gradient, AVX2", "sigmoid_focal_loss", EAGER, 5, _FOCAL, OURS, "-avx2"
    ),
    Goal(
        "focal loss + gradient, AVX2", "sigmoid_focal_loss", COMPILED, 2, _FOCAL, OURS, "-avx2"
    ),
    Goal("GIoU and centerness + gradient", "iou_loss", EAGER, 5, {"mode": "forward + backward"}),
    Goal("assignment, 8 boxes", "assign_targets", "torchvision", 100, {"boxes": 8}),
    Goal("assignment, 50 boxes", "assign_targets", "torchvision", 300, {"boxes": 50}),
    Goal("assignment, 500 boxes", "assign_targets", "torchvision", 1000, {"boxes": 500}),
    Goal(
        "`nms`, 5,000 boxes", "nms", "torchvision", 1.5,
        {"mode": "keep all", "shape": [5000, 4], "boxes": "random", "groups": 1},
    ),
    Goal(
        "`nms`, 5,000 boxes, first 100", "nms", "torchvision", 8,
        {"mode": "keep 100", "shape": [5000, 4], "boxes": "random", "groups": 1},
    ),
    *(
        Goal(
            f"`batched_nms`, {boxes:,} {kind} boxes", "nms", "torchvision", 4,
            {"mode": "keep all", "shape": [boxes, 4], "boxes": kind, "groups": 80},
        )
        for boxes in (1000, 5000)
        for kind in ("random", "clustered")
    ),
    Goal("loss section + gradient", "fcos_loss", "torchvision", 8),
    Goal("loss section + gradient", "fcos_loss", COMPILED, 3),
    Goal("post-processing, 650 candidates", "postprocess", "torchvision", 5, {"candidates": 650}),
    Goal(
        "post-processing, 4,000 candidates", "postprocess", "torchvision", 20,
        {"candidates": 4000},
    ),
    Goal("`accelerate`: loss section + gradient", "accelerate", "torchvision", 7.2, _LOSS),
    *(
        Goal(
            f"`accelerate`: post-processing, {candidates} candidates", "accelerate",
            "torchvision", goal, {**_DETECT, "candidates an image": candidates},
        )
        for candidates, goal in (
            ("about 90", 4.5), ("about 1,500", 18), ("about 5,000", 18), ("about 50,000", 18),
        )
    ),
)  # fmt: skip


class Figures:
    """The committed rows of a kind of device."""

    def __init__(self, device: str = "cpu", folder: Path = RESULTS) -> None:
        self._device, self._folder = device, folder
        self._rows: dict[str, list[Row]] = {}

    def rows(self, op: str, where: Settings, suffix: str = "") -> list[Row]:
        """Those of the cases that ``where`` names, in float32 and with most threads."""
        name = f"{op}-{self._device}{suffix}.json"
        if name not in self._rows:
            path = self._folder / name
            self._rows[name] = json.loads(path.read_text()) if path.exists() else []
        wanted = {"dtype": "float32", "threads": 2} | dict(where)
        return [
            row
            for row in self._rows[name]
            if all(row.get(key, value) == value for key, value in wanted.items())
            and all(key in row for key in where)
        ]

    def files(self) -> list[Path]:
        """Of timed rows, one for each benchmark and kind of machine."""
        return sorted(
            path
            for path in self._folder.glob("*-c*.json")
            if "-cpu" in path.stem or "-cuda" in path.stem
        )

    def all_rows(self, part: str = "") -> list[Row]:
        """Timed rows of the files in whose names ``part`` is: "cuda", or all."""
        files = [path for path in self.files() if part in path.stem]
        rows = [row for path in files for row in json.loads(path.read_text())]
        return [row for row in rows if "median_ms" in row]

    def ratios(self, goal: Goal) -> list[float]:
        """Of the other provider's time to ours, case by case."""
        rows = self.rows(goal.op, goal.where, goal.suffix)
        return [
            theirs[goal.against]["median_ms"] / theirs[goal.ours]["median_ms"]
            for theirs in by_case(rows)
            if goal.against in theirs and goal.ours in theirs
        ]


def by_case(rows: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """Timed rows of each line-up, by provider. Rows of one follow each other in a file."""
    case: dict[str, Row] = {}
    for row in rows:
        if row["provider"] in case:
            yield case
            case = {}
        if "median_ms" in row:
            case[row["provider"]] = row
    if case:
        yield case
