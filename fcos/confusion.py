"""Which classes are taken for which."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fcos.evaluate import CocoLike, check_results, read_ground_truth


@dataclass(frozen=True)
class Confusion:
    """How often a class was taken for another one."""

    names: tuple[str, ...]
    counts: np.ndarray
    """[C + 1, C + 1] int64: rows true classes, columns detected ones, background last. The last
    column holds boxes that were missed, the last row detections where nothing is."""
    iou_threshold: float
    score_threshold: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self) | {"counts": self.counts.tolist()}


def confusion_matrix(
    ground_truth: CocoLike,
    results: list[dict[str, Any]],
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.3,
) -> Confusion:
    """Match detections to true boxes of any class and count the pairs of classes.

    In each image the detections choose in order of their scores: each takes the true box that it
    overlaps most of those still free. Detections left over that lie in a crowd are not counted.

    Args:
        ground_truth: Annotation file in COCO's format, or its content.
        results: Entries of a COCO results file.
        iou_threshold: Least overlap of a pair.
        score_threshold: Lowest score of a detection that counts.

    Raises:
        EvaluationError: As ``evaluate_coco``.
    """
    truth = read_ground_truth(ground_truth)
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    row = {category["id"]: k for k, category in enumerate(categories)}
    background = len(categories)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    found = _by_image(r for r in check_results(truth, results) if r["score"] >= score_threshold)
    true = _by_image(truth["annotations"])
    for image in truth["images"]:
        boxes = true.get(image["id"], [])
        detections = sorted(found.get(image["id"], []), key=lambda entry: -entry["score"])
        crowd = np.array([bool(box["iscrowd"]) for box in boxes], dtype=bool)
        iou = np.zeros((len(detections), len(boxes)))
        if iou.size:
            # of a crowd, this is the share of the detection that lies in it
            iou[:] = coco_mask.iou(
                [d["bbox"] for d in detections], [b["bbox"] for b in boxes], crowd.tolist()
            )
        free = ~crowd
        for detection, overlap in zip(detections, iou, strict=True):
            predicted = row[detection["category_id"]]
            open_overlap = np.where(free, overlap, -1.0)
            if len(boxes) and open_overlap.max() >= iou_threshold:
                j = int(open_overlap.argmax())
                free[j] = False
                counts[row[boxes[j]["category_id"]], predicted] += 1
            elif not (overlap[crowd] >= iou_threshold).any():
                counts[background, predicted] += 1
        for j in np.flatnonzero(free).tolist():
            counts[row[boxes[j]["category_id"]], background] += 1
    names = tuple(category["name"] for category in categories)
    return Confusion(names, counts, iou_threshold, score_threshold)


def _by_image(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        grouped[entry["image_id"]].append(entry)
    return grouped
