"""What a run leaves for a person to look at: pictures, curves, tables."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Config
from .confusion import confusion_matrix
from .data.batches import Batch
from .data.coco import CocoDataset
from .data.images import read_image
from .detections import Detections
from .draw import draw_batch, draw_truth, mosaic
from .environment import environment
from .evaluate import CocoMetrics
from .plots import plot_confusion, plot_label_counts, plot_precision_recall, plot_training
from .run_folder import RunFolder

# Detections below this score are counted by the metrics, but would hide the picture.
DRAWN_SCORE = 0.5


def write_start(folder: Path, config: Config, dataset: CocoDataset, device: torch.device) -> None:
    """env.json and the histogram of the labels."""
    (folder / "env.json").write_text(json.dumps(environment(device), indent=2) + "\n")
    counts: Counter[int] = Counter()
    for i in range(len(dataset)):
        counts.update(dataset.target(i)[1].tolist())
    names = dataset.class_names
    plot_label_counts(names, [counts[label] for label in range(len(names))], folder / "labels.png")


def draw_training_batch(folder: Path, batch: Batch, dataset: CocoDataset, config: Config) -> None:
    """train_batch.jpg: the first batch, augmented as the network sees it."""
    data = config.data
    mean, std = ([v / data.pixel_range for v in values] for values in (data.mean, data.std))
    if data.color_order == "bgr":
        batch, mean, std = (
            dataclasses.replace(batch, images=batch.images.flip(1)),
            mean[::-1],
            std[::-1],
        )
    picture = draw_batch(batch, dataset.class_names, mean, std)
    picture.save(folder / "train_batch.jpg")


def write_evaluation(
    folder: Path,
    metrics: CocoMetrics,
    results: list[dict[str, Any]],
    dataset: CocoDataset,
    annotations: Path,
) -> None:
    """evaluation.json, the curves, the confusion matrix, and val_predictions.jpg."""
    metrics.save(folder / "evaluation.json")
    plot_precision_recall(metrics.curves, folder / "precision_recall.png")
    plot_confusion(
        confusion_matrix(annotations, results, score_threshold=DRAWN_SCORE),
        folder / "confusion.png",
    )
    draw_predictions(results, dataset).save(folder / "val_predictions.jpg")


def plot_training_curves(run: RunFolder) -> None:
    """results.png: losses, learning rate and AP over the iterations."""
    plot_training(run.metrics, run.path / "results.png")


def draw_predictions(results: list[dict[str, Any]], dataset: CocoDataset, limit: int = 12) -> Any:
    """The first images of a data set with their detections; the truth is dashed. A PIL image."""
    label_of = {category: label for label, category in enumerate(dataset.category_ids)}
    by_image: dict[int, list[dict[str, Any]]] = {i: [] for i in dataset.image_ids[:limit]}
    for result in results:
        if result["image_id"] in by_image and result["score"] >= DRAWN_SCORE:
            by_image[result["image_id"]].append(result)
    pictures = []
    for position, found in enumerate(by_image.values()):
        xywh = np.array([r["bbox"] for r in found], dtype=np.float32).reshape(-1, 4)
        boxes = torch.from_numpy(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]))
        detections = Detections(
            boxes=boxes,
            scores=torch.tensor([r["score"] for r in found], dtype=torch.float32),
            labels=torch.tensor([label_of[r["category_id"]] for r in found], dtype=torch.int64),
            names=dataset.class_names,
            image_size=dataset.size(position),
        )
        true_boxes, true_labels = dataset.target(position)
        picture = read_image(dataset.path(position))
        pictures.append(detections.plot(draw_truth(picture, true_boxes, true_labels)))
    return mosaic(pictures)
