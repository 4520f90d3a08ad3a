"""Writes what NMS gets from a trained model: benchmarks/candidates.npz, for ``bench_nms``.

    python -m benchmarks.candidates CHECKPOINT IMAGE [IMAGE ...] [--score-threshold 0.01]

The file holds, of N images, the K best candidates of each, best first, with K as many as the image
with the fewest has: ``boxes`` [N, K, 4] in whole pixels of the file, int16; ``scores`` [N, K],
float16; ``labels`` [N, K], uint8. They are those of the levels together, after threshold and top-k
and clipping to the image.

The committed one is of the model of docs/blood-cells.md, trained for 900 iterations (AP50 0.87 on
bccd/val.json), and of four of the most crowded test images, 00031, 00018, 00041 and 00011, with 19
to 24 true boxes each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fcos
from fcos.config import Config
from fcos.predict import Predictor

FILE = Path(__file__).with_name("candidates.npz")


class Candidates(NamedTuple):
    """Of N images, best first."""

    boxes: Tensor
    """float32 [N, K, 4], whole pixels."""
    scores: Tensor
    """float32 [N, K]"""
    labels: Tensor
    """int64 [N, K]"""


def load(path: Path = FILE) -> Candidates:
    with np.load(path) as file:
        boxes, scores, labels = (torch.from_numpy(file[name]) for name in Candidates._fields)
    return Candidates(boxes.float(), scores.float(), labels.long())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--score-threshold", type=float, default=0.01, help="0.01 by default")
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    found = of_images(options.checkpoint, options.images, options.score_threshold)
    np.savez_compressed(
        options.output,
        boxes=found.boxes.to(torch.int16).numpy(),
        scores=found.scores.half().numpy(),
        labels=found.labels.to(torch.uint8).numpy(),
    )
    images, count = found.scores.shape
    print(f"{options.output}: {count} candidates of each of {images} images")
    return 0


def of_images(checkpoint: Path, images: Sequence[Path], score_threshold: float) -> Candidates:
    """By post-processing without suppression: no two boxes overlap by more than 1."""
    trained = fcos.load(checkpoint, device="cpu")
    settings = trained.config.postprocess
    every = len(trained.config.model.strides) * settings.topk_candidates
    config: Config = replace(
        trained.config,
        postprocess=replace(
            settings, score_threshold=score_threshold, iou_threshold=1.0, max_detections=every
        ),
    )
    predictor = Predictor(trained.network, config, trained.class_names, device="cpu")
    found = [predictor.predict(image, score_threshold=0.0) for image in images]
    count = min(len(one.scores) for one in found)
    return Candidates(
        torch.stack([one.boxes[:count].round() for one in found]),
        torch.stack([one.scores[:count] for one in found]),
        torch.stack([one.labels[:count] for one in found]),
    )


if __name__ == "__main__":
    sys.exit(main())
