"""What the tests of the operators on padded candidates share: inputs, and backends to run on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fcos_ext import _host
from tests.simt.build import load_simt_library

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
#: The compiled kernels, and the CUDA source in the simulator.
BACKENDS = ["cpu", "simt", pytest.param("cuda", marks=NO_GPU)]
SIMT_SEEDS = (0, 1, 12345)

Candidates = tuple[Tensor, Tensor, Tensor]


def kernel(op: str, backend: str, seed: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    """The operator ``op`` on a backend, for tensors on the CPU, with results on the CPU."""
    if backend == "simt":
        return simulated(op, seed)

    def run(*args: Any) -> tuple[Tensor, ...]:
        args = tuple(x.to(backend) if isinstance(x, Tensor) else x for x in args)
        return tuple(x.cpu() for x in getattr(torch.ops.fcos_ext, op)(*args))

    return run


def simulated(op: str, seed: int) -> Callable[..., tuple[Tensor, ...]]:
    library = load_simt_library()
    library.set_seed(seed)

    def run(*args: Any) -> tuple[Tensor, ...]:
        before = library.launches
        with library.guarded_memory():
            results: tuple[Tensor, ...] = getattr(torch.ops.fcos_ext_simt, op)(*args)
        assert library.launches - before == (len(args[0]) > 0)
        return results

    return run


def make_candidates(
    n: int, k: int, classes: int = 3, seed: int = 0, ties: bool = False, spread: float = 150.0
) -> Candidates:
    """Boxes [n, k, 4] of sides 10 to 60, scores, and int64 labels from -1, some absent by score."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, k, 2, generator=generator) * spread
    sides = torch.rand(n, k, 2, generator=generator) * 50 + 10
    boxes = torch.cat((corner, corner + sides), dim=-1)
    scores = torch.randn(n, k, generator=generator)
    if ties:
        scores = scores.mul(3).round()
        boxes[:, k // 2 :] = boxes[:, : k - k // 2].clone()
    scores[torch.rand(n, k, generator=generator) < 0.05] = torch.nan
    scores[torch.rand(n, k, generator=generator) < 0.05] = -torch.inf
    return boxes, scores, torch.randint(-1, classes, (n, k), generator=generator)


def fuzzed_candidates(rng: np.random.Generator, n: int) -> Candidates:
    """Coarse numbers: ties, equal, nested, empty and odd boxes, and absent candidates between."""
    k = int(rng.choice([1, 2, 3, 8, 16, 30, 70], p=[0.1, 0.1, 0.2, 0.25, 0.25, 0.09, 0.01]))
    size = rng.choice([3, 5, 10])
    boxes = rng.integers(0, size + 1, (n, k, 4)).astype(np.float32)
    if rng.random() < 0.7:  # else most are inside out
        a, b = boxes[..., :2], boxes[..., 2:]
        boxes = np.concatenate([np.minimum(a, b), np.maximum(a, b)], axis=-1)
    if rng.random() < 0.3:
        boxes *= np.float32(rng.random() + 0.1)
    if rng.random() < 0.3:
        boxes += rng.normal(0, 0.1, boxes.shape).astype(np.float32)
    if rng.random() < 0.3:
        odd = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], boxes.shape).astype(np.float32)
        boxes = np.where(rng.random(boxes.shape) < 0.05, odd, boxes)
    scores = rng.choice([0.1, 0.2, 0.3, 0.9, -np.inf, np.inf, np.nan, -1.0, 0.0, -0.0], (n, k))
    if rng.random() < 0.5:
        scores = rng.normal(0, 1, (n, k)).round(rng.integers(0, 4))
    few = [-3, 0, 1] if rng.random() < 0.7 else [-1, 5, 133, 2**31 + 5, 2**40]
    labels = rng.choice(few, (n, k), p=[0.2, *[0.8 / (len(few) - 1)] * (len(few) - 1)])
    dtype = torch.float64 if rng.random() < 0.3 else torch.float32
    return torch.from_numpy(boxes), torch.from_numpy(scores).to(dtype), torch.from_numpy(labels)


DIGEST_PROGRAM = """
import hashlib, sys, torch
from fcos_ext import _host
from tests.ops.candidates import make_candidates
assert _host.cpu_isa() == sys.argv[1], _host.cpu_isa()
digest = hashlib.sha256()
for k, classes in ((5, 2), (300, 3), (3000, 80)):
    for dtype in (torch.float32, torch.float64):
        boxes, scores, labels = make_candidates(3, k, classes, ties=True)
        for result in run(boxes, scores.to(dtype), labels):
            digest.update(result.numpy().tobytes())
print(digest.hexdigest())
"""


def digests_by_instruction_set(run: str) -> list[str]:
    """Of the results of ``run``, a Python function of candidates, in a process for each set."""
    names = ["baseline", "avx2", "avx512"]
    running = []
    for isa in names[: names.index(_host.cpu_isa()) + 1]:
        command = [sys.executable, "-c", f"import torch\nrun = {run}\n{DIGEST_PROGRAM}", isa]
        environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    digests = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return digests
