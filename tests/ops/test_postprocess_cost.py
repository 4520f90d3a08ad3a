"""postprocess: what it calls, launches and holds in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cuda_timing import count_launches
from benchmarks.harness import Case, peak_extra_bytes
from fcos_ext import postprocess
from fcos_ext.postprocess import operator_arguments
from tests.ops.postprocess_inputs import LAYOUTS, NO_GPU, Call, make_call
from tests.simt.build import load_simt_library

ROOT = Path(__file__).resolve().parents[2]
#: Select, select again, best of each level, NMS, results.
LAUNCHES = 5


class Calls(TorchDispatchMode):
    """Takes down operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_operator(device: str, layout: str) -> None:
    """No copy before it, whatever the strides are, and nothing after it."""
    for options in ({}, {"anchors": True, "coding": "deltas", "with_centerness": False}):
        call = make_call(layout=layout, **options).to(device)  # type: ignore[arg-type]
        with Calls() as calls:
            call.of(postprocess)
        assert calls.names == ["fcos_ext::postprocess"]


@pytest.mark.parametrize("overlaps", ["exact", "torchvision"])
@pytest.mark.parametrize("mean", [-6.0, 2.0])
def test_launches_in_the_simulator(mean: float, overlaps: Any) -> None:
    """As many whatever is found."""
    simt = load_simt_library()
    arguments = make_call(images=3, mean=mean, overlaps=overlaps).of(operator_arguments)
    before = simt.launches
    torch.ops.fcos_ext_simt.postprocess(*arguments)
    assert simt.launches - before == LAUNCHES + (overlaps == "torchvision")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other image"])
def test_allocations_in_the_simulator(layout: str) -> None:
    """Candidates and results, but nothing of the size of the logits."""
    load_simt_library()
    call = make_call(classes=80, sizes=((64, 64),), mean=-7.0, topk_candidates=100, layout=layout)
    arguments = call.of(operator_arguments)

    def run() -> Any:
        return torch.ops.fcos_ext_simt.postprocess(*arguments)

    run()
    case = Case({}, torch.device("cpu"), lambda seed: (), {"": run}, run, 0, 0)
    results = sum(x.nbytes for x in run())
    logits = 2 * 80 * 64 * 64 * 4
    assert results <= peak_extra_bytes(case, "", ()) <= logits / 20


MEMORY_PROGRAM = """
import resource, torch
from fcos_ext import postprocess
from tests.ops.postprocess_inputs import make_call

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

make_call(sizes=((8, 8),)).of(postprocess)
for layout in ("contiguous", "channels_last", "every other image"):
    for mean in (-7.0, 3.0):
        call = make_call(classes=80, sizes=((200, 336),), mean=mean, layout=layout)
        before = peak()
        call.of(postprocess)
        print(peak() - before, call.predictions[0][0].numel() * 4)
"""


def test_memory_of_the_process() -> None:
    """With everything that the kernel itself allocates: few candidates or nothing but candidates,
    the most it takes is a small part of the logits."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for extra, logits in lines:
        assert extra <= logits / 10, lines


def large_call() -> Call:
    sizes = ((100, 168), (50, 84), (25, 42))
    return make_call(images=4, classes=80, sizes=sizes, mean=-6.0).to("cuda")


@NO_GPU
def test_launches_on_a_gpu() -> None:
    call = large_call()
    call.of(postprocess)
    launches = count_launches(lambda: call.of(postprocess), ())
    assert launches is None or launches <= LAUNCHES + 4  # and buffers that are cleared


@NO_GPU
def test_peak_memory_on_a_gpu() -> None:
    call = large_call()

    def run() -> Any:
        return call.of(postprocess)

    run()
    case = Case({}, torch.device("cuda"), lambda seed: (), {"": run}, run, 0, 0)
    logits = sum(x.nbytes for x in call.predictions[0])
    assert peak_extra_bytes(case, "", ()) <= logits / 5
