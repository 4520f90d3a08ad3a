"""From boxes in a file to losses as each code base does it, against the preset of its name.

Each replay is plain PyTorch for one image after the other, written from a description of that code
base's rules, and knows nothing of the settings here. Left out are the small numbers that keep
divisions finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fcos.losses import assign, fcos_losses, start_of_moving, step_normalizers
from fcos.model import Predictions
from fcos.presets import PRESETS
from tests.detector.dialect_targets import (
    CLASSES,
    Rules,
    Targets,
    make_batch,
    make_truths,
    targets_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(3)


# ---- losses --------------------------------------------------------------------------------------


class Flat(NamedTuple):
    """Predictions in the order of the targets."""

    logits: Tensor
    ltrb: Tensor
    centerness: Tensor


def flat(predictions: Predictions) -> Flat:
    return Flat(
        *(
            torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1).flatten(0, 1)
            for levels in predictions
        )
    )


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed, with alpha 0.25 and gamma 2."""
    one_hot = (labels[:, None] == torch.arange(logits.shape[1])).to(logits)
    p = logits.sigmoid()
    p_t = p * one_hot + (1 - p) * (1 - one_hot)
    alpha_t = 0.25 * one_hot + 0.75 * (1 - one_hot)
    entropy = binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    return (alpha_t * (1 - p_t) ** 2 * entropy).sum()


def overlaps(pred: Tensor, truth: Tensor, one: float) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of distances, with ``one`` added to intersection and union of the former."""
    areas = [(x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (pred, truth)]
    low, high = torch.minimum(pred, truth), torch.maximum(pred, truth)
    common = (low[:, 0] + low[:, 2]) * (low[:, 1] + low[:, 3])
    around = (high[:, 0] + high[:, 2]) * (high[:, 1] + high[:, 3])
    union = areas[0] + areas[1] - common
    iou = (common + one) / (union + one)
    return iou, iou - (around - union) / around


def losses_of(
    outputs: Flat,
    targets: Targets,
    one: float = 0.0,
    giou: bool = True,
    weighted: bool = True,
    quality: str = "centerness",
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """cls, box, centerness. ``normalizer``: in place of the number of positives."""
    positive = targets.labels >= 0
    count = max(float(positive.sum()), 1.0) if normalizer is None else normalizer
    iou, generalized = overlaps(outputs.ltrb[positive], targets.ltrb[positive], one)
    box = 1 - generalized if giou else -iou.log()
    centerness = targets.centerness[positive]
    if weighted:
        box = (box * centerness).sum() / centerness.sum()
    else:
        box = box.sum() / count
    learned = centerness if quality == "centerness" else iou
    entropy = binary_cross_entropy_with_logits(
        outputs.centerness[positive, 0], learned, reduction="sum"
    )
    return focal(outputs.logits, targets.labels) / count, box, entropy / count


class Family(NamedTuple):
    rules: Rules
    losses: Callable[[Flat, Targets], tuple[Tensor, Tensor, Tensor]]
    preset: str


def detectron2_losses(outputs: Flat, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    positives = max(int((targets.labels >= 0).sum()), 1)
    return losses_of(outputs, targets, weighted=False, normalizer=0.9 * 300 + 0.1 * positives)


def plain(outputs: Flat, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    return losses_of(outputs, targets)


FAMILIES = {
    "original": Family(
        Rules(one=1, radius=0.0, in_strides=False),
        lambda outputs, targets: losses_of(outputs, targets, one=1.0, giou=False),
        "original",
    ),
    "original-imprv": Family(
        Rules(one=1),
        lambda outputs, targets: losses_of(outputs, targets, one=1.0),
        "original-imprv",
    ),
    "adelaidet": Family(
        Rules(), lambda outputs, targets: losses_of(outputs, targets, one=1.0), "adelaidet"
    ),
    "adelaidet-iou": Family(
        Rules(),
        lambda outputs, targets: losses_of(
            outputs, targets, one=1.0, weighted=False, quality="iou"
        ),
        "adelaidet-iou",
    ),
    "adelaidet-rt": Family(
        Rules(), lambda outputs, targets: losses_of(outputs, targets, one=1.0), "adelaidet-rt"
    ),
    "detectron2": Family(Rules(strict=True), detectron2_losses, "detectron2"),
    "torchvision": Family(
        Rules(strict=True, from_zero=True),
        lambda outputs, targets: losses_of(outputs, targets, weighted=False),
        "torchvision",
    ),
    "mmdet": Family(
        Rules(radius=0.0, in_strides=False),
        lambda outputs, targets: losses_of(outputs, targets, giou=False),
        "mmdet",
    ),
    "mmdet-tricks": Family(Rules(), plain, "mmdet-tricks"),
    # whose focal loss is divided by positives and images together, which is not here
    "rosinality": Family(
        Rules(one=1, in_strides=False),
        lambda outputs, targets: losses_of(outputs, targets, one=1.0),
        "rosinality",
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_replay(name: str, seed: int) -> None:
    family = FAMILIES[name]
    config = PRESETS[family.preset]()
    loss_config = config.loss
    model = config.model
    truths = make_truths(seed)
    batch = make_batch(config, truths)
    padded = batch.images.shape[2], batch.images.shape[3]
    targets = assign(padded, model, batch.boxes, batch.labels, batch.counts)
    theirs = targets_of(truths, batch, model.strides, family.rules)
    labels = targets.labels.flatten()
    assert torch.equal(labels, theirs.labels) and (labels >= 0).sum() > 40
    close = torch.testing.assert_close
    close(targets.ltrb.flatten(0, 1), theirs.ltrb, rtol=1e-5, atol=1e-4)
    close(targets.centerness.flatten(), theirs.centerness, rtol=1e-4, atol=1e-5)

    generator = torch.Generator().manual_seed(seed)

    def noise(channels: int, stride: int) -> Tensor:
        size = -(-padded[0] // stride), -(-padded[1] // stride)
        return torch.randn(len(truths), channels, *size, generator=generator)

    unit = {s: 1 if model.normalize_ltrb else s for s in model.strides}
    predictions = Predictions(
        [noise(CLASSES, s) - 1 for s in model.strides],
        [(noise(4, s).abs() + 0.2) * unit[s] for s in model.strides],
        [noise(1, s) for s in model.strides],
    )
    moving = start_of_moving(torch.device("cpu"))
    normalizers = step_normalizers([targets], loss_config, moving)
    ours = fcos_losses(predictions, targets, normalizers, loss_config)
    expected = family.losses(flat(predictions), theirs)
    for key, value in zip(("cls", "box", "centerness"), expected, strict=True):
        close(ours[key], value, rtol=2e-5, atol=0)


def test_where_boxes_end_and_ties_matter() -> None:
    """Else the replays would prove nothing about them."""
    truths = make_truths(0)
    for name, changes in (
        ("original", {"corners": "edges"}),
        ("torchvision", {"locations": "half_stride"}),
        ("detectron2", {"ties": "exact"}),
        ("detectron2", {"boundary": "inclusive"}),
    ):
        config = PRESETS[name]()
        model = replace(config.model, **changes)  # type: ignore[arg-type]
        found = []
        for settings in (config, replace(config, model=model)):
            batch = make_batch(settings, truths)
            padded = batch.images.shape[2], batch.images.shape[3]
            args = (padded, settings.model, batch.boxes, batch.labels, batch.counts)
            found.append(assign(*args))
        same = torch.equal(found[0].labels, found[1].labels)
        assert not same or not torch.equal(found[0].ltrb, found[1].ltrb), changes
