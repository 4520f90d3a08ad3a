"""sigmoid_focal_loss: the kernels of this device against the reference, and their contract.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor
from torch.library import opcheck

from fcos_ext import sigmoid_focal_loss, sigmoid_focal_loss_ref
from fcos_ext._library import kernels
from tests.ops.sigmoid_focal_loss_cases import (
    FORMS,
    NORMALIZERS,
    OPS,
    Case,
    assert_same_bits,
    each_of,
    like,
    make_case,
    make_labels,
    make_normalizer,
    sum_of,
    true_each_of,
    true_sum_of,
    with_gradients,
)

OP_NAMES = [
    "sigmoid_focal_loss" + suffix
    for suffix in ("", "_backward", "_with_gradient", "_rescale_", "_each", "_each_backward")
]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SMALL = ((3, 4), (2, 1))  # levels


def test_compiled(device: str) -> None:
    for name in OP_NAMES:
        assert device in kernels(name), name


@pytest.mark.parametrize(
    "alpha, gamma", [(0.25, 2.0), (0.25, 1.5), (0.7, 1.0), (0.0, 0.0), (1.0, 0.3), (-1.0, 2.0)]
)
@pytest.mark.parametrize("C", [1, 5, 80, 91])
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(device: str, form: str, C: int, alpha: float, gamma: float) -> None:
    label_dtype = torch.int32 if gamma == 2 else torch.int64
    case = make_case(form, C, device=device, label_dtype=label_dtype)
    torch.testing.assert_close(
        each_of(case, alpha, gamma), true_each_of(case, alpha, gamma), **EXACT
    )
    for normalizer in NORMALIZERS:
        torch.testing.assert_close(
            sum_of(case, alpha, gamma, normalizer),
            true_sum_of(case, alpha, gamma, normalizer),
            **EXACT,
        )


@pytest.mark.parametrize("levels", [[(0, 5)], [(1, 1)], [(1, 1)] * 8, [(40, 33)]], ids=str)
@pytest.mark.parametrize("images, C", [(0, 3), (1, 0), (1, 1203), (3, 17)])
@pytest.mark.parametrize("form", FORMS)
def test_sizes(device: str, form: str, images: int, C: int, levels: list[tuple[int, int]]) -> None:
    case = make_case(form, C, device=device, images=images, levels=levels)
    torch.testing.assert_close(each_of(case, 0.3, 2), true_each_of(case, 0.3, 2), **EXACT)
    torch.testing.assert_close(sum_of(case, 0.3, 2, 3), true_sum_of(case, 0.3, 2, 3), **EXACT)


@pytest.mark.parametrize("seed", range(40))
def test_levels_are_the_joined_tensor(device: str, seed: int) -> None:
    """Of any number of levels of any size and layout: what [N, L, C] gives."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sizes = [(random(0, 12), random(1, 40)) for _ in range(random(1, 8))]
    C, gamma = random(1, 30), (2.0, 0.8)[seed % 2]
    case = make_case("planes", C, device=device, images=random(1, 3), levels=sizes)
    logits = []
    for level in case.logits:
        layout = random(0, 2)
        x = level.detach()
        if layout == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == 2:  # neither: a copy is made
            x = torch.cat([x, x], dim=3)[..., : x.shape[3]]
        logits.append(x.requires_grad_())
    rows = torch.cat([x.detach().flatten(2).transpose(1, 2) for x in logits], 1).requires_grad_()

    joined = sigmoid_focal_loss_ref(rows, case.labels, 0.3, gamma)
    (expected,) = torch.autograd.grad(joined, rows)
    loss = OPS.sigmoid_focal_loss(logits, case.labels, None, None, 0.3, gamma)
    gradients = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, joined, **EXACT)
    torch.testing.assert_close(
        torch.cat([x.flatten(2).transpose(1, 2) for x in gradients], 1), expected, **EXACT
    )


@pytest.mark.parametrize("form", FORMS)
def test_memory_format_is_kept(device: str, form: str) -> None:
    case = make_case(form, 8, device=device, levels=((5, 6), (4, 3)))
    results = [
        *sum_of(case, 0.25, 2.0)[1:],
        *each_of(case, 0.25, 2.0),
        *OPS.sigmoid_focal_loss_with_gradient(*case, None, 0.25, 2.0)[1],
    ]
    for result, level in zip(results, case.logits * 4, strict=True):
        assert result.stride() == level.stride()


def test_strided_logits_and_labels(device: str) -> None:
    case = make_case("planes", 6, device=device, levels=((4, 10),))
    (x,) = case.logits
    wide = torch.stack([x.detach(), x.detach() * 0], dim=-1)[..., 0].requires_grad_()
    labels = case.labels.repeat_interleave(2, dim=1)[:, ::2]
    assert not (wide.is_contiguous() or labels.is_contiguous())
    strided = Case([wide], labels, None)
    for function in (sum_of, each_of):
        assert_same_bits(function(strided, 0.25, 2.0), function(case, 0.25, 2.0))
    # gradients that come from an expanded tensor
    losses = OPS.sigmoid_focal_loss_each(*case, 0.25, 2.0)
    (gradient,) = torch.autograd.grad(losses[0].sum(), x)
    (expected,) = torch.autograd.grad(
        OPS.sigmoid_focal_loss(*case, None, 0.25, 2.0), x, torch.ones_like(losses[0][0, 0, 0, 0])
    )
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 80), (5, 0), (80,), (7, 5), (3, 4, 91)], ids=str)
def test_public_function_of_rows(device: str, shape: tuple[int, ...], reduction: Any) -> None:
    logits = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    labels = make_labels(shape[:-1], shape[-1]).to(device)
    results = [
        with_gradients(function(logits, labels, 0.3, 1.5, reduction=reduction), [logits])
        for function in (sigmoid_focal_loss, sigmoid_focal_loss_ref)
    ]
    assert results[0][0].shape == (shape if reduction == "none" else ())
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_public_function_of_levels(device: str, reduction: Any) -> None:
    case = make_case("mixed", 7, device=device, quality=True)
    results = [
        with_gradients(
            function(
                tuple(case.logits), case.labels, 0.3, quality=case.quality, reduction=reduction
            ),
            case.logits,
        )
        for function in (sigmoid_focal_loss, sigmoid_focal_loss_ref)
    ]
    torch.testing.assert_close(*results, **EXACT)


def test_mean_is_over_what_is_not_ignored(device: str) -> None:
    logits = torch.zeros(4, 3, device=device)
    labels = torch.tensor([0, -1, -2, 3], device=device)  # the last two do not count
    loss = sigmoid_focal_loss(logits, labels, 0.5, 0.0, reduction="mean")
    torch.testing.assert_close(loss.cpu(), 0.5 * torch.tensor(2.0).log())
    nothing = sigmoid_focal_loss(logits, labels.fill_(-2), reduction="mean")
    assert nothing.item() == 0


def test_normalizer_of_any_dtype_gets_no_gradient(device: str) -> None:
    logits = torch.randn(7, 5, device=device, requires_grad=True)
    labels = make_labels((7,), 5).to(device)
    count = torch.tensor(3, device=device)
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    by_count, by_scale = (
        sigmoid_focal_loss(logits, labels, normalizer=normalizer) for normalizer in (count, scale)
    )
    assert by_count.item() == by_scale.item()
    by_scale.backward()
    assert scale.grad is None


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 0.5), (-1, 2.0)])
def test_against_torchvision(device: str, alpha: float, gamma: float, reduction: Any) -> None:
    logits = torch.randn(64, 9, dtype=torch.float64, device=device).mul(4).requires_grad_()
    labels = torch.randint(-1, 9, (64,), device=device)
    one_hot = torch.nn.functional.one_hot(labels + 1, 10)[:, 1:].to(logits)
    loss = sigmoid_focal_loss(logits, labels, alpha, gamma, reduction=reduction)
    theirs = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha, gamma, reduction)
    torch.testing.assert_close(
        with_gradients(loss, [logits]), with_gradients(theirs, [logits]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("quality", [False, True], ids=["", "quality"])
@pytest.mark.parametrize("gamma", [2.0, 1.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(device: str, form: str, gamma: float, quality: bool) -> None:
    case = make_case(form, 3, device=device, levels=SMALL, images=1, std=2, quality=quality)
    normalizer = make_normalizer(case.logits, 3.0)
    others = case.labels, case.quality
    assert torch.autograd.gradcheck(
        lambda *x: OPS.sigmoid_focal_loss(x, *others, normalizer, 0.3, gamma), case.logits
    )
    assert torch.autograd.gradcheck(
        lambda *x: tuple(OPS.sigmoid_focal_loss_each(x, *others, 0.3, gamma)), case.logits
    )


@pytest.mark.parametrize("form", [*FORMS, "strided"])
@pytest.mark.parametrize("quality", [False, True], ids=["", "quality"])
def test_opcheck(device: str, form: str, quality: bool) -> None:
    case = make_case(
        "planes" if form == "strided" else form, 4, torch.float32, device, levels=SMALL,
        quality=quality,
    )  # fmt: skip
    if form == "strided":
        logits = [x.detach()[:, :, :, :1].requires_grad_() for x in case.logits]
        labels = case.labels[:, :5].repeat_interleave(2, dim=1)[:, ::2]
        case = Case(logits, labels, None if case.quality is None else case.quality[:, :5])
    normalizer = make_normalizer(case.logits, 2.0)
    parameters = normalizer, 0.25, 2.0
    opcheck(OPS.sigmoid_focal_loss.default, (*case, *parameters))
    opcheck(OPS.sigmoid_focal_loss_each.default, (*case, 0.25, 2.0))

    case = Case([x.detach() for x in case.logits], *case[1:])
    grad = torch.tensor(3.0, device=device)
    grads = like(OPS.sigmoid_focal_loss_each(*case, 0.25, 2.0))
    opcheck(OPS.sigmoid_focal_loss_backward.default, (grad, *case, *parameters))
    opcheck(OPS.sigmoid_focal_loss_with_gradient.default, (*case, *parameters))
    opcheck(OPS.sigmoid_focal_loss_each_backward.default, (grads, *case, 0.25, 2.0))
    gradients = OPS.sigmoid_focal_loss_with_gradient(*case, *parameters)[1]
    opcheck(OPS.sigmoid_focal_loss_rescale_.default, (gradients, grad, *case, *parameters))


def test_double_backward_raises(device: str) -> None:
    case = make_case("mixed", 4, device=device)
    losses = [
        OPS.sigmoid_focal_loss(*case, None, 0.25, 2.0),
        sum(loss.sum() for loss in OPS.sigmoid_focal_loss_each(*case, 0.25, 2.0)),
        sigmoid_focal_loss(case.logits, case.labels, fused_gradient=True),
    ]
    for loss in losses:
        gradient, *_ = torch.autograd.grad(loss, case.logits, create_graph=True)
        with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
            gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("form", ["rows", "levels"])
def test_compile_fullgraph(device: str, form: str, reduction: Any) -> None:
    check_compiled("aot_eager", device, form, reduction)


@pytest.mark.parametrize("form", ["rows", "levels"])
def test_compile_inductor(device: str, form: str) -> None:
    check_compiled("inductor", device, form, "sum")


def check_compiled(backend: str, device: str, form: str, reduction: Any) -> None:
    def step(logits: Any, labels: Tensor) -> Any:
        count = (labels >= 0).sum() if reduction == "sum" else None
        logits = logits * 2 if form == "rows" else [level * 2 for level in logits]
        return sigmoid_focal_loss(
            logits, labels, reduction=reduction, normalizer=count, fused_gradient=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for height in (5, 6, 7):
        case = make_case("mixed", 8, torch.float32, device, levels=((height, 5), (3, 4)))
        logits: Any = case.logits
        labels = case.labels
        if form == "rows":
            logits, labels = logits[0].detach()[..., 0].requires_grad_(), labels[:, :8]
        leaves = [logits] if form == "rows" else logits
        torch.testing.assert_close(
            with_gradients(compiled(logits, labels), leaves),
            with_gradients(step(logits, labels), leaves),
        )


def test_autocast(device: str) -> None:
    features = torch.randn(20, 16, device=device)
    weight = torch.randn(80, 16, device=device, requires_grad=True)
    labels = make_labels((20,), 80).to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = torch.nn.functional.linear(features, weight)
        logits.retain_grad()
        loss = sigmoid_focal_loss(logits, labels)
        each = sigmoid_focal_loss(logits, labels, reduction="none")
    assert (logits.dtype, loss.dtype, each.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, sigmoid_focal_loss_ref(logits.float(), labels))
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(
    device: str, dtype: torch.dtype, form: str, threads: Callable[[int], None]
) -> None:
    case = make_case(form, 80, dtype, device, levels=((40, 60), (7, 11)))
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(sum_of(case, 0.25, 2.0))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fused_gradient", [False, True])
def test_cuda_graph(fused_gradient: bool) -> None:
    """Captured with one input and replayed with others."""
    case = make_case("mixed", 80, torch.float32, "cuda")

    def step() -> list[Tensor]:
        loss = sigmoid_focal_loss(case.logits, case.labels, fused_gradient=fused_gradient)
        return [loss.detach(), *torch.autograd.grad(loss, case.logits)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        new = make_case("mixed", 80, torch.float32, "cuda")
        for held, changed in zip(
            (*case.logits, case.labels), (*new.logits, new.labels), strict=True
        ):
            held.detach().copy_(changed.detach())
        graph.replay()
        assert_same_bits(captured, step())


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(sigmoid_focal_loss) == inspect.signature(sigmoid_focal_loss_ref)
