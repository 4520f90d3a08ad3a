"""What the packages promise to those who import them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fcos
import fcos_ext
from fcos_ext import _library

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = [n for n in fcos_ext.__all__ if inspect.isfunction(getattr(fcos_ext, n))]
OPERATORS = [name for name in FUNCTIONS if not name.endswith("_ref")]


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a new process has imported after the statement."""
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_its_reference(name: str) -> None:
    """Of the same signature, so that one can stand for the other."""
    operator, reference = getattr(fcos_ext, name), getattr(fcos_ext, f"{name}_ref")
    assert inspect.signature(operator) == inspect.signature(reference)
    assert operator is not reference


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented_and_typed(name: str) -> None:
    function = getattr(fcos_ext, name)
    assert function.__doc__
    signature = inspect.signature(function)
    untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not untyped and signature.return_annotation is not signature.empty


@pytest.mark.parametrize("package", [fcos, fcos_ext], ids=lambda package: package.__name__)
def test_types_are_shipped(package: ModuleType) -> None:
    assert Path(inspect.getfile(package)).with_name("py.typed").is_file()


def test_kernels_need_torch_alone() -> None:
    """Neither the detector nor anything that it depends on, which others may not have."""
    loaded = modules_after("import fcos_ext")
    assert "torch" in loaded
    assert not loaded & {"fcos", "torchvision", "matplotlib", "pycocotools", "rich", "tyro", "PIL"}


def test_settings_need_no_torch() -> None:
    """`fcos --help` starts from them."""
    assert not modules_after("import fcos.config") & {"torch", "torchvision", "matplotlib"}


def test_cpu_library_is_loaded() -> None:
    """A build that silently did not happen would leave all other tests to the references."""
    assert _library.missing["cpu"] is None
    assert _library.why_missing("cpu") is None


def test_build_info_agrees_with_what_is_there() -> None:
    info = _library.build_info()
    assert info["torch"] and info["cpu"]["instruction_sets"]
    if _library.missing["cuda"] is not None:
        assert "skipped" in info["cuda"] or torch.version.cuda is None


def test_kernels_of_unknown_devices() -> None:
    assert _library.why_missing("mps") == "there are none for mps"
    assert _library.kernels("sigmoid_focal_loss") <= {"cpu", "cuda"}


@pytest.mark.parametrize(
    "info, error, expected",
    [
        ({"cuda": {"skipped": "FORCE_CUDA=0"}}, "No module named _C_cuda", "not built: FORCE_CUDA"),
        ({"cuda": {"nvcc": "13.0"}}, "libcudart.so.13: cannot open", "libcudart.so.13: cannot"),
        ({}, "No module named _C_cuda", "No module named _C_cuda"),
    ],
)
def test_reason_is_that_of_the_build_or_of_the_loader(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, object], error: str, expected: str
) -> None:
    monkeypatch.setitem(_library.missing, "cuda", error)
    monkeypatch.setattr(_library, "build_info", lambda: info)
    reason = _library.why_missing("cuda")
    assert reason is not None and reason.startswith(expected)
