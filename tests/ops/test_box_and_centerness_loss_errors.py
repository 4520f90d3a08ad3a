"""box_and_centerness_loss: what is wrong is said, by the public functions and by the kernel."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import box_and_centerness_loss, box_and_centerness_loss_ref
from tests.ops.ltrb import make_rows

OP = torch.ops.fcos_ext.box_and_centerness_loss.default
OP_BACKWARD = torch.ops.fcos_ext.box_and_centerness_loss_backward.default


@pytest.mark.parametrize("function", [box_and_centerness_loss, box_and_centerness_loss_ref])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"pred": torch.ones(3, 5)}, ValueError, r"pred must have shape \[..., 4\], got \[3, 5\]"),
        ({"target": torch.ones(3, 4).int()}, TypeError, "target must be floating point, got"),
        ({"centerness": torch.ones(3, 1)}, ValueError, r"centerness must .* \[3\], got \[3, 1\]"),
        ({"centerness": torch.ones(3).int()}, TypeError, "centerness must be floating point"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.ones(4).int()}, ValueError, r"labels must .* \[3\], got \[4\]"),
        ({"centerness_target": torch.ones(2)}, ValueError, "centerness_target must have the shape"),
        ({"target": torch.ones(3, 4, device="meta")}, ValueError, "target must be on the device"),
        ({"kind": "eiou"}, ValueError, "kind must be one of .*'ciou'.*, got 'eiou'"),
        ({"smooth": -1.0}, ValueError, "smooth must be finite and >= 0, got -1.0"),
        ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
    ],
)
def test_errors(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    x = torch.ones(3, 4)
    arguments = {"pred": x, "centerness": x[:, 0], "target": x, "labels": torch.ones(3).long()}
    with pytest.raises(error, match=f"^box_and_centerness_loss: {message}"):
        function(**(arguments | changes))


def test_reference_has_the_same_signature() -> None:
    functions = (box_and_centerness_loss, box_and_centerness_loss_ref)
    public, reference = (inspect.signature(function) for function in functions)
    assert public == reference


def make_tensors(device: str, dtype: torch.dtype) -> list[Tensor]:
    rows = make_rows(5, dtype=dtype, device=device)
    pred = rows.pred.detach()
    return [pred, pred[:, 0], rows.target, rows.labels, rows.weights]


@pytest.mark.parametrize(
    "number, wrong, message",
    [
        (0, torch.ones(5, 3), r"pred must be \[..., 4\], got 2 dimensions, the last of 3"),
        (1, torch.ones(4), "centerness must have the shape of pred without its last dimension"),
        (1, torch.ones(5).int(), "centerness must be floating point, got"),
        (2, torch.ones(4, 4), "target must have the shape of pred"),
        (3, torch.ones(5), "labels must be int64 or int32, got Float"),
        (3, torch.ones(4).int(), "labels must have the shape of pred without its last"),
        (4, torch.ones(5, 1), "centerness_target must have the shape of pred without"),
        (5, 7, r"kind must lie in 0\.\.4, got 7"),
    ],
)
def test_kernel_errors(device: str, number: int, wrong: Any, message: str) -> None:
    inputs = [*make_tensors(device, torch.float32), 2]
    inputs[number] = wrong.to(device) if isinstance(wrong, Tensor) else wrong
    one = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match=f"box_and_centerness_loss: {message}"):
        OP(*inputs, True, 0.0, 1e-7)
    with pytest.raises(RuntimeError, match=f"box_and_centerness_loss_backward: {message}"):
        OP_BACKWARD(one, one, *inputs, True, 0.0, 1e-7)


def test_kernel_errors_of_the_gradient(device: str) -> None:
    inputs = [*make_tensors(device, torch.float64), 2, True, 0.0, 1e-7]
    one = torch.ones((), device=device)
    for grads, message in (
        ((one, one.double()), "grad_box must be Double, got Float"),
        ((one.double(), one), "grad_centerness must be Double, got Float"),
        ((one.double()[None], one), "grad_box must be a 0-d tensor, got 1 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=f"box_and_centerness_loss_backward: {message}"):
            OP_BACKWARD(*grads, *inputs)
