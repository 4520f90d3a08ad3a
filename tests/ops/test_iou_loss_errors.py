"""iou_loss: what is wrong is said, by the public functions and, of itself, by the kernel."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import iou_loss, iou_loss_ref

OP = torch.ops.fcos_ext.iou_loss.default
OP_BACKWARD = torch.ops.fcos_ext.iou_loss_backward.default


@pytest.mark.parametrize("function", [iou_loss, iou_loss_ref])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"pred": torch.ones(3, 4).long()}, TypeError, "pred must be floating point, got .*int64"),
        ({"target": torch.ones(3, 4).int()}, TypeError, "target must be floating point"),
        ({"weights": torch.ones(3).long()}, TypeError, "weights must be floating point"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.ones(3) > 0}, TypeError, "labels must be integers, got torch.bool"),
        ({"pred": torch.ones(3, 5)}, ValueError, r"pred must have shape \[\.\.\., 4\], got \[3, 5"),
        ({"pred": torch.tensor(1.0)}, ValueError, r"pred must have shape \[\.\.\., 4\], got \[\]"),
        ({"target": torch.ones(1, 4)}, ValueError, r"target must .* \[3, 4\], got \[1, 4\]"),
        ({"weights": torch.ones(3, 1)}, ValueError, r"weights must .* \[3\], got \[3, 1\]"),
        ({"labels": torch.ones(4).long()}, ValueError, r"labels must .* \[3\], got \[4\]"),
        ({"target": torch.ones(3, 4, device="meta")}, ValueError, "target must be on the device"),
        ({"kind": "eiou"}, ValueError, "kind must be one of .*'ciou'.*, got 'eiou'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .*'sum'.*, got 'max'"),
        ({"smooth": -1.0}, ValueError, "smooth must be finite and >= 0, got -1.0"),
        ({"smooth": math.nan}, ValueError, "smooth must be finite and >= 0, got nan"),
        ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
        ({"normalizer": 3.0}, TypeError, "normalizer must be a Tensor"),
        ({"normalizer": torch.ones(1)}, ValueError, r"normalizer must have no dim.*got shape \[1"),
        (
            {"normalizer": torch.tensor(1.0), "reduction": "mean"},
            ValueError,
            "normalizer needs reduction=\"sum\", got 'mean'",
        ),
    ],
)
def test_errors(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    arguments = {"pred": torch.ones(3, 4), "target": torch.ones(3, 4), **changes}
    with pytest.raises(error, match=f"^iou_loss: {message}"):
        function(**arguments)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(iou_loss) == inspect.signature(iou_loss_ref)


X, ROW, ONE = torch.ones(5, 4), torch.ones(5), torch.tensor(1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pred": ONE}, r"pred must be \[..., 4\], got 0 dimensions"),
        ({"pred": torch.ones(5, 3)}, r"pred must be \[..., 4\], got 2 dimensions, the last of 3"),
        ({"pred": X.long()}, "pred must be floating point, got Long"),
        ({"target": X[:4]}, "target must have the shape of pred"),
        ({"target": X.int()}, "target must be floating point, got Int"),
        ({"weights": ROW[:4]}, "weights must have the shape of pred without its last dimension"),
        ({"weights": ROW.long()}, "weights must be floating point, got"),
        ({"labels": ROW}, "labels must be int64 or int32, got Float"),
        ({"labels": ROW.long()[:4]}, "labels must have the shape of pred without its last"),
        ({"kind": -1}, r"kind must lie in 0\.\.4, got -1"),
        ({"kind": 5}, r"kind must lie in 0\.\.4, got 5"),
    ],
)
def test_kernel_errors(device: str, changes: dict[str, Any], message: str) -> None:
    common = {"pred": X, "target": X, "weights": ROW, "labels": ROW.long(), "kind": 2} | changes
    common = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in common.items()}
    common |= {"smooth": 0.0, "eps": 1e-7}
    one = ONE.to(device)
    with pytest.raises(RuntimeError, match=f"iou_loss: {message}"):
        OP(**common, normalizer=None, reduction=1)
    with pytest.raises(RuntimeError, match=f"iou_loss_backward: {message}"):
        OP_BACKWARD(**common, grad=one, divisor=one)


@pytest.mark.parametrize(
    "normalizer, reduction, message",
    [
        (None, 3, r"reduction must lie in 0\.\.2, got 3"),
        (ONE, 0, "normalizer needs the sum, got reduction 0"),
        (ONE, 2, "normalizer needs the sum, got reduction 2"),
        (torch.ones(1), 1, "normalizer must be a 0-d tensor, got 1 dimensions"),
        (ONE.double(), 1, "normalizer must be Float, got Double"),
    ],
)
def test_kernel_errors_of_the_reduction(
    device: str, normalizer: Tensor | None, reduction: int, message: str
) -> None:
    normalizer = None if normalizer is None else normalizer.to(device)
    x = X.to(device)
    with pytest.raises(RuntimeError, match=f"iou_loss: {message}"):
        OP(x, x, None, None, normalizer, 2, reduction, 0.0, 1e-7)


@pytest.mark.parametrize(
    "grad, divisor, message",
    [
        (ROW, ONE, "grad must be a 0-d tensor, got 1 dimensions"),
        (ONE.double(), ONE, "grad must be Float, got Double"),
        (ONE, ONE.double(), "divisor must be Float, got Double"),
        (ROW.double(), None, "grad must have the dtype of pred, got Double"),
        (ONE, None, "grad must have the shape of pred without its last dimension"),
    ],
)
def test_kernel_errors_of_the_gradient(
    device: str, grad: Tensor, divisor: Tensor | None, message: str
) -> None:
    divisor = None if divisor is None else divisor.to(device)
    x = X.to(device)
    with pytest.raises(RuntimeError, match=f"iou_loss_backward: {message}"):
        OP_BACKWARD(grad.to(device), x, x, None, None, divisor, 2, 0.0, 1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_errors_of_devices() -> None:
    with pytest.raises(RuntimeError, match="pred and target must be on the same device"):
        OP(X.cuda(), X, None, None, None, 2, 1, 0.0, 1e-7)
