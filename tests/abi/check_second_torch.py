"""The libraries, built under one torch, work under another: run by the interpreter of the other.

    python -m venv .venv-abi && .venv-abi/bin/pip install torch==2.13.0 numpy
    PYTHONPATH=. .venv-abi/bin/python tests/abi/check_second_torch.py

Every compiled operator runs on the CPU, forward and backward, and is compared with its reference
in float64. Needs nothing but torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fcos_ext
from fcos_ext import _library


def check_sigmoid_focal_loss() -> None:
    labels = torch.randint(-2, 80, (300,))
    count = (labels >= 0).sum()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(300, 80).mul(3).to(dtype).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        for reduction in ("none", "sum"):
            normalizer = count if reduction == "sum" else None
            loss, truth = (
                function(x, labels, 0.3, 1.5, reduction=reduction, normalizer=normalizer)
                for function, x in (
                    (fcos_ext.sigmoid_focal_loss, logits),
                    (fcos_ext.sigmoid_focal_loss_ref, exact),
                )
            )
            compare(loss, truth)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            compare(gradient, torch.autograd.grad(truth.sum(), exact)[0])


def check_nms() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        corner, sides = torch.rand(2, 500, 2).mul(100).unbind()
        boxes = torch.cat((corner, corner + sides), dim=1).to(dtype)
        scores, groups = torch.rand(500).to(dtype), torch.randint(-1, 3, (500,))
        for limit in (None, 10):
            kept = fcos_ext.nms(boxes, scores, 0.4, max_detections=limit)
            assert torch.equal(kept, fcos_ext.nms_ref(boxes, scores, 0.4, max_detections=limit))
            kept, exact = (
                function(boxes, scores, groups, 0.4, max_detections=limit)
                for function in (fcos_ext.batched_nms, fcos_ext.batched_nms_ref)
            )
            assert torch.equal(kept, exact)


def compare(actual: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(actual.dtype).eps
    rtol = 1e-12 if actual.dtype == torch.float64 else max(eps, 1e-5)
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=min(eps, 1e-6))


CHECKS: dict[str, Callable[[], None]] = {
    "nms": check_nms,
    "sigmoid_focal_loss": check_sigmoid_focal_loss,
}


def main() -> None:
    built_with = _library.build_info().get("torch", "an unknown torch")
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {python}, torch {torch.__version__}; libraries built with {built_with}")
    if reason := _library.why_missing("cpu"):
        sys.exit(f"the CPU library does not load: {reason}")

    names = torch._C._dispatch_get_all_op_names()
    operators = {n.removeprefix("fcos_ext::") for n in names if n.startswith("fcos_ext::")}
    if unchecked := {name.removesuffix("_backward") for name in operators} - CHECKS.keys():
        sys.exit(f"operators that this program does not check: {', '.join(sorted(unchecked))}")
    for name in sorted(operators):
        if "cpu" not in _library.kernels(name):
            sys.exit(f"{name} has no CPU kernel")

    torch.manual_seed(0)
    for name, check in CHECKS.items():
        check()
        print(f"{name} agrees with the reference")

    reason = _library.why_missing("cuda")
    if torch.version.cuda is None and reason is None:
        sys.exit("the CUDA library claims to have loaded under a torch without CUDA")
    print(f"CUDA kernels: {'loaded' if reason is None else 'no, ' + reason.strip()}")


if __name__ == "__main__":
    main()
