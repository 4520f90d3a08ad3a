"""box_and_centerness_loss on feature levels: all layouts, options and ways to the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fcos_ext import box_and_centerness_loss, box_and_centerness_loss_ref
from fcos_ext.iou_loss import KIND_NUMBERS
from tests.ops.pyramids import (
    LAYOUTS,
    SIZES,
    BoxOptions,
    Pyramid,
    Targets,
    make_pyramid,
    make_targets,
)
from tests.simt.build import SimtLibrary, load_simt_library

OPS = torch.ops.fcos_ext
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GRADS = (1.5, -0.25)
OPTIONS = [
    BoxOptions(),
    BoxOptions(num_classes=4, kind=0, weighted=False),
    BoxOptions(num_classes=1 << 62, kind=3, iou_quality=True, eps=1e-3),
    BoxOptions(kind=4, weighted=False, iou_quality=True, smooth=1.0),
    BoxOptions(num_classes=0, kind=1),
]
Results = list[Tensor]


def with_gradients(sums: Sequence[Tensor], pyramid: Pyramid) -> Results:
    leaves = [*pyramid.ltrb, *pyramid.centerness]
    grads = [torch.tensor(x).to(sums[0]) for x in GRADS]
    gradients = torch.autograd.grad(sums[:2], leaves, grads)
    return [*(x.detach() for x in sums), *gradients]


def by_operator(pyramid: Pyramid, targets: Targets, options: BoxOptions) -> Results:
    sums = OPS.box_and_centerness_loss(*pyramid[1:], *targets, *options)
    return with_gradients(sums, pyramid)


def by_reference(pyramid: Pyramid, targets: Targets, options: BoxOptions) -> Results:
    sums = box_and_centerness_loss_ref(
        *pyramid[1:],
        *targets[:2],
        centerness_target=targets.centerness_target,
        normalizers=targets.normalizers,
        **options.keywords(),
    )
    return with_gradients(sums, pyramid)


def by_fusing(pyramid: Pyramid, targets: Targets, options: BoxOptions) -> Results:
    sums = box_and_centerness_loss(
        *pyramid[1:],
        *targets[:2],
        centerness_target=targets.centerness_target,
        normalizers=targets.normalizers,
        fused_gradient=True,
        **options.keywords(),
    )
    return with_gradients(sums, pyramid)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(device: str, layout: str, options: BoxOptions) -> None:
    label_dtype = torch.int32 if layout == "mixed" else torch.int64
    for sizes, images in (
        (SIZES, 3),
        ([(70, 80)], 1),
        ([(1, 1)] * 8, 2),
        (SIZES, 0),
        ([(0, 3)], 2),
    ):
        pyramid = make_pyramid(device=device, sizes=sizes, images=images, layout=layout)
        for given, normalized in ((True, True), (False, False)):
            targets = make_targets(
                pyramid, given=given, normalized=normalized, label_dtype=label_dtype
            )
            expected = by_reference(pyramid, targets, options)
            for function in (by_operator, by_fusing):
                actual = function(pyramid, targets, options)
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
                for gradient, level in zip(
                    actual[5:], [*pyramid.ltrb, *pyramid.centerness], strict=True
                ):
                    assert layout == "sliced" or gradient.stride() == level.stride()


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=range(4))
def test_error_not_above_eager(device: str, options: BoxOptions, dtype: torch.dtype) -> None:
    """Against float64, at most twice the error of the formula in float32, rounded once."""
    pyramid = make_pyramid(dtype=dtype, device=device, sizes=((40, 50), (20, 25)))
    targets = make_targets(pyramid)
    truth = by_reference(
        pyramid.to(torch.float64),
        targets._replace(normalizers=targets.normalizers.double()),
        options,
    )
    eager = by_reference(pyramid, targets, options)
    for function in (by_operator, by_fusing):
        for ours, theirs, exact in zip(
            function(pyramid, targets, options), eager, truth, strict=True
        ):
            assert ours.dtype == theirs.dtype
            error, bound = ((x.double() - exact).abs().max() for x in (ours, theirs))
            assert error <= 2 * bound + torch.finfo(torch.float32).eps * exact.abs().max()


def test_iou_quality_by_hand(device: str) -> None:
    """Two boxes of 2 x 2 that share 1 x 2, hence an IoU of 1/3; and one that meets its target."""
    pred = torch.tensor([[1.0, 1, 1, 1], [2, 2, 2, 2]]).T.reshape(1, 4, 1, 2).to(device)
    target = torch.tensor([[[0.0, 1, 2, 1], [2, 2, 2, 2]]], device=device)
    labels = torch.tensor([[0, 1]], device=device)
    scores = torch.zeros(1, 1, 1, 2, device=device, requires_grad=True)
    arguments = ([pred.requires_grad_()], [scores], target, labels)
    for function in (box_and_centerness_loss, box_and_centerness_loss_ref):
        sums = function(*arguments, quality="iou", kind="linear_iou")
        assert sums.weight.item() == pytest.approx(1.0)  # c is 0 at a border
        by_pred, by_scores = torch.autograd.grad(
            sums.centerness, [pred, scores], allow_unused=True, materialize_grads=True
        )
        expected = torch.tensor([0.5 - 1 / 3, 0.5 - 1])
        torch.testing.assert_close(by_scores.flatten().cpu(), expected, rtol=1e-5, atol=0)
        assert by_pred.eq(0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_takes_no_part_counts_for_nothing(
    device: str, dtype: torch.dtype, garbage: float
) -> None:
    """Background, ignored and classes that there are not."""
    pyramid = make_pyramid(dtype=dtype, device=device)
    targets, options = make_targets(pyramid), BoxOptions(num_classes=6, iou_quality=True)
    out = (targets.labels < 0) | (targets.labels >= 6)
    assert (targets.labels >= 6).any()
    expected = by_fusing(pyramid, targets, options)
    assert expected[3].item() == (~out).sum().item()
    assert expected[4].item() == ((targets.labels < -1) | (targets.labels >= 6)).sum().item()

    dirty, start = pyramid.to(dtype), 0
    with torch.no_grad():
        for ltrb, scores in zip(dirty.ltrb, dirty.centerness, strict=True):
            count = ltrb.shape[2] * ltrb.shape[3]
            mask = out[:, start : start + count].view(-1, 1, *ltrb.shape[2:])
            ltrb.masked_fill_(mask, garbage)
            scores.masked_fill_(mask, garbage)
            start += count
    targets.target[out] = garbage
    targets.centerness_target[out] = garbage
    for function in (by_operator, by_fusing, by_reference):
        results = function(dirty, targets, options)
        torch.testing.assert_close(results[:5], expected[:5], rtol=1e-5, atol=1e-6)
        assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("normalizers", [(0.0, 0.0), (0.5, 1e-9), (7.0, 0.3)])
@pytest.mark.parametrize("weighted", [True, False])
def test_normalizers(device: str, weighted: bool, normalizers: tuple[float, float]) -> None:
    """The sums, divided; with floors of 1 and 1e-6."""
    pyramid = make_pyramid(device=device)
    targets, options = make_targets(pyramid), BoxOptions(weighted=weighted)
    plain = by_operator(pyramid, targets._replace(normalizers=None), options)
    given = targets._replace(normalizers=targets.normalizers.new_tensor(normalizers))
    divided = by_operator(pyramid, given, options)
    count, weights = max(normalizers[0], 1), max(normalizers[1], 1e-6)
    box = weights if weighted else count
    levels = len(pyramid.ltrb)
    divisors = [box, count, 1, 1, 1, *[box] * levels, *[count] * levels]
    for ours, sum_, divisor in zip(divided, plain, divisors, strict=True):
        torch.testing.assert_close(ours.double(), sum_.double() / divisor)


@pytest.mark.parametrize("grads", [(1.0, 1.0), (1.0, 0.5), (65536.0, 1.0), (0.0, -3.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_with_any_incoming_gradient(
    device: str, dtype: torch.dtype, grads: tuple[float, float]
) -> None:
    pyramid = make_pyramid(dtype=dtype, device=device, layout="mixed")
    targets, options = make_targets(pyramid), BoxOptions()
    leaves = [*pyramid.ltrb, *pyramid.centerness]
    sums = box_and_centerness_loss(
        *pyramid[1:],
        *targets[:2],
        centerness_target=targets[2],
        num_classes=10,
        fused_gradient=True,
    )
    incoming = [torch.tensor(x).to(sums[0]) for x in grads]
    arguments = (*pyramid[1:], *targets[:3], None, *options)
    with torch.no_grad():
        by_pred, by_centerness = OPS.box_and_centerness_loss_backward(*incoming, *arguments)
    first = torch.autograd.grad(sums[:2], leaves, incoming, retain_graph=True)
    for gradient, other in zip(first, (*by_pred, *by_centerness), strict=True):
        assert torch.equal(gradient, other)
        gradient.fill_(7)  # what a user does with it changes nothing
    second = torch.autograd.grad(sums[:2], leaves, incoming)
    assert all(torch.equal(a, b) for a, b in zip(second, (*by_pred, *by_centerness), strict=True))


def test_fused_sum_alone_and_frozen_branch(device: str) -> None:
    pyramid = make_pyramid(device=device)
    targets = make_targets(pyramid)
    frozen = [x.detach() for x in pyramid.centerness]
    sums = box_and_centerness_loss(pyramid.ltrb, frozen, *targets[:2], fused_gradient=True)
    expected = box_and_centerness_loss_ref(pyramid.ltrb, frozen, *targets[:2])
    torch.testing.assert_close(
        torch.autograd.grad(sums.box, pyramid.ltrb), torch.autograd.grad(expected.box, pyramid.ltrb)
    )
    assert not any(x.requires_grad for x in sums[2:])
    with torch.no_grad():
        again = box_and_centerness_loss(*pyramid[1:], *targets[:2], fused_gradient=True)
    assert not again.box.requires_grad


@pytest.mark.parametrize("kind", [k for k in KIND_NUMBERS if k != "ciou"])  # alpha is constant
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_gradcheck(device: str, fused: bool, kind: str) -> None:
    pyramid = make_pyramid(device=device, sizes=((2, 3), (1, 1)))
    targets = make_targets(pyramid, positive=0.7)

    def losses(*leaves: Tensor) -> tuple[Tensor, ...]:
        sums = box_and_centerness_loss(
            leaves[:2],
            leaves[2:],
            *targets[:2],
            normalizers=targets.normalizers,
            kind=kind,
            fused_gradient=fused,
        )
        return tuple(sums[:2])

    assert torch.autograd.gradcheck(losses, (*pyramid.ltrb, *pyramid.centerness))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_double_backward_raises(device: str, fused: bool) -> None:
    pyramid = make_pyramid(device=device)
    targets = make_targets(pyramid)
    sums = box_and_centerness_loss(*pyramid[1:], *targets[:2], fused_gradient=fused)
    first, *_ = torch.autograd.grad(sums.box, pyramid.ltrb, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
        first.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device: str, layout: str) -> None:
    pyramid = make_pyramid(dtype=torch.float32, device=device, layout=layout)
    arguments: Any = (*pyramid[1:], *make_targets(pyramid), *BoxOptions())
    opcheck(OPS.box_and_centerness_loss.default, arguments)
    plain = ([x.detach() for x in part] for part in pyramid[1:])
    arguments = (*plain, *arguments[2:])
    opcheck(OPS.box_and_centerness_loss_with_gradient.default, arguments)
    grads = [torch.tensor(x, device=device) for x in GRADS]
    opcheck(OPS.box_and_centerness_loss_backward.default, (*grads, *arguments))
    *_, by_pred, by_centerness = OPS.box_and_centerness_loss_with_gradient(*arguments)
    opcheck(
        OPS.box_and_centerness_loss_rescale_.default, (by_pred, by_centerness, *grads, *arguments)
    )


def test_deterministic(device: str) -> None:
    pyramid = make_pyramid(dtype=torch.float32, device=device, sizes=((100, 120), (50, 60)))
    targets = make_targets(pyramid)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(by_fusing(pyramid, targets, BoxOptions()))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simt(simt: SimtLibrary, layout: str, dtype: torch.dtype, seed: int) -> None:
    """One launch each; a gradient of 1 changes nothing; more tiles than blocks."""
    ops, options = torch.ops.fcos_ext_simt, OPTIONS[seed % 4]
    label_dtype = torch.int32 if seed else torch.int64
    for sizes, images in ((((40, 37), *SIZES), 2), (SIZES, 0)):
        pyramid = make_pyramid(dtype=dtype, sizes=sizes, images=images, layout=layout)
        targets = make_targets(pyramid, given=seed != 1, label_dtype=label_dtype)
        exact = pyramid.to(torch.float64)
        true_targets = targets._replace(normalizers=targets.normalizers.double())
        expected = by_reference(exact, true_targets, options)
        plain = [[x.detach() for x in part] for part in pyramid[1:]]
        arguments = (*plain, *targets, *options)
        simt.set_seed(seed)
        before = simt.launches
        with simt.guarded_memory():
            *sums, by_pred, by_centerness = ops.box_and_centerness_loss_with_gradient(*arguments)
            buffers = [x.clone() for x in (*by_pred, *by_centerness)]
            one = torch.ones_like(sums[0])
            ops.box_and_centerness_loss_rescale_(by_pred, by_centerness, one, one, *arguments)
            for now, then in zip((*by_pred, *by_centerness), buffers, strict=True):
                assert torch.equal(now, then)
            grads = [torch.tensor(x).to(sums[0]) for x in GRADS]
            ops.box_and_centerness_loss_rescale_(by_pred, by_centerness, *grads, *arguments)
            again = ops.box_and_centerness_loss_backward(*grads, *arguments)
            alone = ops.box_and_centerness_loss(*arguments)
        assert simt.launches - before == (5 if images else 0)
        for one_way, other in zip((*by_pred, *by_centerness), (*again[0], *again[1]), strict=True):
            assert torch.equal(one_way, other) and one_way.stride() == other.stride()
        assert all(torch.equal(a, b) for a, b in zip(sums, alone, strict=True))
        rtol = 1e-9 if dtype == torch.float64 else max(2e-5, torch.finfo(dtype).eps)
        for ours, truth in zip((*sums, *by_pred, *by_centerness), expected, strict=True):
            if ours.dtype == torch.int64:
                assert torch.equal(ours, truth)
                continue
            torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=rtol * 0.1)


def test_simt_is_what_the_cpu_computes(simt: SimtLibrary) -> None:
    pyramid = make_pyramid(layout="mixed")
    plain = [[x.detach() for x in part] for part in pyramid[1:]]
    arguments = (*plain, *make_targets(pyramid), *BoxOptions(iou_quality=True))
    *sums, by_pred, by_centerness = torch.ops.fcos_ext_simt.box_and_centerness_loss_with_gradient(
        *arguments
    )
    *others, pred, centerness = OPS.box_and_centerness_loss_with_gradient(*arguments)
    torch.testing.assert_close([*sums, *by_pred, *by_centerness], [*others, *pred, *centerness])
