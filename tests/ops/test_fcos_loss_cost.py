"""fcos_loss: what it calls, launches and holds in memory; and all of it in the simulator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Case, peak_extra_bytes
from fcos_ext import FCOSLoss, FCOSLossOptions, GroundTruth, fcos_loss, fcos_loss_ref
from tests.ops.pyramids import LAYOUTS, SIZES, Pyramid, make_options, make_pyramid, make_truth
from tests.simt.build import load_simt_library

#: Each is one kernel on a GPU.
FORWARD = [
    "assign_targets",
    "fcos_normalizers_and_labels",
    "sigmoid_focal_loss_with_gradient",
    "box_and_centerness_loss_with_gradient",
]
BACKWARD = ["box_and_centerness_loss_rescale_", "sigmoid_focal_loss_rescale_"]
#: What changes no memory and starts nothing.
VIEWS = {"select", "detach", "alias", "view", "expand"}


class Calls(TorchDispatchMode):
    """Takes down our operators, and PyTorch's; and runs ours in the simulator, if asked."""

    def __init__(self, simulate: bool = False) -> None:
        super().__init__()
        self.simulate = simulate
        self.ours: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1]
        (self.ours if func.namespace == "fcos_ext" else self.others).append(name.split(".")[0])
        if self.simulate and func.namespace == "fcos_ext":
            func = getattr(torch.ops.fcos_ext_simt, name)
        return func(*args, **(kwargs or {}))


def gradients(loss: FCOSLoss, pyramid: Pyramid, share: float = 1.0) -> tuple[Tensor, ...]:
    """Each loss on its own, as nothing of PyTorch's is to be counted."""
    incoming = [torch.full_like(term, share) for term in loss[:3]]
    return torch.autograd.grad(loss[:3], pyramid.leaves, incoming)


def test_six_operators_and_no_other(device: str) -> None:
    for padded in (False, True):
        pyramid = make_pyramid(dtype=torch.float32, device=device, layout="mixed")
        truth = make_truth(device=device, padded=padded)
        incoming = [torch.ones((), device=device)] * 3
        with Calls() as calls:
            loss = fcos_loss(pyramid, truth, make_options())
        assert calls.ours == FORWARD
        assert set(calls.others) <= VIEWS, calls.others
        with Calls() as calls:
            torch.autograd.grad(loss[:3], pyramid.leaves, incoming)
        assert sorted(calls.ours) == BACKWARD
        assert set(calls.others) <= VIEWS, calls.others


def test_no_gradient_no_buffers(device: str) -> None:
    pyramid = make_pyramid(dtype=torch.float32, device=device)
    with torch.no_grad(), Calls() as calls:
        fcos_loss(pyramid, make_truth(device=device), make_options())
    assert calls.ours == [name.removesuffix("_with_gradient") for name in FORWARD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(device: str, dtype: torch.dtype) -> None:
    """The gradients, and 20 bytes a location of targets: little more than the logits have."""
    sizes = ((50, 84), (25, 42), (13, 21), (7, 11))
    options = make_options(sizes)
    pyramid = make_pyramid(80, dtype, device, sizes=sizes)
    truth = make_truth(80, device, extent=(400.0, 672.0))

    def step(*_: Any) -> tuple[Tensor, ...]:
        return gradients(fcos_loss(pyramid, truth, options), pyramid)

    step()
    case = Case({}, torch.device(device), lambda seed: (), {"": step}, step, 0, 0)
    logits = sum(level.nbytes for level in pyramid.logits)
    gradient = sum(level.nbytes for level in pyramid.leaves)
    assert gradient <= peak_extra_bytes(case, "", ()) <= 1.2 * logits


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simt(layout: str, seed: int) -> None:
    """The whole section by the CUDA source: six launches, and the results of the reference."""
    simt = load_simt_library()
    dtype = (torch.float32, torch.bfloat16, torch.float64)[seed % 3]
    options = (
        make_options(),
        make_options(quality="iou", box_weights="none"),
        make_options(box_loss="iou", gamma=1.5, normalize_ltrb=False),
    )[seed % 3]
    pyramid = make_pyramid(20, dtype, images=3, layout=layout)
    truth = make_truth(21, images=3, padded=seed == 1)
    simt.set_seed(seed)
    before = simt.launches
    with simt.guarded_memory(), Calls(simulate=True) as calls:
        loss = fcos_loss(pyramid, truth, options)
        results = [*(x.detach() for x in loss), *gradients(loss, pyramid)]
    assert simt.launches - before == len(calls.ours) == 6
    compare(results, pyramid, truth, options)
    with simt.guarded_memory(), Calls(simulate=True):
        loss = fcos_loss(pyramid, truth, options)
        scaled = [*(x.detach() for x in loss), *gradients(loss, pyramid, 3.0)]
    assert all(torch.equal(a, b) for a, b in zip(scaled[:5], results[:5], strict=True))
    compare(scaled, pyramid, truth, options, 3.0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simt_reads_nothing_else_whatever_it_is_given(dtype: torch.dtype, garbage: float) -> None:
    """Non-finite predictions, labels of any number, counts and offsets beyond the boxes."""
    simt = load_simt_library()
    pyramid = make_pyramid(5, dtype, layout="mixed")
    with torch.no_grad():
        for leaf in pyramid.leaves:
            leaf[torch.rand(leaf.shape) < 0.2] = garbage
    for padded in (False, True):
        truth = make_truth(5, padded=padded)
        truth.labels[::2] = torch.tensor([2**62, -(2**63), 5, -2, 7])[: len(truth.labels[::2])]
        if truth.counts is not None:
            truth = truth._replace(counts=truth.counts + 2**40)
        elif truth.offsets is not None:
            truth = truth._replace(offsets=truth.offsets * -(2**40) + 3)
        simt.set_seed(0)
        with simt.guarded_memory(), Calls(simulate=True):
            loss = fcos_loss(pyramid, truth, make_options())
            gradients(loss, pyramid)
        assert 0 <= loss.num_pos.item() <= loss.num_pos.item() + loss.num_ignored.item() <= 2 * 165


def compare(
    results: list[Tensor],
    pyramid: Pyramid,
    truth: GroundTruth,
    options: FCOSLossOptions,
    share: float = 1.0,
) -> None:
    exact = pyramid.to(torch.float64)
    loss = fcos_loss_ref(exact, truth, options)
    expected = [*(x.detach() for x in loss), *gradients(loss, exact, share)]
    assert expected[3] > 5 and len(results) == 5 + 3 * len(SIZES)
    for ours, other in zip(results, expected, strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, other)
            continue
        rtol = 1e-9 if ours.dtype == torch.float64 else max(2e-5, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours.double(), other, rtol=rtol, atol=rtol * 0.1)
