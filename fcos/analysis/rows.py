"""The counts of an analysis by level, by size, by class, and box by box."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .advice import advice
from .analyze import LEARNED, REASONS, Analysis


class LevelRow(NamedTuple):
    """A feature level."""

    name: str
    stride: int
    size_range: tuple[float, float]
    locations: int
    """Over all pictures."""
    positives: int
    """Locations that learn a box."""
    ambiguous: int
    """Positives in more than one box."""
    ambiguous_classes: int
    """Positives in boxes of more than one class."""
    boxes: int
    """Boxes that the level learns; a box may be learned by several levels."""


class SizeRow(NamedTuple):
    """Boxes of about one size."""

    low: float
    """Of sqrt(width * height) in pixels of the resized picture, included."""
    high: float
    """Excluded."""
    boxes: int
    learned: int
    """Boxes that have at least one location."""
    positives: int
    positives_per_box: float
    """Median, of all the boxes."""
    level_positives: tuple[int, ...]
    """Positives of each level."""

    @property
    def name(self) -> str:
        if math.isinf(self.high):
            return f"from {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


class ClassRow(NamedTuple):
    """A class."""

    name: str
    boxes: int
    learned: int


class LostBox(NamedTuple):
    """A box that no location learns."""

    image_id: int
    file_name: str
    class_name: str
    bbox: tuple[float, float, float, float]
    """x, y, width, height in the file's pixels."""
    size: tuple[float, float]
    """Width and height in the resized picture."""
    reason: str
    """Of ``fcos.analyze.REASONS``."""
    twin: bool
    """Another box nearly coincides with it."""


def by_level(analysis: Analysis) -> list[LevelRow]:
    """A row for each level."""
    conventions = analysis.conventions
    return [
        LevelRow(*row)
        for row in zip(
            conventions.level_names,
            conventions.strides,
            conventions.size_ranges,
            analysis.locations.tolist(),
            analysis.level_positives.tolist(),
            analysis.level_ambiguous.tolist(),
            analysis.level_ambiguous_classes.tolist(),
            (analysis.positives > 0).sum(axis=0).tolist(),
            strict=True,
        )
    ]


def by_size(analysis: Analysis) -> list[SizeRow]:
    """Rows from the smallest to the largest boxes there are; each is twice as large as the last."""
    side = np.sqrt(analysis.sizes.astype(np.float64).prod(axis=1))
    edges = [0.0, *(2.0**power for power in range(3, 10)), math.inf]
    rows = []
    for low, high in zip(edges, edges[1:], strict=False):
        chosen = (side >= low) & (side < high)
        positives = analysis.positives[chosen]
        each = positives.sum(axis=1)
        rows.append(
            SizeRow(
                low,
                high,
                int(chosen.sum()),
                int(analysis.learned[chosen].sum()),
                int(each.sum()),
                float(np.median(each)) if len(each) else 0.0,
                tuple(positives.sum(axis=0).tolist()),
            )
        )
    filled = [i for i, row in enumerate(rows) if row.boxes]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def by_class(analysis: Analysis) -> list[ClassRow]:
    """A row for each class, in the order of the labels."""
    labels, names = analysis.annotations.labels, analysis.annotations.class_names
    boxes = np.bincount(labels, minlength=len(names))
    learned = np.bincount(labels[analysis.learned], minlength=len(names))
    return [ClassRow(*row) for row in zip(names, boxes.tolist(), learned.tolist(), strict=True)]


def lost_boxes(analysis: Analysis) -> list[LostBox]:
    """The boxes that no location learns, the largest first."""
    annotations = analysis.annotations
    owners = np.repeat(np.arange(len(annotations.image_ids)), np.diff(annotations.offsets))
    lost = np.flatnonzero(analysis.reasons != LEARNED)
    largest_first = np.argsort(-analysis.sizes[lost].prod(axis=1), kind="stable")
    boxes = []
    for index in lost[largest_first].tolist():
        height, width = analysis.sizes[index].tolist()
        boxes.append(
            LostBox(
                int(annotations.image_ids[owners[index]]),
                os.fsdecode(annotations.file_names[owners[index]]),
                annotations.class_names[annotations.labels[index]],
                _xywh(annotations.boxes[index]),
                (round(width, 2), round(height, 2)),
                REASONS[analysis.reasons[index]],
                bool(analysis.twins[index]),
            )
        )
    return boxes


def _xywh(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.tolist()
    return round(x0, 2), round(y0, 2), round(x1 - x0, 2), round(y1 - y0, 2)


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """All of it as plain values, for JSON: what has no number is None, as is an infinite end."""
    counts = np.bincount(analysis.reasons, minlength=len(REASONS)).tolist()
    return _finite(
        {
            "annotations": str(analysis.annotations.path),
            "images": len(analysis.annotations.image_ids),
            "boxes": analysis.boxes,
            "conventions": dataclasses.asdict(analysis.conventions),
            "best_possible_recall": analysis.recall,
            "ambiguous": analysis.ambiguous,
            "ambiguous_of_different_classes": analysis.ambiguous_classes,
            "positives": int(analysis.level_positives.sum()),
            "advice": advice(analysis),
            "levels": [row._asdict() for row in by_level(analysis)],
            "sizes": [row._asdict() for row in by_size(analysis)],
            "classes": [row._asdict() for row in by_class(analysis)],
            "unlearned": dict(zip(REASONS[1:], counts[1:], strict=True)),
            "unlearned_boxes": [box._asdict() for box in lost_boxes(analysis)],
        }
    )


def _finite(value: Any) -> Any:
    """With lists for tuples and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
