"""postprocess: what the best candidates of a level are, and where boxes end, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fcos_ext import PostprocessOptions, postprocess_ref
from tests.ops.postprocess_inputs import BACKENDS, NAN, Call, assert_same, make_call, run_on


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def row_call(
    cls: list[list[float]], centerness: list[float], ltrb: list[list[float]], **options: Any
) -> Call:
    """One level of stride 8 with a row of locations at (4, 4), (12, 4) ...: scores of each
    location's classes and of its centerness, and distances in pixels."""
    logits = torch.tensor([[logit(score) for score in scores] for scores in cls])
    weights = torch.tensor([logit(score) for score in centerness])
    n = len(centerness)
    return Call(
        (
            [logits.t().reshape(1, -1, 1, n)],
            [torch.tensor(ltrb).t().reshape(1, 4, 1, n)],
            [weights.reshape(1, 1, 1, n)],
        ),
        torch.tensor([[20, 40]]),
        PostprocessOptions(
            **({"strides": (8,), "normalize_ltrb": False, "score": "product"} | options)
        ),
    )


# ---- which candidates are the best ----


@pytest.mark.parametrize("threshold_on", ["class", "final"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_by(backend: str, threshold_on: Any) -> None:
    """Class scores 0.9, 0.8 and 0.7 with centerness 0.2, 0.5 and 0.9: products 0.18, 0.4, 0.63."""
    call = row_call(
        [[0.9, 0.1], [0.1, 0.8], [0.7, 0.1]],
        [0.2, 0.5, 0.9],
        [[2.0] * 4] * 3,
        topk_candidates=2,
        threshold_on=threshold_on,
    )
    for topk_by, labels, scores in (("final", [0, 1], [0.63, 0.4]), ("class", [1, 0], [0.4, 0.18])):
        options = replace(call.options, topk_by=topk_by)
        found = run_on(backend, call._replace(options=options))
        assert found.counts.tolist() == [2] and found.labels[0, :2].tolist() == labels
        torch.testing.assert_close(found.scores[0, :2], torch.tensor(scores))
    # without a centerness it is the same
    alone = call._replace(predictions=(*call.predictions[:2], None))
    found = [
        run_on(backend, alone._replace(options=replace(alone.options, topk_by=topk_by)))
        for topk_by in ("final", "class")
    ]
    assert_same(*found)


@pytest.mark.parametrize("threshold_on", ["class", "final"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_by_class_does_not_ask_the_centerness(
    backend: str, layout: str, threshold_on: Any
) -> None:
    """Where it is low but does not fail, candidates of high class scores take their places; and
    those whose centerness is not a number are counted however many better ones there are."""
    large = backend == "cuda"
    call = make_call(
        classes=5,
        sizes=((64, 96),) if large else ((16, 24),),
        mean=1.0,
        layout=layout,
        topk_candidates=30,
        topk_by="class",
        threshold_on=threshold_on,
        score_threshold=0.01,
    )
    centerness = call.predictions[2]
    assert centerness is not None
    centerness[0][:, :, ::2] = -3.0
    centerness[0][:, :, -1, ::3] = NAN
    found, expected = run_on(backend, call), call.of(postprocess_ref)
    assert_same(found, expected)
    by_final = call._replace(options=replace(call.options, topk_by="final")).of(postprocess_ref)
    assert not torch.equal(found.scores, by_final.scores)
    assert torch.equal(found.dropped, by_final.dropped) and found.dropped.min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_equal_products(backend: str) -> None:
    """0.75 * 0.5 and 0.5 * 0.75: of equal final scores the higher class score comes first, and
    suppresses the other, if that is what candidates are ranked by."""
    call = row_call([[0.5], [0.75]], [0.75, 0.5], [[8.0] * 4] * 2, iou_threshold=0.3)
    # as float32 has them
    logits = torch.tensor([0.0, logit(0.75)])
    call = call._replace(
        predictions=(
            [logits.reshape(1, 1, 1, 2)],
            call.predictions[1],
            [logits.flip(0).reshape(1, 1, 1, 2)],
        )
    )
    for topk_by, first in (("final", 0.0), ("class", 4.0)):
        found = run_on(backend, call._replace(options=replace(call.options, topk_by=topk_by)))
        assert found.counts.tolist() == [1] and found.boxes[0, 0, 0] == first


# ---- where boxes end ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_of_pixels(backend: str) -> None:
    """An image of 20 x 40: last row 19, last column 39."""
    call = row_call(
        [[0.9], [0.1], [0.1], [0.8], [0.7]],
        [0.9] * 5,
        [[1.0, 2.0, 3.0, 4.0]] * 3 + [[9.0, 9.0, 90.0, 90.0], [4.0, 0.0, 2.0, 0.0]],
        corners="pixels",
        score_threshold=0.5,
    )
    # Of the third, one row of pixels is left: an area of 7.
    found = run_on(backend, call)
    assert found.counts.tolist() == [3]
    assert found.boxes[0, :3].tolist() == [[3, 2, 8, 9], [19, 0, 40, 20], [32, 4, 39, 5]]
    # Scaled as they are predicted: 1 is added afterwards.
    twice = run_on(backend, call._replace(original_sizes=torch.tensor([[40, 120]])))
    assert twice.boxes[0, :3].tolist() == [[9, 4, 22, 17], [57, 0, 118, 39], [96, 8, 115, 9]]
    # Without area where the 1 is not added.
    corners = replace(call.options, overlaps="edges")
    assert run_on(backend, call._replace(options=corners)).counts.tolist() == [2]
    kept = call._replace(options=replace(corners, keep_empty=True))
    assert torch.equal(run_on(backend, kept).boxes, found.boxes)
    unclipped = call._replace(options=replace(call.options, clip=False))
    assert run_on(backend, unclipped).boxes[0, 1].tolist() == [19, -5, 119, 95]


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlaps_of_boxes_of_pixels(backend: str) -> None:
    """Columns 0 to 3 and 2 to 5 of one row of pixels: 2 of 6 in common; as coordinates 1 of 5."""
    call = row_call(
        [[0.9], [0.8]],
        [0.9, 0.9],
        [[4.0, 4.0, -1.0, -1.0], [10.0, 4.0, -7.0, -1.0]],
        corners="pixels",
    )
    for overlaps, threshold, count in (
        ("exact", 0.34, 2),
        ("exact", 0.3, 1),
        ("torchvision", 0.3, 1),
        ("edges", 0.3, 2),
        ("edges", 0.16, 1),
    ):
        options = replace(call.options, overlaps=overlaps, iou_threshold=threshold)
        found = run_on(backend, call._replace(options=options))
        assert found.counts.tolist() == [count]
        assert found.boxes[0, 0].tolist() == [0, 0, 4, 4]
        assert_same(found, call._replace(options=options).of(postprocess_ref))
