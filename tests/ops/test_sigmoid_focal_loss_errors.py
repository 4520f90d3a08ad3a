"""sigmoid_focal_loss: what is wrong is said, by the public function and by the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import sigmoid_focal_loss
from tests.ops.sigmoid_focal_loss_cases import OPS

X, Y, ONE = torch.zeros(5, 6), torch.zeros(5).long(), torch.tensor(1.0)
LEVEL, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 20).long()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"logits": torch.zeros(5, 6).long()}, TypeError, "logits must be floating point, got"),
        ({"labels": torch.zeros(5)}, TypeError, "labels must be int64 or int32, got torch.float"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels must have the shape .*\(4,\)"),
        ({"logits": torch.tensor(0.0)}, ValueError, r"labels must have the shape of logits"),
        ({"alpha": 1.5}, ValueError, r"alpha must lie in 0\.\.1, or be -1 for no weights, got 1.5"),
        ({"gamma": -1.0}, ValueError, "gamma must be finite and >= 0, got -1.0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite and >= 0, got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        (
            {"reduction": "mean", "normalizer": torch.tensor(2.0)},
            ValueError,
            "normalizer needs reduction='sum', got 'mean'",
        ),
        ({"alpha": -0.5}, ValueError, r"alpha must lie in 0\.\.1, or be -1"),
        ({"quality": Y}, TypeError, "quality must be floating point, got torch.int64"),
        ({"quality": X}, ValueError, "quality must have the shape of labels"),
        ({"logits": []}, ValueError, "logits must have 1 to 8 levels, got 0"),
        ({"logits": [LEVEL] * 9}, ValueError, "logits must have 1 to 8 levels, got 9"),
        ({"logits": [LEVEL, LEVEL[0]]}, ValueError, r"levels must be \[N, C, H_l, W_l\]"),
        ({"logits": [LEVEL, LEVEL[:, :2]]}, ValueError, "levels must be .* of the same N and C"),
        ({"logits": [LEVEL, LEVEL.double()]}, TypeError, "all levels must have the same dtype"),
        ({"logits": [LEVEL]}, ValueError, r"labels must be \[N, L\] = \(2, 20\), .*\(5,\)"),
        (
            {"normalizer": torch.ones(2)},
            ValueError,
            r"normalizer must be a 0-d tensor, got shape \(2,\)",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(5, 6), "labels": torch.zeros(5).long()} | changes
    with pytest.raises(error, match=f"sigmoid_focal_loss: {message}"):
        sigmoid_focal_loss(**arguments)


LEVEL_MESSAGE = r"a level must be \[N, C, H, W\], got 3 dimensions"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": []}, "logits must have 1 to 8 levels, got 0"),
        ({"logits": [LEVEL] * 9}, "logits must have 1 to 8 levels, got 9"),
        ({"logits": [LEVEL[0]]}, LEVEL_MESSAGE),
        ({"logits": [LEVEL[:1], LEVEL]}, "all levels must have the same N, C and dtype"),
        ({"logits": [LEVEL, LEVEL[:, 1:]]}, "all levels must have the same N, C and dtype"),
        ({"logits": [LEVEL, LEVEL.half()]}, "all levels must have the same N, C and dtype"),
        ({"logits": [LEVEL.long()]}, "logits must be floating point, got Long"),
        ({"logits": [LEVEL, LEVEL]}, r"labels must be \[N, L\] .* N = 2 and L = 40"),
        ({"labels": LABELS[:1]}, r"labels must be \[N, L\] .* N = 2 and L = 20"),
        ({"labels": LABELS[0]}, r"labels must be \[N, L\] "),
        ({"labels": LABELS.short()}, "labels must be int64 or int32, got Short"),
        ({"quality": LABELS[:1].float()}, "quality must have the shape of labels"),
        ({"quality": LABELS.half()}, "quality must be Float, got Half"),
        ({"normalizer": torch.ones(1)}, "normalizer must be a 0-d tensor, got 1 dimensions"),
        ({"normalizer": ONE.double()}, "normalizer must be Float, got Double"),
    ],
)
def test_kernel_errors(device: str, changes: dict[str, Any], message: str) -> None:
    def on_device(value: Any) -> Any:
        if isinstance(value, list):
            return [on_device(x) for x in value]
        return value.to(device) if isinstance(value, Tensor) else value

    arguments = {"logits": [LEVEL], "labels": LABELS, "quality": None, "normalizer": None}
    logits, labels, quality, normalizer = map(on_device, (arguments | changes).values())
    case = logits, labels, quality, normalizer, 0.25, 2.0
    with pytest.raises(RuntimeError, match=f"sigmoid_focal_loss: {message}"):
        OPS.sigmoid_focal_loss(*case)
    with pytest.raises(RuntimeError, match=message):
        OPS.sigmoid_focal_loss_with_gradient(*case)
    with pytest.raises(RuntimeError, match=message):
        OPS.sigmoid_focal_loss_backward(on_device(ONE), *case)
    with pytest.raises(RuntimeError, match=message):
        OPS.sigmoid_focal_loss_rescale_(logits, on_device(ONE), *case)
    if normalizer is None:
        with pytest.raises(RuntimeError, match=message):
            OPS.sigmoid_focal_loss_each(*case[:3], 0.25, 2.0)
        with pytest.raises(RuntimeError, match=message):
            OPS.sigmoid_focal_loss_each_backward(logits, *case[:3], 0.25, 2.0)


@pytest.mark.parametrize(
    "grad, message",
    [
        (ONE.double(), "grad must be Float, got Double"),
        (torch.ones(1), "grad must be a 0-d tensor, got 1 dimensions"),
    ],
)
def test_kernel_errors_of_the_gradient(device: str, grad: Tensor, message: str) -> None:
    case = [LEVEL.to(device)], LABELS.to(device), None, None, 0.25, 2.0
    with pytest.raises(RuntimeError, match=f"sigmoid_focal_loss_backward: {message}"):
        OPS.sigmoid_focal_loss_backward(grad.to(device), *case)
    with pytest.raises(RuntimeError, match=f"sigmoid_focal_loss_rescale_: {message}"):
        OPS.sigmoid_focal_loss_rescale_(case[0], grad.to(device), *case)


@pytest.mark.parametrize(
    "grads, message",
    [
        ([], "must have 1 levels, got 0"),
        ([LEVEL[:1]], "must have the shapes and the dtype of logits"),
        ([LEVEL.half()], "must have the shapes and the dtype of logits"),
    ],
)
def test_kernel_errors_of_gradients(device: str, grads: list[Tensor], message: str) -> None:
    case = [LEVEL.to(device)], LABELS.to(device), None
    grads = [grad.to(device) for grad in grads]
    with pytest.raises(RuntimeError, match=f"_each_backward: grads {message}"):
        OPS.sigmoid_focal_loss_each_backward(grads, *case, 0.25, 2.0)
    with pytest.raises(RuntimeError, match=f"_rescale_: gradients {message}"):
        OPS.sigmoid_focal_loss_rescale_(grads, ONE.to(device), *case, None, 0.25, 2.0)


def test_kernel_error_of_the_layout(device: str) -> None:
    level = LEVEL.to(device)
    gradients = [level.contiguous(memory_format=torch.channels_last)]
    with pytest.raises(RuntimeError, match="gradients must have the memory format of logits"):
        OPS.sigmoid_focal_loss_rescale_(
            gradients, ONE.to(device), [level], LABELS.to(device), None, None, 0.25, 2.0
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_errors_of_devices() -> None:
    with pytest.raises(RuntimeError, match="logits and labels must be on the same device"):
        OPS.sigmoid_focal_loss([LEVEL.cuda()], LABELS, None, None, 0.25, 2.0)
