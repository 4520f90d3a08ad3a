"""What this installation consists of, and what of it is missing and why: ``fcos env``."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch
from rich.table import Table

from fcos_ext import _library

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "pycocotools",
    "matplotlib",
    "tyro",
    "av",
    "timm",
)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, devices and kernels, as plain values."""
    info: dict[str, Any] = {
        "fcos": _version("fcos"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "kernels": {d: _library.why_missing(d) or "available" for d in ("cpu", "cuda")},
        "build": _library.build_info(),
    }
    if device is not None:
        info["device"] = str(device)
    if _library.missing["cpu"] is None:
        info["cpu"]["instruction_set"] = _instruction_set()
    if _library.missing["cuda"] is None and info["gpus"]:
        info["cuda_kernels"] = cuda_kernels()
    return info


def cuda_kernels() -> list[dict[str, Any]]:
    """Registers, shared memory and occupancy of the main kernels on the present GPU."""
    import fcos_ext._C_cuda as library
    import fcos_ext._host as host

    kernels: list[dict[str, Any]] = json.loads(host.cuda_kernels(library.__file__))
    return kernels


def environment_table() -> Table:
    """:func:`environment` for a person."""
    info = environment()
    build = info["build"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("fcos", f"{info['fcos']}, Python {info['python']}, {info['platform']}")
    for name, version in info["packages"].items():
        table.add_row(name, version or "not installed")
    cpu = info["cpu"]
    table.add_row("CPU", f"{cpu['cores']} cores, {cpu['threads']} threads")
    table.add_row("GPU", "\n".join(info["gpus"]) or _why_no_gpu())
    cpu_kernels = info["kernels"]["cpu"]
    if cpu_kernels == "available":
        cpu_kernels += f", using {cpu['instruction_set']}"
    table.add_row("CPU kernels", cpu_kernels)
    cuda = info["kernels"]["cuda"]
    if cuda == "available":
        built = build.get("cuda", {})
        cuda += f", built by nvcc {built.get('nvcc')} for {built.get('architectures')}"
        if not info["gpus"]:
            cuda += "; idle, as there is no GPU"
    table.add_row("CUDA kernels", cuda)
    for kernel in info.get("cuda_kernels", []):
        figures = ", ".join(f"{v} {k}" for k, v in kernel.items() if k != "kernel")
        table.add_row("", f"{kernel['kernel']}: {figures}")
    if build:
        table.add_row("built against", f"torch {build.get('torch')}")
    return table


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in properties
    ]


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is a build without CUDA"
    return "none: torch finds no NVIDIA driver or device"


def _instruction_set() -> str:
    try:
        import fcos_ext._host as host
    except ImportError as error:
        return f"unknown ({error})"
    return str(host.cpu_isa())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
