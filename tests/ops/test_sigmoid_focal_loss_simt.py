"""sigmoid_focal_loss: the CUDA source in the simulator, all kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.sigmoid_focal_loss_cases import (
    FLOATS,
    FORMS,
    OPS,
    Case,
    assert_same_bits,
    assert_true,
    like,
    make_case,
    make_normalizer,
    true_each_of,
    true_sum_of,
)
from tests.simt.build import SimtLibrary, load_simt_library

SIMT = torch.ops.fcos_ext_simt
SEEDS = (0, 1, 12345)
#: More tiles than blocks in both layouts: 2 x 900 locations, planes that are aligned and not.
LARGE = ((24, 31), (12, 13))


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


def simt_sum(lib: SimtLibrary, case: Case, gamma: float, seed: int = 0) -> list[Tensor]:
    """Sum and gradients, which are made twice and agree: apart, and with the sum."""
    lib.set_seed(seed)
    before = lib.launches
    with lib.guarded_memory():
        logits = [x.detach().clone(memory_format=torch.preserve_format) for x in case.logits]
        arguments = (logits, *case[1:], make_normalizer(logits, 3.5), 0.3, gamma)
        loss = SIMT.sigmoid_focal_loss(*arguments)
        (grad,) = like([loss])
        gradients = SIMT.sigmoid_focal_loss_backward(grad, *arguments)
        again, buffer = SIMT.sigmoid_focal_loss_with_gradient(*arguments)
        before_rescaling = [x.clone() for x in buffer]
        SIMT.sigmoid_focal_loss_rescale_(buffer, torch.ones_like(grad), *arguments)
        assert_same_bits(buffer, before_rescaling)
        SIMT.sigmoid_focal_loss_rescale_(buffer, grad, *arguments)
    assert lib.launches - before == 5 * (sum(x.numel() for x in logits) > 0)  # one each
    assert_same_bits([loss, *gradients], [again, *buffer])
    return [loss, *gradients]


def simt_each(lib: SimtLibrary, case: Case, gamma: float, seed: int = 0) -> list[Tensor]:
    lib.set_seed(seed)
    with lib.guarded_memory():
        logits = [x.detach().clone(memory_format=torch.preserve_format) for x in case.logits]
        losses = SIMT.sigmoid_focal_loss_each(logits, *case[1:], 0.3, gamma)
        gradients = SIMT.sigmoid_focal_loss_each_backward(
            like(losses), logits, *case[1:], 0.3, gamma
        )
    return [*losses, *gradients]


def check(lib: SimtLibrary, case: Case, gamma: float, seed: int = 0) -> None:
    exact = case.to(torch.float64)
    quality = case.quality is not None
    assert_true(simt_sum(lib, case, gamma, seed), true_sum_of(exact, 0.3, gamma, 3.5), quality)
    assert_true(simt_each(lib, case, gamma, seed), true_each_of(exact, 0.3, gamma), quality)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("C", [1, 5, 8, 27])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_simt(simt: SimtLibrary, form: str, dtype: torch.dtype, C: int, gamma: float) -> None:
    label_dtype = torch.int32 if C in (5, 8) else torch.int64
    case = make_case(form, C, dtype, label_dtype=label_dtype, quality=C % 2 == 0 or C == 27)
    check(simt, case, gamma, seed=C)


@pytest.mark.parametrize("levels", [[(0, 5)], [(1, 1)] * 8], ids=str)
@pytest.mark.parametrize("images, C", [(0, 3), (1, 0), (2, 1203)])
@pytest.mark.parametrize("form", FORMS)
def test_simt_sizes(
    simt: SimtLibrary, form: str, images: int, C: int, levels: list[tuple[int, int]]
) -> None:
    check(simt, make_case(form, C, torch.bfloat16, images=images, levels=levels), 2.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_simt_seeds(simt: SimtLibrary, form: str, dtype: torch.dtype) -> None:
    """More tiles than blocks, and the same bits whatever the order of the threads."""
    case = make_case(form, 13, dtype, levels=LARGE)
    first, *others = (simt_sum(simt, case, 2.0, seed) for seed in SEEDS)
    assert_true(first, true_sum_of(case.to(torch.float64), 0.3, 2.0, 3.5))
    for other in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize("form", FORMS)
def test_simt_misaligned(simt: SimtLibrary, form: str) -> None:
    """Memory that does not start at 16 bytes is read and written an element at a time."""
    case = make_case(form, 16, torch.bfloat16, levels=((4, 8), (8, 8)))
    logits = []
    for x in case.logits:
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        assert memory.data_ptr() % 16
        shifted = memory.as_strided(x.shape, x.stride())
        logits.append(shifted.copy_(x.detach()))
    plain = Case([x.detach() for x in case.logits], *case[1:])
    parameters = None, 0.25, 2.0
    loss, gradients = SIMT.sigmoid_focal_loss_with_gradient(*plain, *parameters)
    actual, shifted_gradients = SIMT.sigmoid_focal_loss_with_gradient(
        logits, *case[1:], *parameters
    )
    torch.testing.assert_close(actual, loss, rtol=1e-6, atol=0)
    assert_same_bits(shifted_gradients, gradients)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("form", FORMS)
def test_simt_ignored_and_extreme(simt: SimtLibrary, form: str, gamma: float) -> None:
    case = make_case(form, 5, torch.float32, std=60)
    ignored = (case.labels < -1) | (case.labels >= 5)
    wild = Case(case.logits, case.labels.where(~ignored, 2**32 + 1), None)  # not class 1
    for labels in (case, wild):
        results = simt_sum(simt, labels, gamma)
        assert_true(results, true_sum_of(case.to(torch.float64), 0.3, gamma, 3.5))


def test_simt_is_what_the_cpu_computes(simt: SimtLibrary) -> None:
    """One formula: both go through the same header."""
    case = make_case("mixed", 20, torch.float64, quality=True)
    arguments = ([x.detach() for x in case.logits], *case[1:], None, 0.25, 2.0)
    loss, gradients = SIMT.sigmoid_focal_loss_with_gradient(*arguments)
    expected, others = OPS.sigmoid_focal_loss_with_gradient(*arguments)
    torch.testing.assert_close([loss, *gradients], [expected, *others])
