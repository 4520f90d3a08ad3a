"""What a benchmark runs on: rows of results say so, and measure themselves against its memory."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from . import cuda_timing

_COPIED_BYTES = 128 << 20


def wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_gb_per_s(device: torch.device, threads: int | None) -> float:
    """What a copy of a large tensor reaches, reads and writes together: the ceiling."""
    if device.type == "cuda":
        return cuda_timing.copy_gb_per_s(device)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    source = torch.zeros(_COPIED_BYTES // 4, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(9):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def stamp(device: torch.device) -> dict[str, Any]:
    """Where and when rows were measured, and with what."""
    from fcos_ext import _library

    values: dict[str, Any] = {
        "device": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),  # of other work on the machine
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cpu":
        if _library.missing["cpu"] is None:
            from fcos_ext import _host

            values["instruction_set"] = _host.cpu_isa()
    else:
        values["cuda"] = torch.version.cuda
        values["build"] = _library.build_info().get("cuda")
        values |= _nvidia_smi(device)
    return values


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, and clocks as they are: nobody sets them here. Empty where the program is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu")
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, f"--id=GPU-{uuid}"], capture_output=True, text=True)
    except OSError:
        return {}
    figures = [figure.strip() for figure in done.stdout.strip().split(",")]
    return dict(zip(fields, figures, strict=True)) if len(figures) == len(fields) else {}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """Short hash, with a + if sources differ from it; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/csrc")
    except OSError:
        return ""
    return commit + "+" * bool(changed)


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()
