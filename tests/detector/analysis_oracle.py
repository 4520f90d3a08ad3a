"""What `analyze` must count, location by location and box by box, and small random data sets.

Coordinates are quarters of a pixel and pictures are resized by powers of two, so that Python's
numbers are exact: ties of area and distances at the very end of a size range happen, and count.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

from fcos.analysis.conventions import Conventions

Document = dict[str, Any]


def random_document(rng: random.Random, images: int = 4) -> Document:
    """Boxes of all sizes, some of them twice, nested, or crowds; three classes."""
    document: Document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)],
    }
    for number in range(1, images + 1):
        height, width = 8 * rng.randint(4, 12), 8 * rng.randint(4, 12)
        document["images"].append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        boxes: list[list[float]] = []
        for _ in range(rng.choice([0, 1, 2, 5, 9])):
            if boxes and rng.random() < 0.2:
                box = rng.choice(boxes)
            else:
                longest = rng.choice([8, 16, 48, 200])
                x, y = (rng.randrange(4 * side - 8) / 4 for side in (width, height))
                w = rng.randint(6, max(6, int(4 * min(width - x, longest)))) / 4
                h = rng.randint(6, max(6, int(4 * min(height - y, longest)))) / 4
                box = [x, y, min(w, width - x), min(h, height - y)]
            boxes.append(box)
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": rng.choice([1, 2, 2, 3]),
                    "bbox": box,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return document


def random_conventions(rng: random.Random) -> Conventions:
    """One to three levels, their ranges adjoining, overlapping or apart."""
    strides = rng.choice([(8,), (4, 8), (8, 16), (4, 8, 16), (3, 5, 32)])
    ends: list[tuple[float, float]] = []
    for level in range(len(strides)):
        low = rng.choice([0, 4, 8, 10]) * level
        ends.append((float(low), rng.choice([low + 8.0, low + 16.5, math.inf])))
    return Conventions(
        strides=strides,
        size_ranges=tuple(ends),
        boundary=rng.choice(["inclusive", "strict", "half_open"]),
        center_sampling_radius=rng.choice([0.0, 0.25, 1.0, 1.5]),
        resize="none",
        corners=rng.choice(["edges", "pixels"]),
        crowd=rng.random() < 0.3,
    )


def write(document: Document, folder: Path) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return path


def expected(document: Document, conventions: Conventions, scale: float = 1.0) -> dict[str, Any]:
    """Counts of a data set whose pictures are resized by `scale`."""
    counts: dict[str, Any] = {
        "recall": [],
        "positives": [],
        "candidates": [],
        "level_positives": Counter(),
        "level_ambiguous": Counter(),
        "level_ambiguous_classes": Counter(),
        "reasons": [],
    }
    for image in document["images"]:
        mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        mine = [a for a in mine if conventions.crowd or not a["iscrowd"]]
        boxes = []
        for annotation in mine:
            x, y, w, h = annotation["bbox"]
            less = 1 if conventions.corners == "pixels" else 0
            boxes.append(tuple(scale * side for side in (x, y, x + w - less, y + h - less)))
        positives: list[Counter[int]] = [Counter() for _ in boxes]
        candidates: list[Counter[int]] = [Counter() for _ in boxes]
        size = (scale * image["height"], scale * image["width"])
        for level, stride in enumerate(conventions.strides):
            for y in range(stride // 2, math.ceil(size[0] / stride) * stride, stride):
                for x in range(stride // 2, math.ceil(size[1] / stride) * stride, stride):
                    may = [
                        i for i, b in enumerate(boxes) if is_candidate(x, y, b, level, conventions)
                    ]
                    for i in may:
                        candidates[i][level] += 1
                    if may:
                        positives[min(may, key=lambda i: (area(boxes[i]), i))][level] += 1
                        counts["level_positives"][level] += 1
                    if len(may) > 1:
                        counts["level_ambiguous"][level] += 1
                    if len({mine[i]["category_id"] for i in may}) > 1:
                        counts["level_ambiguous_classes"][level] += 1
        counts["positives"] += positives
        counts["candidates"] += candidates
        for i, box in enumerate(boxes):
            reason = why(box, positives[i], candidates[i], size, conventions)
            counts["reasons"].append(reason)
    return counts


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def is_candidate(
    x: float, y: float, box: tuple[float, ...], level: int, conventions: Conventions
) -> bool:
    distances = (x - box[0], y - box[1], box[2] - x, box[3] - y)
    low, high = conventions.size_ranges[level]
    longest = max(distances)
    in_range = {
        "inclusive": low <= longest <= high,
        "strict": low < longest < high,
        "half_open": low <= longest < high,
    }[conventions.boundary]
    return min(distances) > 0 and in_range and near_centre(x, y, box, level, conventions)


def near_centre(
    x: float, y: float, box: tuple[float, ...], level: int, conventions: Conventions
) -> bool:
    reach = conventions.center_sampling_radius * conventions.strides[level]
    off = max(abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2))
    return reach == 0 or off < reach


def why(
    box: tuple[float, ...],
    positives: Counter[int],
    candidates: Counter[int],
    size: tuple[float, float],
    conventions: Conventions,
) -> str:
    """The reason in the words of `fcos.analysis.analyze.REASONS`."""
    if positives:
        return ""
    if candidates:
        return "covered"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "outside"
    inside = in_range = False
    for level, stride in enumerate(conventions.strides):
        low, high = conventions.size_ranges[level]
        for y in range(stride // 2, math.ceil(size[0] / stride) * stride, stride):
            for x in range(stride // 2, math.ceil(size[1] / stride) * stride, stride):
                if not (box[0] < x < box[2] and box[1] < y < box[3]):
                    continue
                inside |= stride == min(conventions.strides)
                longest = max(x - box[0], y - box[1], box[2] - x, box[3] - y)
                if conventions.boundary == "inclusive":
                    in_range |= low <= longest <= high
                elif conventions.boundary == "strict":
                    in_range |= low < longest < high
                else:
                    in_range |= low <= longest < high
    if in_range:
        return "off centre"
    return "wrong level" if inside else "between locations"
