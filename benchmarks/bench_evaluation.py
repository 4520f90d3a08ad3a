"""From detections, as dicts in COCO's format, to COCO's 12 numbers: 1,000 images, 100 of them each.

    FCOS_COCO_BOXES=instances_val2017.json python -m benchmarks.bench_evaluation [--quick]

Compared is pycocotools by itself, with ``loadRes`` and ``COCOeval`` as its demo has them; the
numbers have to be the same. Ours checks the entries first and adds curves and figures by class, and
pycocotools does the matching in both: what can be shown here is that the rest costs next to
nothing.

Ground truth is that of the first images of the file named in FCOS_COCO_BOXES, or, without it, made
up with COCO's statistics. Detections are copies of true boxes, a little off, and clutter.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos.evaluate import evaluate_coco

from . import shapes
from .harness import OURS, Case, Results, main

OP = "evaluation"
VARIABLE = "FCOS_COCO_BOXES"
DETECTIONS = 100
HEIGHT, WIDTH = 480, 640
#: Names of the 12 numbers, in pycocotools' order.
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
#: Of a detection of a true box: its offset and the logarithm of its scale, as parts of the sides.
JITTER = 0.1
TRUE_SHARE, SAME_CLASS_SHARE = 0.4, 0.5
Content = dict[str, Any]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    """None on a GPU, which has no part in it."""
    if device.type == "cuda":
        return []
    return [make_case(20 if quick else 1000)]


def make_case(images: int) -> Case:
    @functools.cache
    def data() -> tuple[Content, list[Content]]:
        path = os.environ.get(VARIABLE)
        truth = made_up(images) if path is None else beginning_of(Path(path), images)
        return truth, detections_for(truth)

    def provider(evaluate: Callable[[Content, list[Content]], Sequence[float]]) -> Any:
        def run() -> Results:
            return (torch.tensor(evaluate(*data()), dtype=torch.float64),)

        return run

    return Case(
        settings={
            "boxes": "COCO's" if VARIABLE in os.environ else "made up",
            "shape": [images, DETECTIONS],
            "threads": 1,
        },
        device=torch.device("cpu"),
        make_inputs=lambda seed: (),
        providers={OURS: provider(ours), "pycocotools": provider(pycocotools)},
        reference=provider(pycocotools),
        environment=f"{VARIABLE}=instances_val2017.json" if VARIABLE in os.environ else "",
        tolerance=0.0,
    )


def ours(truth: Content, results: list[Content]) -> Sequence[float]:
    metrics = evaluate_coco(truth, results)
    numbers = [getattr(metrics, name) for name in NUMBERS]
    return [-1.0 if number is None else number for number in numbers]


def pycocotools(truth: Content, results: list[Content]) -> Sequence[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers: Sequence[float] = evaluation.stats.tolist()
    return numbers


# ---- ground truth and detections ----------------------------------------------------------------


def beginning_of(path: Path, images: int) -> Content:
    """The first images of a COCO file, and what is on them."""
    content = json.loads(path.read_text())
    chosen = content["images"][:images]
    ids = {image["id"] for image in chosen}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    categories = content["categories"]
    return {"images": chosen, "annotations": annotations, "categories": categories}


def made_up(images: int) -> Content:
    """As in COCO: 7.3 boxes an image and most images with fewer, a third of the first class, the
    root of the area log-normal around 62 pixels, one in a hundred a crowd."""
    random = np.random.default_rng(0)
    classes = shapes.NUM_CLASSES
    weights = 1 / np.arange(2, classes + 2) ** 1.1
    weights[0] = weights[1:].sum() / 2
    annotations: list[Content] = []
    for image in range(1, images + 1):
        count = min(60, int(random.lognormal(1.5, 1.0)))
        for category in random.choice(classes, count, p=weights / weights.sum()):
            side, shape = np.exp([random.normal(4.13, 1.07), random.normal(0, 0.37)])
            width, height = min(side * shape, WIDTH), min(side / shape, HEIGHT)
            x, y = random.uniform(0, WIDTH - width), random.uniform(0, HEIGHT - height)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(category) + 1,
                    "bbox": np.round([x, y, width, height], 2).tolist(),
                    "area": float(0.6 * width * height),
                    "iscrowd": int(random.random() < 0.01),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
    }


def detections_for(truth: Content) -> list[Content]:
    """``DETECTIONS`` of each image, those of true boxes with the higher scores on the average."""
    random = np.random.default_rng(1)
    categories = [category["id"] for category in truth["categories"]]
    of_image = defaultdict(list)
    for annotation in truth["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    results = []
    for image in truth["images"]:
        known = of_image[image["id"]]
        size = np.array([image["width"], image["height"]])
        for _ in range(DETECTIONS):
            one = known[random.integers(len(known))] if known else None
            if one is not None and random.random() < TRUE_SHARE:
                corner, sides = np.split(np.array(one["bbox"]), 2)
                box = corner + JITTER * random.standard_normal(2) * sides
                sides = sides * np.exp(JITTER * random.standard_normal(2))
                category, score = one["category_id"], random.beta(4, 2)
            else:
                box, sides = random.uniform(0, 0.8, 2) * size, random.uniform(0.02, 0.3, 2) * size
                same = one is not None and random.random() < SAME_CLASS_SHARE
                category = one["category_id"] if same else random.choice(categories)
                score = random.beta(1, 4)
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": int(category),
                    "bbox": [*box.tolist(), *sides.tolist()],
                    "score": float(score),
                }
            )
    return results


if __name__ == "__main__":
    sys.exit(main(OP, cases))
