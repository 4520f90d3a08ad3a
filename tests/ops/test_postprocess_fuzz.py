"""postprocess on thousands of small pyramids: against the reference, and against torchvision's."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList

from fcos_ext import PostprocessOptions, postprocess_ref
from tests.ops.postprocess_inputs import BACKENDS, Call, assert_same, fuzzed_call, run_on

CASES = 400
"""Of each of the parts that pytest can run apart; 5 of them."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small inputs are done before a second thread has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend: str, part: int) -> None:
    found = dropped = 0
    for seed in range(part * CASES, (part + 1) * CASES):
        call = fuzzed_call(seed)
        expected = call.of(postprocess_ref)
        assert_same(run_on(backend, call, seed), expected)
        found += int(expected.counts.sum())
        dropped += int(expected.dropped.sum())
    assert found > 5 * CASES and dropped > CASES / 2


# ---- torchvision --------------------------------------------------------------------------------


class Backbone(torch.nn.Module):
    out_channels = 32


@functools.cache
def torchvision_model(strides: tuple[int, ...]) -> FCOS:
    """Only its anchors and its postprocess_detections are called."""
    anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
    return FCOS(Backbone(), 2, anchor_generator=anchors)


def as_torchvision(levels: list[Tensor]) -> list[Tensor]:
    """[N, channels, H, W] to [N, H W, channels]."""
    return [x.flatten(2).transpose(1, 2) for x in levels]


def run_torchvision(call: Call) -> list[dict[str, Tensor]]:
    options = call.options
    model = torchvision_model(options.strides)
    model.score_thresh, model.nms_thresh = options.score_threshold, options.iou_threshold
    model.detections_per_img = options.max_detections
    model.topk_candidates = options.topk_candidates
    logits, ltrb, centerness = call.predictions
    assert call.padded_size is not None
    images = torch.zeros(len(call.image_sizes), 3, *call.padded_size, dtype=torch.float64)
    shapes: list[Any] = [tuple(size) for size in call.image_sizes.tolist()]
    anchors = model.anchor_generator(ImageList(images, shapes), logits)
    locations = [x.shape[2] * x.shape[3] for x in logits]
    heads = ("cls_logits", logits), ("bbox_regression", ltrb), ("bbox_ctrness", centerness)
    return model.postprocess_detections(
        {name: as_torchvision(levels) for name, levels in heads},
        [list(a.split(locations)) for a in anchors],
        shapes,
    )


def torchvision_call(rng: random.Random) -> Call:
    """In float64, in which no two scores are nearly equal, and boxes that have an area."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    levels = rng.choice([1, 2, 3])
    strides = tuple(8 * 2**level for level in range(levels))
    padded = 32 * rng.choice([1, 2, 3]) + rng.choice([0, 0, 7]), 32 * rng.choice([1, 2, 4])
    sizes = [(-(-padded[0] // s), -(-padded[1] // s)) for s in strides]

    def noise(channels: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)

    classes, mean = rng.choice([1, 2, 6]), rng.choice([-4.0, -2.0, 1.0])
    predictions = (
        [noise(classes, size) + mean for size in sizes],
        [noise(4, size).abs() + 0.5 for size in sizes],
        [noise(1, size) + 1 for size in sizes],
    )
    options = PostprocessOptions(
        strides=strides,
        normalize_ltrb=True,
        score="sqrt",
        threshold_on="final",
        score_threshold=rng.choice([0.05, 0.2, 0.4]),
        topk_candidates=rng.choice([3, 20, 1000]),
        iou_threshold=rng.choice([0.3, 0.6]),
        max_detections=rng.choice([5, 100]),
        locations="torchvision",
    )
    return Call(predictions, torch.tensor([padded, padded]), options, None, padded)


def has_near_ties(call: Call) -> bool:
    """Scores that float32 does not tell apart, or that lie on the threshold."""
    logits, _, centerness = call.predictions
    for n in range(2):
        scores = torch.cat(
            [
                (x[n].sigmoid() * c[n].sigmoid()).flatten()
                for x, c in zip(logits, centerness, strict=True)
            ]
        )
        limit = torch.tensor([call.options.score_threshold**2], dtype=torch.float64)
        scores = torch.cat([scores[scores > 0.9 * limit], limit]).sort().values
        if bool((scores.diff() < 5e-7 * scores[1:]).any()):
            return True
    return False


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torchvision(backend: str, part: int) -> None:
    rng = random.Random(part)
    cases = 100 if backend == "simt" else 1000
    compared = found = 0
    for _ in range(cases):
        call = torchvision_call(rng)
        if has_near_ties(call):
            continue
        compared += 1
        ours = run_on(backend, call)
        for n, theirs in enumerate(run_torchvision(call)):
            count = len(theirs["scores"])
            found += count
            assert ours.counts[n] == count
            assert torch.equal(ours.labels[n, :count], theirs["labels"])
            close = torch.testing.assert_close
            close(ours.scores[n, :count].double(), theirs["scores"], rtol=1e-6, atol=0)
            close(ours.boxes[n, :count].double(), theirs["boxes"], rtol=1e-6, atol=1e-5)
    assert compared > 0.6 * cases and found > 10 * cases
