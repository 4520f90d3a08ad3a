"""postprocess: what PyTorch asks of an operator, and that its results are always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fcos_ext import Postprocessed, _host, postprocess, postprocess_ref
from fcos_ext.postprocess import operator_arguments
from tests.ops.postprocess_inputs import LAYOUTS, NO_GPU, Call, assert_same, make_call

ROOT = Path(__file__).resolve().parents[2]
OP = torch.ops.fcos_ext.postprocess.default


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("original", [False, True])
def test_opcheck(device: str, original: bool, layout: str) -> None:
    call = make_call(original=original, layout=layout, max_detections=7).to(device)
    opcheck(OP, call.of(operator_arguments))


@pytest.mark.parametrize("function", [postprocess, postprocess_ref])
def test_compile_fullgraph(device: str, function: Any) -> None:
    def run(call: Call) -> Any:
        logits, ltrb, centerness = call.predictions
        doubled = ([x * 2 for x in logits], ltrb, centerness)
        return call._replace(predictions=doubled).of(function)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for sizes in (((6, 8), (3, 4)), ((8, 10), (4, 5))):
        call = make_call(sizes=sizes, max_detections=5).to(device)
        assert_same(Postprocessed(*compiled(call)), run(call))


def test_export(device: str) -> None:
    call = make_call(max_detections=5).to(device)

    class Module(torch.nn.Module):
        def forward(self, predictions: Any, image_sizes: Tensor, original: Tensor) -> Any:
            return tuple(
                postprocess(predictions, image_sizes, call.options, original_sizes=original)
            )

    arguments = call.predictions, call.image_sizes, call.original_sizes
    exported = torch.export.export(Module(), arguments).module()
    assert_same(Postprocessed(*exported(*arguments)), call.of(postprocess))


def test_not_differentiable(device: str) -> None:
    call = make_call().to(device)
    for levels in call.predictions:
        for x in levels:
            x.requires_grad_()
    for function in (postprocess, postprocess_ref):
        assert not any(x.requires_grad for x in call.of(function))


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    call = make_call(images=3, sizes=((40, 60), (20, 30)), ties=True, mean=0.0).to(device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(call.of(postprocess))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mean", [-5.0, 1.0])
@NO_GPU
def test_cuda_graph(mean: float) -> None:
    """Captured once and replayed with other inputs, and nothing waits for the device."""
    sizes = ((64, 96), (32, 48))
    call = make_call(sizes=sizes, mean=mean).to("cuda")
    call.of(postprocess)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.of(postprocess)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.of(postprocess)
    for seed in (1, 2):
        fresh = make_call(sizes=sizes, mean=mean, seed=seed, ties=True)
        for levels, others in zip(call.predictions, fresh.predictions, strict=True):
            for static, other in zip(levels, others, strict=True):
                static.copy_(other)
        graph.replay()
        assert_same(captured, call.of(postprocess_ref))


DIGEST_PROGRAM = """
import hashlib, sys
from fcos_ext import _host
from tests.ops.postprocess_inputs import make_call, run_on
assert _host.cpu_isa() == sys.argv[1], _host.cpu_isa()
digest = hashlib.sha256()
for threshold_on in ("class", "final"):
    for layout in ("contiguous", "channels_last"):
        call = make_call(sizes=((40, 60), (20, 31)), threshold_on=threshold_on, layout=layout)
        for result in run_on("cpu", call):
            digest.update(result.numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets() -> None:
    """All that this CPU has agree to the bit."""
    names = ["baseline", "avx2", "avx512"]
    running = []
    for isa in names[: names.index(_host.cpu_isa()) + 1]:
        command = [sys.executable, "-c", DIGEST_PROGRAM, isa]
        environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    digests = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    assert len(set(digests)) == 1
