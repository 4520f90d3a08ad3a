"""From outputs to boxes: the preset of each code base against a replay of that code base's steps,
which knows nothing of the settings here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos.config import Config
from fcos.detections import Detections
from fcos.model import Predictions
from fcos.postprocess import PaddedDetections, postprocess
from fcos.presets import PRESETS
from tests.detector.dialect_replays import (
    CLASSES,
    FILES,
    IMAGES,
    KEEP,
    PADDED,
    REPLAYS,
    TOPK,
    levels_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(6)


def make_predictions(config: Config, seed: int) -> Predictions:
    """Boxes of about 1.8 strides to each side, so that neighbours overlap by nearly the thresholds;
    about a sixth of the class scores pass 0.05."""
    generator = torch.Generator().manual_seed(seed)

    def noise(channels: int, stride: int) -> Tensor:
        size = -(-PADDED[0] // stride), -(-PADDED[1] // stride)
        return torch.randn(len(IMAGES), channels, *size, generator=generator)

    strides = config.model.strides
    unit = {s: 1 if config.model.normalize_ltrb else s for s in strides}
    return Predictions(
        [noise(CLASSES, s) * 2 - 5 for s in strides],
        [(noise(4, s) * 0.6 + 1.8).clamp(min=0.05) * unit[s] for s in strides],
        [noise(1, s) for s in strides],
    )


def run(config: Config, predictions: Predictions, **changes: Any) -> PaddedDetections:
    post = replace(
        config.postprocess, **({"topk_candidates": TOPK, "max_detections": KEEP} | changes)
    )
    sizes, files = torch.tensor(IMAGES), torch.tensor(FILES)
    return postprocess(predictions, sizes, files, config.model, post)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REPLAYS)
def test_replay(name: str, seed: int) -> None:
    config = PRESETS[name]()
    predictions = make_predictions(config, seed)
    ours = run(config, predictions)
    for image in range(len(IMAGES)):
        theirs = REPLAYS[name](levels_of(predictions, config.model.strides, image), image)
        count = int(ours.counts[image])
        assert count == len(theirs.scores) > 10
        assert torch.equal(ours.labels[image, :count], theirs.labels)
        close = torch.testing.assert_close
        close(ours.scores[image, :count], theirs.scores, rtol=1e-6, atol=0)
        names = tuple(map(str, range(CLASSES)))
        found = Detections.from_padded(ours, image, names, FILES[image])
        written = torch.tensor([d["bbox"] for d in found.to_coco(1, tuple(range(CLASSES)))])
        close(written, theirs.boxes, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "section", "field", "value"),
    [
        ("original", "model", "corners", "edges"),
        ("original", "postprocess", "overlaps", "edges"),
        ("original", "postprocess", "threshold_on", "final"),
        ("original", "model", "locations", "torchvision"),
        ("adelaidet", "postprocess", "clip", "before_nms"),
        ("detectron2", "postprocess", "threshold_on", "class"),
        ("mmdet", "postprocess", "topk_by", "final"),
        ("mmdet", "postprocess", "score", "sqrt"),
        ("mmdet", "postprocess", "keep_empty", True),
        ("mmdet", "postprocess", "iou_threshold", 0.6),
        ("rosinality", "postprocess", "overlaps", "exact"),
    ],
)
def test_each_switch_matters(name: str, section: str, field: str, value: Any) -> None:
    """Else a replay would prove nothing about it."""
    config = PRESETS[name]()
    assert getattr(getattr(config, section), field) != value
    changed = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    predictions = [make_predictions(config, seed) for seed in SEEDS]
    same = [
        torch.allclose(a.boxes, b.boxes, atol=1e-3) and torch.allclose(a.scores, b.scores)
        for a, b in ((run(config, p), run(changed, p)) for p in predictions)
    ]
    assert not all(same)
