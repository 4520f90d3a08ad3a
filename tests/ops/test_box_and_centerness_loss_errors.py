"""box_and_centerness_loss: what is wrong is said, by the public functions and by the kernel."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import box_and_centerness_loss, box_and_centerness_loss_ref
from tests.ops.ltrb import make_rows

OPS = torch.ops.fcos_ext


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
        ({"quality": "giou"}, ValueError, "quality must be one of .*'iou'.*, got 'giou'"),
        ({"num_classes": -1}, ValueError, "num_classes must be >= 0, got -1"),
        ({"normalizers": torch.ones(3)}, ValueError, r"normalizers must have shape \[2\], got"),
        ({"normalizers": torch.ones(2).int()}, TypeError, "normalizers must be floating point"),
        ({"pred": [torch.ones(1, 4, 3, 1)]}, TypeError, "pred and centerness must both be"),
    ],
)
def test_errors(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    x = torch.ones(3, 4)
    arguments = {"pred": x, "centerness": x[:, 0], "target": x, "labels": torch.ones(3).long()}
    with pytest.raises(error, match=f"^box_and_centerness_loss: {message}"):
        function(**(arguments | changes))


@pytest.mark.parametrize("function", [box_and_centerness_loss, box_and_centerness_loss_ref])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"pred": []}, ValueError, "pred must have 1 to 8 levels, got 0"),
        ({"pred": [torch.ones(1, 5, 2, 3)]}, ValueError, "levels of pred must have C = 4, got 5"),
        ({"centerness": [torch.ones(1, 1, 2, 2)]}, ValueError, "centerness must agree with pred"),
        ({"centerness": [torch.ones(1, 2, 2, 3)]}, ValueError, "levels of centerness must have C"),
        ({"target": torch.ones(1, 5, 4)}, ValueError, r"target must have .* \[1, 6, 4\], got"),
        ({"labels": torch.ones(6).int()}, ValueError, "labels must have the shape"),
        (
            {"centerness": [torch.ones(1, 1, 2, 3, device="meta")]},
            ValueError,
            "centerness must be on the device of the first level, cpu, got meta",
        ),
    ],
)
def test_errors_of_levels(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    tensors = ("pred", "centerness", "target", "labels")
    arguments = {name: make_levels("cpu")[name] for name in tensors}
    with pytest.raises(error, match=f"^box_and_centerness_loss: {message}"):
        function(**(arguments | changes))


def test_reference_has_the_same_signature() -> None:
    functions = (box_and_centerness_loss, box_and_centerness_loss_ref)
    public, reference = (inspect.signature(function) for function in functions)
    assert public == reference


def make_levels(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of the operator from ``pred`` on: one level of 2 x 3 locations."""
    rows = make_rows(1, 6, dtype=dtype, device=device)
    return {
        "pred": [rows.pred.detach().transpose(1, 2).reshape(1, 4, 2, 3)],
        "centerness": [torch.zeros(1, 1, 2, 3, dtype=dtype, device=device)],
        "target": rows.target,
        "labels": rows.labels,
        "centerness_target": rows.weights,
        "normalizers": torch.ones(2, dtype=dtype, device=device),
        "num_classes": 80,
        "kind": 2,
        "weighted": True,
        "iou_quality": False,
        "smooth": 0.0,
        "eps": 1e-7,
    }


LEVEL, SCORES = torch.ones(1, 4, 2, 3), torch.ones(1, 1, 2, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pred": []}, "pred must have 1 to 8 levels, got 0"),
        ({"pred": [LEVEL] * 9}, "pred must have 1 to 8 levels, got 9"),
        ({"centerness": []}, "centerness must have 1 levels, as pred, got 0"),
        ({"pred": [LEVEL[:, :3]]}, r"pred must be levels \[N, 4, H, W\] of the same N, got 4 dim"),
        ({"pred": [LEVEL[0, 0, 0]]}, r"pred must be levels \[N, 4, H, W\] of the same N, got 1 d"),
        ({"pred": [LEVEL[0]]}, "rows of pred must have 4 values, got 3"),
        ({"pred": [LEVEL[0].mT]}, "rows of pred must have 4 values, got 2"),
        ({"pred": [torch.ones(6, 4)]}, "centerness must have a value for each row of pred"),
        (
            {"pred": [torch.ones(1, 6, 4)], "centerness": [torch.ones(1, 5)]},
            "centerness must have a value for each row of pred",
        ),
        (
            {"pred": [torch.ones(6, 4)], "centerness": [torch.ones(6)]},
            r"target must be \[N, L, 4\].* N = 1 and L = 6",  # without N, as pred
        ),
        ({"pred": [LEVEL.int()]}, "pred must be floating point, got"),
        ({"centerness": [SCORES[..., :2]]}, "centerness must be levels .* level 0 is not"),
        ({"centerness": [SCORES.int()]}, "centerness must be floating point, got"),
        (
            {"pred": [LEVEL, LEVEL.double()], "centerness": [SCORES] * 2},
            "all levels must have the same dtype",
        ),
        ({"target": torch.ones(1, 5, 4)}, r"target must be \[N, L, 4\].* N = 1 and L = 6"),
        ({"target": torch.ones(1, 6, 4).int()}, "target must be floating point, got"),
        ({"labels": torch.ones(1, 6)}, "labels must be int64 or int32, got Float"),
        ({"labels": torch.ones(6).int()}, r"labels must be \[N, L\], N = 1 and L = 6"),
        ({"centerness_target": torch.ones(6)}, "centerness_target must have the shape of labels"),
        ({"normalizers": torch.ones(3)}, r"normalizers must have shape \[2\]"),
        ({"normalizers": torch.ones(2).double()}, "normalizers must be Float, got Double"),
        ({"num_classes": -1}, "num_classes must be >= 0, got -1"),
        ({"kind": 7}, r"kind must lie in 0\.\.4, got 7"),
    ],
)
def test_kernel_errors(device: str, changes: dict[str, Any], message: str) -> None:
    def on_device(value: Any) -> Any:
        if isinstance(value, list):
            return [on_device(x) for x in value]
        return value.to(device) if isinstance(value, Tensor) else value

    inputs = (make_levels(device) | {k: on_device(v) for k, v in changes.items()}).values()
    pred, centerness, *_ = inputs
    one = torch.ones((), device=device)
    calls: dict[str, Any] = {
        "": (),
        "_with_gradient": (),
        "_backward": (one, one),
        "_rescale_": (pred, centerness, one, one),
    }
    for suffix, first in calls.items():
        name = f"box_and_centerness_loss{suffix}"
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            getattr(OPS, name)(*first, *inputs)


def test_kernel_errors_of_the_gradient(device: str) -> None:
    inputs = list(make_levels(device, torch.float64).values())
    pred, centerness, *_ = inputs
    one = torch.ones((), device=device)
    for grads, message in (
        ((one, one.double()), "grad_box must be Double, got Float"),
        ((one.double(), one), "grad_centerness must be Double, got Float"),
        ((one.double()[None], one), "grad_box must be a 0-d tensor, got 1 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=f"box_and_centerness_loss_backward: {message}"):
            OPS.box_and_centerness_loss_backward(*grads, *inputs)
    grads = one.double(), one.double()
    for by_pred, by_centerness, message in (
        ([], centerness, "by_pred must have 1 levels, got 0"),
        ([pred[0].float()], centerness, "by_pred must have the shapes and the dtype of pred"),
        (pred, [centerness[0][..., :2]], "by_centerness must have the shapes and the dtype of"),
        ([pred[0].mT.contiguous().mT], centerness, "gradients must have one stride between loc"),
    ):
        with pytest.raises(RuntimeError, match=f"box_and_centerness_loss_rescale_: {message}"):
            OPS.box_and_centerness_loss_rescale_(by_pred, by_centerness, *grads, *inputs)
