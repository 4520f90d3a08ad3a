"""fcos_loss: the values and gradients of its reference, from boxes to three numbers.

What wrong arguments say is in test_fcos_loss_errors.py, what it costs in test_fcos_loss_cost.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fcos_ext import (
    AssignedTargets,
    FCOSLoss,
    FCOSLossOptions,
    GroundTruth,
    assign_targets,
    fcos_loss,
    fcos_loss_ref,
    iou_loss_ref,
    sigmoid_focal_loss_ref,
)
from tests.ops.pyramids import LAYOUTS, SIZES, Pyramid, make_options, make_pyramid, make_truth

OPTIONS = [
    make_options(),
    make_options(box_loss="iou", normalize_ltrb=False, boundary="half_open", alpha=0.4),
    make_options(box_loss="linear_iou", box_weights="none", center_sampling_radius=0.0),
    make_options(quality="iou", box_loss="diou", gamma=1.5),
    make_options(quality="iou", box_loss="iou", iou_smooth=1.0),
    make_options(quality="iou", box_weights="none", box_loss="ciou", alpha=-1, boundary="strict"),
]
SHARES = (1.5, 0.75, -0.25)
Results = list[Tensor]


def with_gradients(loss: FCOSLoss, pyramid: Pyramid, shares: Sequence[float] = SHARES) -> Results:
    grads = [torch.tensor(share).to(term) for share, term in zip(shares, loss, strict=False)]
    return [*(x.detach() for x in loss), *torch.autograd.grad(loss[:3], pyramid.leaves, grads)]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(
    device: str, layout: str, padded: bool, options: FCOSLossOptions
) -> None:
    """Random pyramids, of odd sizes too, with images that have no box, and labels beyond C."""
    positives = 0
    for C, images in ((3, 4), (1, 2), (20, 1), (1203, 1)):
        pyramid = make_pyramid(C, device=device, images=images, layout=layout)
        truth = make_truth(C + (C == 3), device, images=images, padded=padded)
        for shares in ((1.0, 1.0, 1.0), SHARES):
            results = [
                with_gradients(function(pyramid, truth, options), pyramid, shares)
                for function in (fcos_loss, fcos_loss_ref)
            ]
            torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
        positives += results[0][3].item()
        for gradient, level in zip(results[0][5:], pyramid.leaves, strict=True):
            assert layout == "sliced" or gradient.stride() == level.stride()
    assert positives > 20


@pytest.mark.parametrize("sizes", [((1, 1),), ((9, 13),), ((8, 16), (4, 8))], ids=str)
def test_other_pyramids(device: str, sizes: tuple[tuple[int, int], ...]) -> None:
    options = make_options(sizes)
    for images in (0, 1, 3):
        pyramid = make_pyramid(5, device=device, images=images, sizes=sizes)
        for padded in (False, True):
            truth = make_truth(5, device, images=images, padded=padded)
            results = [
                with_gradients(function(pyramid, truth, options), pyramid)
                for function in (fcos_loss, fcos_loss_ref)
            ]
            torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_is_its_parts(device: str) -> None:
    """Built up by hand from the targets, without any of the losses that take levels."""
    pyramid, options = make_pyramid(device=device, images=3), make_options()
    truth = make_truth(device=device, images=3)
    targets = assigned(truth, options)
    rows = [torch.cat([x.flatten(2).mT for x in part], dim=1) for part in pyramid]
    positive = targets.labels >= 0
    weights = targets.centerness[positive].double()
    count = positive.sum().clamp(min=1)
    focal = sigmoid_focal_loss_ref(rows[0], targets.labels)
    box = iou_loss_ref(rows[1][positive], targets.ltrb[positive].double(), weights)
    scores = rows[2].squeeze(-1)[positive]
    entropy = F.binary_cross_entropy_with_logits(scores, weights, reduction="sum")
    loss = fcos_loss(pyramid, truth, options)
    expected = (focal / count, box / weights.sum(), entropy / count)
    torch.testing.assert_close(tuple(loss[:3]), expected, rtol=1e-6, atol=0)
    assert loss.num_pos.item() == count.item() > 1 and loss.num_ignored.item() == 0


def assigned(
    truth: GroundTruth,
    options: FCOSLossOptions,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> AssignedTargets:
    return assign_targets(
        truth.boxes,
        truth.labels,
        truth.offsets,
        counts=truth.counts,
        feature_sizes=sizes,
        strides=options.strides,
        size_ranges=options.size_ranges,
        center_sampling_radius=options.center_sampling_radius,
        boundary=options.boundary,
        normalize=options.normalize_ltrb,
    )


@pytest.mark.parametrize("function", [fcos_loss, fcos_loss_ref])
def test_targets_and_normalizers_made_before(device: str, function: Callable[..., Any]) -> None:
    """As one does with normalisers that several passes share."""
    pyramid, options = make_pyramid(device=device, images=4), make_options()
    truth = make_truth(device=device, images=4)
    whole = function(pyramid, truth, options)
    targets = assigned(truth, options)
    sums = torch.stack([(targets.labels >= 0).sum().float(), targets.centerness.sum()])
    torch.testing.assert_close(function(pyramid, targets, options)[:3], whole[:3])
    passes = []
    for images in (slice(0, 1), slice(1, 4)):
        part = Pyramid(*([level[images] for level in levels] for levels in pyramid))
        share = AssignedTargets(*(x[images] for x in targets))
        passes.append(function(part, share, options, normalizers=sums))
    for number, term in enumerate(whole[:3]):
        torch.testing.assert_close(passes[0][number] + passes[1][number], term, rtol=1e-6, atol=0)
    assert passes[0].num_pos + passes[1].num_pos == whole.num_pos


@pytest.mark.parametrize("function", [fcos_loss, fcos_loss_ref])
def test_reduce(device: str, function: Callable[..., Any]) -> None:
    """It sees both sums once, may change them in place, and its result is divided by."""
    pyramid, options = make_pyramid(device=device), make_options()
    truth = make_truth(device=device)
    plain = function(pyramid, truth, options)
    seen: list[Tensor] = []

    def doubled(sums: Tensor) -> Tensor:
        seen.append(sums.clone())
        return sums.mul_(2)

    loss = function(pyramid, truth, options, reduce=doubled)
    assert len(seen) == 1 and seen[0].dtype == torch.float32 and seen[0].shape == (2,)
    assert seen[0][0].item() == plain.num_pos.item() > 1
    torch.testing.assert_close(tuple(loss[:3]), tuple(x / 2 for x in plain[:3]))
    assert loss.num_pos == plain.num_pos


@pytest.mark.parametrize("parts", range(5))
def test_error_not_above_eager(device: str, parts: int) -> None:
    """Against float64, at most twice the error of the same formula in float32, rounded once."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    dtypes = [
        (single, single, single),
        (half, half, half),
        (brain, brain, brain),
        (brain, single, half),
        (half, torch.float64, single),
    ][parts]
    options = make_options(quality="iou" if parts % 2 else "centerness")
    pyramid = make_pyramid(20, device=device).to(*dtypes)
    truth = make_truth(20, device)
    exact = pyramid.to(torch.float64)
    ours, eager, best = (
        with_gradients(function(leaves, truth, options), leaves)
        for function, leaves in (
            (fcos_loss, pyramid),
            (fcos_loss_ref, pyramid),
            (fcos_loss_ref, exact),
        )
    )
    for actual, other, true in zip(ours, eager, best, strict=True):
        assert actual.dtype == other.dtype
        error, bound = ((x.double() - true).abs().max() for x in (actual, other))
        assert error <= 2 * bound + torch.finfo(torch.float32).eps * true.abs().max()


@pytest.mark.parametrize("options", OPTIONS[:4], ids=range(4))  # of ciou, alpha is held constant
def test_gradcheck(device: str, options: FCOSLossOptions) -> None:
    sizes = ((4, 6), (2, 3))
    few = {"strides": (8, 16), "size_ranges": ((0, 24), (24, math.inf))}
    options = replace(options, **few, quality="centerness")
    pyramid = make_pyramid(2, device=device, sizes=sizes)
    truth = make_truth(2, device, extent=(32.0, 48.0))
    assert fcos_loss(pyramid, truth, options).num_pos > 2

    def losses(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(fcos_loss((leaves[:2], leaves[2:4], leaves[4:]), truth, options)[:3])

    assert torch.autograd.gradcheck(losses, pyramid.leaves)


def test_iou_as_quality_is_a_constant(device: str) -> None:
    """No gradient of the centerness loss reaches the distances."""
    pyramid, options = make_pyramid(device=device), make_options(quality="iou")
    truth = make_truth(device=device)
    for function in (fcos_loss, fcos_loss_ref):
        loss = function(pyramid, truth, options)
        gradients = torch.autograd.grad(
            loss.centerness, pyramid.ltrb, allow_unused=True, materialize_grads=True
        )
        assert all(x.eq(0).all() for x in gradients)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_predictions(device: str, dtype: torch.dtype, garbage: float) -> None:
    """They show in the losses, and nowhere else."""
    truth, options = make_truth(device=device), make_options()
    targets = assigned(truth, options)
    background = (targets.labels[0, : 9 * 13] < 0).nonzero()[0].item()
    positive = (targets.labels[0, : 9 * 13] >= 0).nonzero()[0].item()
    for part in range(3):
        for place in (background, positive):
            pyramid = make_pyramid(dtype=dtype, device=device)
            with torch.no_grad():
                pyramid[part][0][0, 0].view(-1)[place] = garbage
            loss = fcos_loss(pyramid, truth, options)
            sum(loss[:3]).backward()
            others = [term for number, term in enumerate(loss[:3]) if number != part]
            assert all(term.isfinite() for term in others)
            if part > 0 and place == background:
                assert loss[part].isfinite()
                assert all(leaf.grad.isfinite().all() for leaf in pyramid.leaves)
            elif math.isnan(garbage):
                assert loss[part].isnan()
            assert loss.num_pos.item() == (targets.labels >= 0).sum().item()


def test_labels_beyond_the_classes_are_ignored_and_counted(device: str) -> None:
    pyramid, options = make_pyramid(3, device=device), make_options()
    truth = make_truth(3, device)
    targets = assigned(truth, options)
    wrong = targets.labels == 2
    assert wrong.any()
    moved = targets._replace(labels=targets.labels.where(~wrong, 3))
    ignored = targets._replace(labels=targets.labels.where(~wrong, -2))
    for function in (fcos_loss, fcos_loss_ref):
        results = [with_gradients(function(pyramid, t, options), pyramid) for t in (moved, ignored)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert results[0][4].item() == wrong.sum().item()


def test_gradients_are_zero_without_boxes(device: str) -> None:
    pyramid, options = make_pyramid(device=device), make_options()
    empty = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    truth = GroundTruth(*empty, offsets=torch.zeros(3, dtype=torch.int64, device=device))
    results = with_gradients(fcos_loss(pyramid, truth, options), pyramid)
    assert results[0] > 0 and all(x == 0 for x in results[1:5])
    assert all(x.eq(0).all() for x in results[5 + len(SIZES) :])


def test_double_backward_raises(device: str) -> None:
    pyramid = make_pyramid(device=device)
    for term in range(3):
        loss = fcos_loss(pyramid, make_truth(device=device), make_options())
        first = torch.autograd.grad(loss[term], pyramid[term], create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
            sum(x.sum() for x in first).backward()


def test_reference_is_differentiable_twice(device: str) -> None:
    pyramid = make_pyramid(device=device)
    loss = fcos_loss_ref(pyramid, make_truth(device=device), make_options())
    first = torch.autograd.grad(sum(loss[:3]), pyramid.leaves, create_graph=True)
    assert all(
        x.isfinite().all() for x in torch.autograd.grad(sum(map(Tensor.sum, first)), pyramid[0])
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(device: str, backend: str) -> None:
    options = make_options(quality="iou", debug=backend == "aot_eager")

    def step(pyramid: Pyramid, truth: GroundTruth) -> FCOSLoss:
        doubled = Pyramid(*([level * 2 for level in part] for part in pyramid))
        return fcos_loss(doubled, truth, options, reduce=lambda sums: sums / 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for padded in (False, True):
        pyramid = make_pyramid(dtype=torch.float32, device=device)
        truth = make_truth(device=device, padded=padded)
        torch.testing.assert_close(
            with_gradients(compiled(pyramid, truth), pyramid),
            with_gradients(step(pyramid, truth), pyramid),
        )


def test_autocast(device: str) -> None:
    pyramid, options = make_pyramid(dtype=torch.bfloat16, device=device), make_options()
    truth = make_truth(device=device)
    expected = fcos_loss(pyramid, truth, options)
    with torch.autocast(device, torch.bfloat16):
        loss = fcos_loss(pyramid, truth, options)
    assert all(torch.equal(a, b) for a, b in zip(loss, expected, strict=True))
    assert all(term.dtype == torch.float32 for term in loss[:3])


def test_deterministic(device: str) -> None:
    sizes = ((60, 70), (30, 35))
    pyramid = make_pyramid(20, torch.float32, device, sizes=sizes, layout="mixed")
    truth = make_truth(20, device, extent=(480.0, 560.0))
    options, before, results = make_options(sizes), torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        loss = fcos_loss(pyramid, truth, options)
        results.append(with_gradients(loss, pyramid, (1.0, 1.0, 1.0)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    """Assignment, losses and gradients, captured once and replayed with other batches."""

    def inputs() -> tuple[Pyramid, GroundTruth]:
        return make_pyramid(20, torch.float32, "cuda"), make_truth(20, "cuda", padded=True)

    def step() -> Results:
        loss = fcos_loss(pyramid, truth, options)
        return with_gradients(loss, pyramid, (1.0, 1.0, 1.0))

    options = make_options()
    pyramid, truth = inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        new_pyramid, new_truth = inputs()
        held = (*pyramid.leaves, truth.boxes, truth.labels, truth.counts)
        new = (*new_pyramid.leaves, new_truth.boxes, new_truth.labels, new_truth.counts)
        with torch.no_grad():
            for old, value in zip(held, new, strict=True):
                old.copy_(value)
        graph.replay()
        torch.testing.assert_close(captured, step())
