"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Group
from rich.table import Table

CocoLike = str | Path | dict[str, Any]

# The 12 numbers in the order of COCOeval.stats.
_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class EvaluationError(ValueError):
    """Ground truth and results do not belong together, or one of them is malformed."""


@dataclass(frozen=True)
class ClassMetrics:
    """One class: None where the ground truth has no box of it."""

    name: str
    AP: float | None
    AP50: float | None
    boxes: int
    """True boxes of the class, crowds not counted."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision over recall, and F1 over the score threshold, at IoU 0.5.

    NaN in the rows of classes without a true box.
    """

    names: tuple[str, ...]
    recall: np.ndarray
    """[101], 0 to 1."""
    precision: np.ndarray
    """[C, 101]: best precision at this recall or a higher one; its mean is the class's AP50."""
    thresholds: np.ndarray
    """[101], 0 to 1."""
    f1: np.ndarray
    """[C, 101]: of the detections that score at least the threshold."""


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's 12 numbers (https://cocodataset.org/#detection-eval), in 0..1.

    A number is None where the ground truth has no box that it could be measured on: all of them
    without any ground truth, APs and ARs without a small box.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None
    AR1: float | None
    AR10: float | None
    AR100: float | None
    ARs: float | None
    ARm: float | None
    ARl: float | None
    images: int
    boxes: int
    detections: int
    classes: tuple[ClassMetrics, ...]
    curves: PrecisionRecall = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the curves, as plain numbers and strings."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["curves"]
        return values | {"classes": [dataclasses.asdict(c) for c in self.classes]}

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as a JSON file; None becomes null."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def table(self) -> Group:
        """The 12 numbers and the classes, in per cent, for rich to print."""
        summary = Table(
            title=f"{self.images} images, {self.boxes} boxes, {self.detections} detections"
        )
        for name in ("", "all", "IoU 0.50", "IoU 0.75", "small", "medium", "large"):
            summary.add_column(name, justify="right")
        precision = (self.AP, self.AP50, self.AP75, self.APs, self.APm, self.APl)
        recall = (self.AR100, None, None, self.ARs, self.ARm, self.ARl)
        summary.add_row("AP", *map(_percent, precision))
        summary.add_row("AR", *map(_percent, recall))
        summary.add_row("AR 1", _percent(self.AR1))
        summary.add_row("AR 10", _percent(self.AR10))
        per_class = Table("class", title="by class")
        for name in ("AP", "AP50", "boxes"):
            per_class.add_column(name, justify="right")
        for c in self.classes:
            per_class.add_row(c.name, _percent(c.AP), _percent(c.AP50), str(c.boxes))
        return Group(summary, per_class)


def evaluate_coco(
    ground_truth: CocoLike,
    results: list[dict[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
) -> CocoMetrics:
    """Compare detections with ground truth, over all the images of the annotation file.

    Args:
        ground_truth: Annotation file in COCO's format, or its content. Annotations without "area"
            count as width * height large, those without "iscrowd" as no crowd. Not changed.
        results: Entries with "image_id", "category_id", "bbox" (x, y, width, height) and "score".
            None at all is fine, and gives zeros. Not changed.
        image_ids: The images that the detector was run on, if the caller wants to be sure that
            they are those of the annotation file: one left out would count as undetected.

    Raises:
        EvaluationError: An entry is malformed, refers to an image or category that the annotation
            file lacks, or ``image_ids`` are not that file's.
    """
    truth = read_ground_truth(ground_truth)
    found = check_results(truth, results)
    if image_ids is not None:
        _check_images({image["id"] for image in truth["images"]}, set(image_ids))
    # pycocotools reports by printing
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(truth), _index(truth | {"annotations": found}), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = {name: _or_none(value) for name, value in zip(_NAMES, evaluation.stats, strict=True)}
    boxes = Counter(a["category_id"] for a in truth["annotations"] if not a["iscrowd"])
    # precision [IoU thresholds, recalls, categories by ascending id, areas, detection limits]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    classes = tuple(
        ClassMetrics(
            category["name"],
            _or_none(precision[:, :, k].mean()),
            _or_none(precision[0, :, k].mean()),
            boxes[category["id"]],
        )
        for k, category in enumerate(categories)
    )
    return CocoMetrics(
        **numbers,
        images=len(truth["images"]),
        boxes=boxes.total(),
        detections=len(found),
        classes=classes,
        curves=_curves(evaluation, tuple(c.name for c in classes)),
    )


def _curves(evaluation: Any, names: tuple[str, ...]) -> PrecisionRecall:
    params = evaluation.params
    precision = evaluation.eval["precision"][0, :, :, 0, -1].T.copy()
    precision[precision < 0] = np.nan
    thresholds = np.linspace(0, 1, 101)
    f1 = np.full((len(names), len(thresholds)), np.nan)
    stride = len(params.areaRng) * len(params.imgIds)
    for k in range(len(names)):
        # evalImgs runs over categories, then areas ("all" first), then images
        entries = evaluation.evalImgs[k * stride : k * stride + len(params.imgIds)]
        entries = [entry for entry in entries if entry is not None]
        boxes = sum(int((entry["gtIgnore"] == 0).sum()) for entry in entries)
        if not boxes:
            continue
        scores = np.concatenate([entry["dtScores"] for entry in entries])
        counted = ~np.concatenate([entry["dtIgnore"][0] for entry in entries]).astype(bool)
        hit = np.concatenate([entry["dtMatches"][0] > 0 for entry in entries]) & counted
        above = scores[None, :] >= thresholds[:, None]
        # F1 = 2 TP / (boxes + detections)
        f1[k] = 2 * (above & hit).sum(1) / (boxes + (above & counted).sum(1))
    return PrecisionRecall(names, params.recThrs.copy(), precision, thresholds, f1)


def read_ground_truth(source: CocoLike) -> dict[str, Any]:
    """Images, categories and annotations with all the fields that pycocotools needs.

    The objects are new ones. Annotations have "id", "image_id", "category_id", "bbox", "area" and
    "iscrowd".

    Raises:
        EvaluationError: Something is missing or malformed.
    """
    where = "ground_truth" if isinstance(source, dict) else str(source)
    if isinstance(source, dict):
        content = source
    else:
        try:
            content = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{where}: not a JSON file: {error}") from error
    try:
        images = [{"id": image["id"]} for image in content["images"]]
        categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        # Numbered anew from 1: pycocotools takes a match with annotation 0 for no match.
        annotations = [
            {
                "id": number,
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": _finite(a["bbox"], 4),
                "area": float(a.get("area", a["bbox"][2] * a["bbox"][3])),
                "iscrowd": int(a.get("iscrowd", 0)),
            }
            for number, a in enumerate(content["annotations"], start=1)
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EvaluationError(f"{where}: not COCO annotations: {_why(error)}") from error
    truth = {"images": images, "categories": categories, "annotations": annotations}
    _check_references(where, truth, annotations)
    return truth


def check_results(truth: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with all the fields that pycocotools needs, in new objects.

    Raises:
        EvaluationError: An entry is malformed or refers to nothing in the ground truth.
    """
    entries = []
    for number, result in enumerate(results, start=1):
        try:
            box = _finite(result["bbox"], 4)
            (score,) = _finite([result["score"]], 1)
            image_id, category_id = result["image_id"], result["category_id"]
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"results: entry {number - 1} is malformed: {_why(error)}"
            ) from error
        entries.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "score": score,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    _check_references("results", truth, entries)
    return entries


def _why(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _finite(values: Sequence[float], count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"bbox must be 4 finite numbers and score a finite one, got {values}")
    return numbers


def _check_references(where: str, truth: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """pycocotools would leave such entries out without a word."""
    for key, known in (
        ("image_id", {image["id"] for image in truth["images"]}),
        ("category_id", {category["id"] for category in truth["categories"]}),
    ):
        unknown = {entry[key] for entry in entries} - known
        if unknown:
            some = ", ".join(sorted(map(str, unknown))[:5])
            raise EvaluationError(
                f"{where}: {key} must be one of the annotation file's, got {some}"
            )


def _check_images(expected: set[int], evaluated: set[int]) -> None:
    if expected != evaluated:
        raise EvaluationError(
            "evaluate_coco: image_ids must be those of the annotation file, got "
            f"{len(expected - evaluated)} too few and {len(evaluated - expected)} unknown"
        )


def _index(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _or_none(value: float) -> float | None:
    """pycocotools marks what could not be measured with -1."""
    return None if value < 0 else float(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
