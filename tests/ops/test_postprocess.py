"""postprocess: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fcos_ext import Grid, PostprocessOptions, postprocess_ref
from fcos_ext._library import kernels
from tests.ops.postprocess_inputs import (
    BACKENDS,
    INF,
    LAYOUTS,
    NAN,
    SIMT_SEEDS,
    Call,
    assert_same,
    make_call,
    run_on,
)


def test_compiled(device: str) -> None:
    assert device in kernels("postprocess")


# ---- values -------------------------------------------------------------------------------------


def with_empty_boxes(call: Call) -> Call:
    """Where the best scores are."""
    for logits, regression in zip(call.predictions[0], call.predictions[1], strict=True):
        logits[0, 0, ::3, 0], regression[0, :, ::3, 0] = 4.0, 0.0
    return call


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "product"},
        {"threshold_on": "final", "score_threshold": 0.2},
        {"threshold_on": "final", "score_threshold": 0.1, "score": "product"},
        {"score_threshold": 0.0},
        {"score_threshold": 0.4},
        {"normalize_ltrb": False},
        {"topk_candidates": 1},
        {"topk_candidates": 37},
        {"iou_threshold": 0.1},
        {"max_detections": 3},
        {"class_agnostic": True},
        {"clip": False},
        {"locations": "torchvision", "padded_size": (128, 192)},
        {"locations": "torchvision"},
        {"original": False},
        {"keep_empty": True},
        {"corners": "pixels"},
        {"corners": "pixels", "clip": False, "overlaps": "edges"},
        {"with_centerness": False},
        {"with_centerness": False, "score": "product", "threshold_on": "final"},
        {"strides": (8, Grid((15.0, 17.5), (3.0, 5.5), 12.0), 32)},
        {"anchors": True},
        {"anchors": True, "normalize_ltrb": False},
        {"anchors": True, "coding": "deltas"},
        {"anchors": True, "coding": "deltas", "delta_weights": (2.0, 3.0, 4.0, 5.0)},
        {"anchors": True, "coding": "deltas", "delta_limit": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: str, options: dict[str, Any]) -> None:
    standard = with_empty_boxes(make_call()).of(postprocess_ref)
    call = with_empty_boxes(make_call(**options))
    expected = call.of(postprocess_ref)
    assert_same(run_on(backend, call), expected)
    # Each option matters: none is passed to the kernel in the place of another.
    same = all(map(torch.equal, (expected.boxes[:, :3], expected.scores[:, :3]), standard))
    assert (options in ({}, {"iou_threshold": 0.1}) or not same) and expected.counts.min() > 0


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 80, 1203])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_and_layouts(backend: str, layout: str, classes: int) -> None:
    for sizes in (((16, 24), (8, 12)), ((5, 7),)):
        mean = -1.0 if classes < 9 else -5.0
        call = make_call(classes=classes, sizes=sizes, layout=layout, mean=mean, original=False)
        assert_same(run_on(backend, call), call.of(postprocess_ref))


@pytest.mark.parametrize("threshold_on", ["class", "final"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, layout: str, threshold_on: Any) -> None:
    call = make_call(dtype=dtype, layout=layout, threshold_on=threshold_on)
    logits, ltrb, centerness = call.predictions
    assert_same(run_on(backend, call), call.of(postprocess_ref))
    mixed = call._replace(predictions=(logits, [x.float() for x in ltrb], centerness))
    assert_same(run_on(backend, mixed), mixed.of(postprocess_ref))


@pytest.mark.parametrize("topk_by", ["final", "class"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("topk", [1, 40, 1000, 3000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_candidates(backend: str, topk: int, ties: bool, topk_by: Any) -> None:
    """More than the buffer of the CUDA kernels holds, in the simulator and on a GPU."""
    large = backend == "cuda"
    call = make_call(
        classes=5,
        sizes=((64, 96), (32, 48)) if large else ((16, 24), (8, 12)),
        mean=1.0,
        ties=ties,
        topk_candidates=topk,
        topk_by=topk_by,
        score_threshold=0.0,
        max_detections=300,
    )
    assert_same(run_on(backend, call), call.of(postprocess_ref))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("different", [0, 3, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores(backend: str, different: int, layout: str) -> None:
    """So many that no threshold tells them apart: the first locations are taken, then classes."""
    size = (64, 80) if backend == "cuda" else (16, 20)
    call = make_call(
        images=1,
        classes=4,
        sizes=(size,),
        original=False,
        topk_candidates=50,
        max_detections=50,
        iou_threshold=1.0,
    )
    logits, ltrb, centerness = (levels[0] for levels in call.predictions)
    logits.fill_(0.5)
    ltrb.fill_(0.5)
    centerness.fill_(1.0)
    logits.view(-1)[torch.arange(different) * 7 + 100] = 2.0
    call = call._replace(
        predictions=tuple([x.contiguous()] for x in (logits, ltrb, centerness)),  # type: ignore
        image_sizes=torch.tensor([[size[0] * 8, size[1] * 8]]),
    )
    found = run_on(backend, call)
    assert_same(found, call.of(postprocess_ref))
    assert found.counts.tolist() == [50]
    if different == 0:
        assert found.labels[0].tolist() == [i % 4 for i in range(50)]
        assert found.boxes[0, :, 0].tolist() == [8.0 * (i // 4) for i in range(50)]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overlaps_as_torchvision_computes_them(backend: str, many: bool) -> None:
    """Overlaps near the threshold: moved far away, boxes are rounded, which decides. But not if
    there are too many of them."""
    size = (50, 110) if many and backend == "cuda" else (20, 30)
    call = make_call(
        images=3,
        classes=3,
        sizes=(size,),
        mean=1.0 if many else -3.0,
        topk_candidates=30_000,
        max_detections=400,
        score_threshold=0.2,
        threshold_on="final",
        iou_threshold=0.6,
        original=False,
    )
    generator = torch.Generator().manual_seed(0)
    # Of width 4 s, shifted by s: IoU 3 / 5.
    for regression in call.predictions[1]:
        regression[:] = 2 + 3e-6 * torch.randn(regression.shape, generator=generator)
    call = call._replace(options=replace(call.options, clip=False))
    apart = call._replace(options=replace(call.options, overlaps="torchvision"))
    expected, found = call.of(postprocess_ref), run_on(backend, apart)
    if backend != "cuda":  # whose limit is another one
        assert_same(found, apart.of(postprocess_ref))
    same = all(map(torch.equal, found, expected))
    assert same == many and found.counts.min() > 20
    agnostic = apart._replace(options=replace(apart.options, class_agnostic=True))
    assert_same(run_on(backend, agnostic), agnostic.of(postprocess_ref))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deltas_by_hand(backend: str) -> None:
    logits = torch.tensor([-9.0, 2.0, 1.0]).view(1, 1, 1, 3)
    anchors = torch.tensor([[0.0, 0, 1, 1], [10, 20, 30, 60], [100, 100, 104, 108]])
    regression = torch.zeros(1, 4, 1, 3)
    regression[0, :, 0, 1] = torch.tensor([0.5, -0.25, 0.0, 0.0])
    regression[0, :, 0, 2] = torch.tensor([0.0, 0.0, 1000.0, -1000.0])
    options = PostprocessOptions(
        strides=(1,),
        coding="deltas",
        delta_limit=math.log(2),
        score="product",
        max_detections=2,
        keep_empty=True,
    )
    call = Call(([logits], [regression], None), torch.tensor([[999, 999]]), options)
    found = run_on(backend, call._replace(anchors=[anchors]))
    assert found.boxes.tolist() == [[[20, 10, 40, 50], [98, 104, 106, 104]]]
    assert torch.equal(found.scores, torch.tensor([[2.0, 1.0]]).double().sigmoid().float())
    twice = call._replace(options=replace(options, delta_weights=(2.0, 0.5, 1.0, 1.0)))
    found = run_on(backend, twice._replace(anchors=[anchors.to(torch.bfloat16)]))
    assert found.boxes[0, 0].tolist() == [15, 0, 35, 40]


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend: str) -> None:
    """One level of stride 8 and 2 x 3 locations, whose first is at (4, 4)."""
    logits, centerness = torch.full((1, 2, 2, 3), -20.0), torch.zeros(1, 1, 2, 3)
    ltrb = torch.full((1, 4, 2, 3), 1.0)
    logits[0, 1, 0, 2] = 0.0  # at (20, 4), score 1/2 * 1/2
    logits[0, 0, 1, 0] = 20.0  # at (4, 12)
    centerness[0, 0, 1, 0] = 20.0
    ltrb[0, :, 1, 0] = torch.tensor([2.0, 0.25, 0.5, 3.0])
    options = PostprocessOptions(strides=(8,), max_detections=3)
    call = Call(([logits], [ltrb], [centerness]), torch.tensor([[16, 24]]), options)
    found = run_on(backend, call)
    assert found.counts.tolist() == [2] and found.dropped.tolist() == [0]
    assert found.labels.tolist() == [[0, 1, -1]]
    expected = [[[0.0, 10.0, 8.0, 16.0], [12.0, 0.0, 24.0, 12.0], [0.0] * 4]]
    assert found.boxes.tolist() == expected
    assert found.scores.tolist() == [[1.0, 0.5, 0.0]]
    larger = call._replace(original_sizes=torch.tensor([[32, 72]]))
    assert run_on(backend, larger).boxes.tolist() == [
        [[0.0, 20.0, 24.0, 32.0], [36.0, 0.0, 72.0, 24.0], [0.0] * 4]
    ]
    product = call._replace(options=replace(options, score="product", clip=False))
    assert run_on(backend, product).scores.tolist() == [[1.0, 0.25, 0.0]]
    assert run_on(backend, product).boxes[0, 0].tolist() == [-12.0, 10.0, 8.0, 36.0]
    # "up to this one": the class score is 1/2, the final one too
    for threshold_on in ("class", "final"):
        for threshold, count in ((0.5, 1), (0.499999, 2)):
            at = replace(options, score_threshold=threshold, threshold_on=threshold_on)
            assert run_on(backend, call._replace(options=at)).counts.tolist() == [count]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped(backend: str) -> None:
    """What is not a number is counted where it would have been a candidate, and changes nothing."""
    logits, centerness = torch.full((2, 3, 2, 4), -9.0), torch.zeros(2, 1, 2, 4)
    ltrb = torch.full((2, 4, 2, 4), 0.4)
    logits[0, 0, 0, :3] = 2.0
    options = PostprocessOptions(strides=(8,), max_detections=5)
    call = Call(([logits], [ltrb], [centerness]), torch.tensor([[16, 32]] * 2), options)
    assert run_on(backend, call).counts.tolist() == [3, 0]
    ltrb[0, 3, 0, 1] = NAN
    ltrb[1] = INF  # of no candidate
    logits[0, 2, 1, 1] = NAN
    logits[0, :, 1, 2] = torch.tensor([INF, -INF, -9.0])  # a score of 1, and one of 0
    centerness[0, 0, 0, 2] = NAN
    centerness[1, 0, 0, 3] = NAN  # without a class score
    logits[1, :, 0, 3] = -INF
    centerness[0, 0, 1, 1] = -30.0  # rules its location out if the threshold is on the final score
    for threshold_on, counts, dropped in (
        ("class", [2, 0], [3, 0]),
        ("final", [2, 0], [4, 3]),
    ):
        changed = call._replace(options=replace(options, threshold_on=threshold_on))
        found = run_on(backend, changed)
        assert found.counts.tolist() == counts and found.dropped.tolist() == dropped
        assert_same(found, changed.of(postprocess_ref))


@pytest.mark.parametrize("threshold_on", ["class", "final"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_found(backend: str, threshold_on: Any) -> None:
    for call in (
        make_call(mean=-30.0, threshold_on=threshold_on),
        make_call(score_threshold=1.0, threshold_on=threshold_on),
    ):
        found = run_on(backend, call)
        assert found.counts.tolist() == [0, 0] and found.boxes.shape == (2, 100, 4)
        assert (found.labels == -1).all() and not found.scores.any() and not found.boxes.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend: str) -> None:
    call = make_call(images=0)
    for found in (run_on(backend, call), call.of(postprocess_ref)):
        assert [list(x.shape) for x in found] == [[0, 100, 4], [0, 100], [0, 100], [0], [0]]


def test_sigmoid_is_correctly_rounded() -> None:
    """The scores of 200,000 logits, against float64."""
    x = torch.cat([torch.linspace(-110, 30, 100_000), torch.randn(100_000) * 5]).view(
        50, 1, 40, 100
    )
    options = PostprocessOptions(
        strides=(8,),
        score="product",
        score_threshold=0.0,
        topk_candidates=4000,
        max_detections=4000,
        iou_threshold=1.0,
    )
    ltrb, centerness = torch.ones(50, 4, 40, 100), torch.full((50, 1, 40, 100), 99.0)
    found = run_on("cpu", Call(([x], [ltrb], [centerness]), torch.full((50, 2), 999), options))
    exact = x.double().sigmoid().float().flatten(1).sort(dim=1, descending=True).values
    assert torch.equal(found.counts, (exact > 0).sum(dim=1))
    assert torch.equal(found.scores, exact)


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.mark.parametrize("mean", [-6.0, -2.0, 2.0])
@pytest.mark.parametrize("threshold_on", ["class", "final"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_simt(layout: str, threshold_on: Any, mean: float) -> None:
    """The same bits whatever the order of the threads; from no candidate to too many."""
    call = make_call(
        images=3,
        sizes=((16, 24), (8, 13), (3, 5)),
        mean=mean,
        ties=True,
        layout=layout,
        threshold_on=threshold_on,
    )
    expected = run_on("cpu", call)
    for seed in SIMT_SEEDS:
        assert_same(run_on("simt", call, seed), expected)
