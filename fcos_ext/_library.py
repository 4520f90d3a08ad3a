"""Loads the compiled kernels and attaches the Python half (shapes, gradients) of each operator."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

BUILD_INFO = Path(__file__).with_name("_build_info.json")


def _load(name: str) -> str | None:
    """Import a compiled module. Returns None, or why it could not be loaded."""
    try:
        importlib.import_module(f"fcos_ext.{name}")
    except ImportError as error:
        return str(error)
    return None


def build_info() -> dict[str, Any]:
    """What the build decided, and why: written by ``setup.py``; empty if nothing was built."""
    try:
        info: dict[str, Any] = json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}
    return info


#: Why a library is missing, by device type; None if it is loaded.
missing: dict[str, str | None] = {"cpu": _load("_C")}
missing["cuda"] = _load("_C_cuda") if missing["cpu"] is None else "the CPU library is missing"


def why_missing(device: str) -> str | None:
    """Reason, in words, that there are no compiled kernels for ``device``; None if there are."""
    error = missing.get(device, f"there are none for {device}")
    if error is None:
        return None
    reason: str | None = build_info().get(device, {}).get("skipped")
    return f"not built: {reason}" if reason else error


if missing["cpu"] is not None:
    warnings.warn(
        f"fcos_ext: no compiled kernels ({why_missing('cpu')}); everything runs on its slower "
        "PyTorch reference",
        RuntimeWarning,
        stacklevel=2,
    )
elif missing["cuda"] is not None and torch.cuda.is_available():
    warnings.warn(
        f"fcos_ext: no CUDA kernels ({why_missing('cuda')}); CUDA tensors run on the slower "
        "PyTorch references",
        RuntimeWarning,
        stacklevel=2,
    )


#: Holds what is registered from Python for as long as the process lives.
_IMPLEMENTATIONS = torch.library.Library("fcos_ext", "IMPL")


def kernels(op: str) -> frozenset[str]:
    """Device types that have a compiled kernel for ``op``. Call at import: it is not traceable."""
    if missing["cpu"] is not None:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(d for d in ("cpu", "cuda") if has_kernel(f"fcos_ext::{op}", d.upper()))


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Attach shape inference and a gradient to a compiled operator.

    Without ``backward``, differentiating ``op`` raises: PyTorch would drop the term silently.
    """
    if missing["cpu"] is not None:
        return
    torch.library.register_fake(f"fcos_ext::{op}", fake)
    torch.library.register_autograd(
        f"fcos_ext::{op}", backward or _not_differentiable(op), setup_context=setup_context
    )


def register_constant(op: str, *, fake: Callable[..., Any]) -> None:
    """Attach shape inference to a compiled operator whose results never require a gradient.

    Such as labels and indices. Autograd does not see the call, which saves the time of its Python
    half.
    """
    if missing["cpu"] is not None:
        return
    torch.library.register_fake(f"fcos_ext::{op}", fake)
    _IMPLEMENTATIONS.impl(op, torch.library.fallthrough_kernel, "Autograd")


def below_autograd() -> AbstractContextManager[None]:
    """Within, operators are called without the Python half of their gradients.

    That half costs more host time than launching a kernel. It is not needed where no gradient is
    asked for, or where a ``torch.autograd.Function`` stands for the whole. Not traceable.
    """
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def _not_differentiable(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op} is not differentiable: for second derivatives use the _ref function"
        )

    return backward
