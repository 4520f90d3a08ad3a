"""Compiles CUDA sources as the build does, for one architecture each, and keeps the outcome.

Objects, the compiler's report and the disassembly lie in ``.cache/cuda_gates``, named after a hash
of all that goes into them, so that a repeated run compiles only what has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "cuda_gates"
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
#: Two generations of data-centre GPUs: what every run of the tests compiles for.
TESTED = ("80", "90")
#: From the oldest that CUDA 13 supports to the newest.
ALL = ("75", "80", "86", "89", "90", "100", "120")
#: nvcc takes some hundred MB and a core.
JOBS = 2


class MissingTool(Exception):
    """A program of the CUDA toolkit is not on this machine."""


class CompileError(Exception):
    """The compiler's messages."""


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture."""

    source: Path
    architecture: str
    report: str
    """What ``-Xptxas -v`` printed."""
    disassembly: str
    """Of ``cuobjdump -sass``, without encodings."""


@functools.cache
def setup_py() -> ModuleType:
    """The build script, which knows the flags and where the toolkit is."""
    spec = importlib.util.spec_from_file_location("setup_of_the_gates", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def find_nvcc() -> Path:
    home = setup_py().find_cuda_home()
    if home is None:
        raise MissingTool("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip packages)")
    return Path(home) / "bin" / "nvcc"


@functools.cache
def find_cuobjdump() -> Path:
    """That of the toolkit, or the one in the triton package, which torch brings on Linux."""
    folders = [find_nvcc().parent]
    if on_path := shutil.which("cuobjdump"):
        folders.append(Path(on_path).parent)
    spec = importlib.util.find_spec("triton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(location) / "backends" / "nvidia" / "bin")
    for folder in folders:
        # cuobjdump runs the nvdisasm beside it.
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder / "cuobjdump"
    raise MissingTool(
        "cuobjdump and nvdisasm were found neither in the CUDA toolkit nor in the triton package "
        "(pip install triton)"
    )


@functools.cache
def _tool_versions() -> str:
    tools = (find_nvcc(), find_cuobjdump())
    return torch.__version__ + "".join(_run([str(tool), "--version"]) for tool in tools)


def nvcc_command(source: Path, architecture: str) -> list[str]:
    """The build's own flags, the oldest standard that torch builds with, and a report."""
    return [
        *(str(find_nvcc()), "-cubin", str(source)),
        *(flag for flag in setup_py().NVCC_FLAGS if not flag.startswith("--threads")),
        *COMMON_NVCC_FLAGS,
        "-std=c++17",
        *("-Xptxas", "-v"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        *(f"-I{path}" for path in include_paths()),
        f"-I{sysconfig.get_path('include')}",
    ]


def compile_all(sources: Iterable[Path], architectures: Sequence[str]) -> list[Compiled]:
    """Every source for every architecture, at most ``JOBS`` at a time.

    Raises:
        CompileError: the compiler's messages.
        MissingTool: there is no compiler or no disassembler.
    """
    work = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda pair: compile_one(*pair), work))


def compile_one(source: Path, architecture: str) -> Compiled:
    command = nvcc_command(source, architecture)
    digest = hashlib.sha256("\n".join([*command, _tool_versions()]).encode())
    for file in _with_headers(source):
        digest.update(file.read_bytes())
    stem = CACHE / f"{source.stem}-sm_{architecture}-{digest.hexdigest()[:16]}"
    report, disassembly = stem.with_suffix(".txt"), stem.with_suffix(".sass")
    if not disassembly.exists():  # written last
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            cubin = f"{folder}/out.cubin"
            printed = _run([*command, "-o", cubin])
            listing = _run([str(find_cuobjdump()), "-sass", cubin])
        _write(report, printed)
        _write(disassembly, "\n".join(_instructions_only(listing)))
    return Compiled(source, architecture, report.read_text(), disassembly.read_text())


def _with_headers(source: Path) -> list[Path]:
    """The file and, recursively, those that it includes by ``#include "..."``."""
    found: list[Path] = []
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found or not path.is_file():
            continue
        found.append(path)
        names = re.findall(r'^\s*#\s*include\s*"(.+?)"', path.read_text(), re.MULTILINE)
        pending += [(path.parent / name).resolve() for name in names]
    return found


def _instructions_only(listing: str) -> Iterable[str]:
    for line in listing.splitlines():
        if found := re.match(r"\s*(Function : \S+|/\*[0-9a-f]+\*/\s+\S.*?;)", line):
            yield found[1]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-8000:]}")
    return done.stdout + done.stderr


def _write(path: Path, text: str) -> None:
    """At once: other processes may be reading."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
