"""sigmoid_focal_loss: how accurate it is, at any logit and with any instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fcos_ext import _host
from tests.ops.sigmoid_focal_loss_cases import (
    FLOATS,
    FORMS,
    HALVES,
    Case,
    each_of,
    make_case,
    sum_dtype,
    sum_of,
    true_each_of,
    true_sum_of,
)


@pytest.mark.parametrize("quality", [False, True], ids=["", "quality"])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("mean, std", [(0, 4), (-4.6, 0.5), (-9, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_error_not_above_eager(
    device: str, dtype: torch.dtype, mean: float, std: float, gamma: float, quality: bool
) -> None:
    """Against float64, at most twice the error of the formula in float32, rounded once."""
    form = "rows" if gamma == 2 else "planes"
    case = make_case(
        form, 80, dtype, device, levels=((10, 20),), mean=mean, std=std, quality=quality
    )
    for function, reference in ((each_of, true_each_of), (sum_of, true_sum_of)):
        truth = reference(case.to(torch.float64), 0.25, gamma)
        eager = reference(case, 0.25, gamma)
        for ours, theirs, exact in zip(function(case, 0.25, gamma), eager, truth, strict=True):
            assert ours.dtype == theirs.dtype
            error, bound = ((x.double() - exact).abs().max() for x in (ours, theirs))
            # Eager may be right by luck: a last bit of float32 is always allowed.
            last_bit = torch.finfo(torch.float32).eps * exact.abs().max()
            assert error <= 2 * bound + last_bit


@pytest.mark.parametrize("quality", [None, 1.0, 0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gamma", [2.0, 1.5, 1.0, 0.0])
def test_extreme_logits(
    device: str, dtype: torch.dtype, gamma: float, quality: float | None
) -> None:
    """Finite, and right, as far as float16 reaches."""
    sizes = torch.tensor([0, 1e-4, 1e-2, 0.5, 3, 7.7, 9.5, 16.7, 17.5, 40, 88, 100, 1e4, 6e4])
    x = torch.cat([sizes, -sizes]).to(dtype).to(device)
    # Class 0 of each location is positive, class 1 negative.
    logits = [x[:, None, None, None].repeat(1, 2, 1, 1).requires_grad_()]
    labels = torch.zeros(len(x), 1, dtype=torch.int64, device=device)
    targets = None if quality is None else torch.full_like(labels, quality, dtype=sum_dtype(dtype))
    case = Case(logits, labels, targets)
    truth = true_each_of(case.to(torch.float64), 0.25, gamma)
    actual = each_of(case, 0.25, gamma)
    # eps of the dtype, and a few of float32 where e^x comes from a rounded x
    rtol = max(torch.finfo(dtype).eps, 6e-6 if dtype != torch.float64 else 1e-12)
    for ours, exact in zip(actual, truth, strict=True):
        # Below the smallest float32, or subnormal in float16, there is nothing to compare.
        atol = 1e-7 if dtype == torch.float16 else 1e-37
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)
    total, *_ = sum_of(case, 0.25, gamma)
    torch.testing.assert_close(total.double(), truth[0].sum(), rtol=6e-6, atol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("C", [3, 80])
@pytest.mark.parametrize("form", FORMS)
def test_ignored_locations_count_for_nothing(
    device: str, form: str, C: int, garbage: float
) -> None:
    case = make_case(form, C, torch.float32, device, images=1)
    ignored = (case.labels < -1) | (case.labels >= C)
    parts = ignored.split([x[:, 0].numel() // len(x) for x in case.logits], dim=1)
    logits = [
        x.detach().masked_fill(part.view(len(x), 1, *x.shape[2:]), garbage).requires_grad_()
        for x, part in zip(case.logits, parts, strict=True)
    ]
    dirty = Case(logits, case.labels.where(~ignored, torch.iinfo(torch.int64).max), None)
    for function in (sum_of, each_of):
        torch.testing.assert_close(function(dirty, 0.25, 2.0), function(case, 0.25, 2.0))


# ---- CPU instruction sets -----------------------------------------------------------------------

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
ISA_PROGRAM = """
import sys, torch
from fcos_ext import _host
inputs = torch.load(sys.argv[1])
assert _host.cpu_isa() == sys.argv[3], _host.cpu_isa()
results = []
for logits, labels, quality, gamma in inputs:
    case = logits, labels, quality, None, 0.25, gamma
    loss, gradients = torch.ops.fcos_ext.sigmoid_focal_loss_with_gradient(*case)
    results += [loss, *gradients]
    grad = torch.full_like(loss, 0.1)
    results += torch.ops.fcos_ext.sigmoid_focal_loss_backward(grad, *case)
torch.save(results, sys.argv[2])
"""


def test_instruction_sets(tmp_path: Path) -> None:
    """All that this CPU has agree to the rounding; each runs in a process of its own."""
    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]
    inputs = []
    for dtype in FLOATS:
        for gamma in (2.0, 1.5):
            case = make_case("mixed", 80, dtype, quality=True)
            inputs.append(([x.detach() for x in case.logits], *case[1:], gamma))
    torch.save(inputs, tmp_path / "inputs.pt")
    running = []
    for isa in available:
        command = [sys.executable, "-c", ISA_PROGRAM, "inputs.pt", f"{isa}.pt", isa]
        environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
    assert [process.wait() for process in running] == [0] * len(available)
    baseline, *others = (torch.load(tmp_path / f"{isa}.pt") for isa in available)
    for results in others:
        for actual, expected in zip(results, baseline, strict=True):
            eps = torch.finfo(actual.dtype).eps
            torch.testing.assert_close(actual, expected, rtol=max(eps, 4e-6), atol=1e-7)
