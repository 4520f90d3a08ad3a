"""Calls every operator on a device, in one of several ways; exit code 1 if any of them is wrong.

python -m benchmarks.gpu_check.ops float64   the checks against float64 references, on the device
python -m benchmarks.gpu_check.ops agree     the same results as the CPU kernels
python -m benchmarks.gpu_check.ops syncs     no waiting for the device where shapes are fixed
python -m benchmarks.gpu_check.ops graphs    captured once, replayed with other values
python -m benchmarks.gpu_check.ops run       small and bare, for compute-sanitizer
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .samples import (
    CHECKS,
    Call,
    has_fixed_shapes,
    missing_samples,
    moved,
    record_calls,
    run_call,
    same_shapes,
)

Failures = list[str]


def attempt(failures: Failures, what: str, function: Callable[[], object]) -> None:
    """One failing operator does not keep the others from being called."""
    try:
        function()
    except Exception as error:  # whatever it is, it belongs into the report
        traceback.print_exc()
        failures.append(f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[:3]}")


def call_on(device: str, call: Call) -> Any:
    return run_call(call, *moved((call.args, call.kwargs), device))


def assert_same(actual: Any, expected: Any, exact: bool = False) -> None:
    """Equal integers; floats to the rounding of their dtype, or equal as well."""
    for ours, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if not isinstance(ours, Tensor):
            continue
        rtol = atol = 0.0
        if ours.is_floating_point() and not exact:
            eps = torch.finfo(ours.dtype).eps
            rtol, atol = (
                (1e-10, 1e-12) if ours.dtype == torch.float64 else (max(2 * eps, 2e-5), 1e-6)
            )
        torch.testing.assert_close(
            ours.cpu(), theirs.cpu(), rtol=rtol, atol=atol, equal_nan=True, check_stride=False
        )


def float64(device: str, failures: Failures) -> int:
    torch.manual_seed(0)
    for name, check in CHECKS.items():

        def on_device(check: Callable[[], None] = check) -> None:
            with torch.device(device):
                check()

        attempt(failures, name, on_device)
    return len(CHECKS)


def agree(device: str, failures: Failures) -> int:
    calls = record_calls(0)
    for call in calls:

        def compared(call: Call = call) -> None:
            assert_same(call_on(device, call), call.results)

        attempt(failures, call.describe(), compared)
    return len(calls)


def run(device: str, failures: Failures) -> int:
    """Inputs and results are copied, and no kernel of PyTorch's own is started."""
    calls = record_calls(0)
    for call in calls:

        def copied(call: Call = call) -> None:
            moved(call_on(device, call), "cpu")

        attempt(failures, call.describe(), copied)
    return len(calls)


def syncs(device: str, failures: Failures) -> int:
    calls = [call for call in record_calls(0) if has_fixed_shapes(call)]
    for call in calls:
        args, kwargs = moved((call.args, call.kwargs), device)

        def watched(call: Call = call, args: Any = args, kwargs: Any = kwargs) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                call.op(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        attempt(failures, call.describe(), watched)
    return len(calls)


def graphs(device: str, failures: Failures) -> int:
    pairs = [
        (first, other)
        for first, other in zip(record_calls(0), record_calls(1), strict=False)
        if same_shapes(first, other) and has_fixed_shapes(first)
    ]
    for first, other in pairs:

        def replayed_with(first: Call = first, other: Call = other) -> None:
            _replay(device, first, other)

        attempt(failures, first.describe(), replayed_with)
    replayed = {first.name for first, _ in pairs}
    fixed = {call.name for call in record_calls(0) if has_fixed_shapes(call)}
    failures += [f"{name}: no two calls of equal shape to replay" for name in fixed - replayed]
    return len(pairs)


def _replay(device: str, first: Call, other: Call) -> None:
    """Capture with the arguments of one call, replay with those of another, twice."""
    static = moved((first.args, first.kwargs), device)
    expected = moved(call_on(device, other), "cpu")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_on(device, first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_call(first, *static)
    for _ in range(2):
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                tensor.fill_(90)  # what the first call or the last replay left
        values = moved((other.args, other.kwargs), device)
        for target, value in zip(tree_leaves(static), tree_leaves(values), strict=True):
            if isinstance(target, Tensor):
                target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected, exact=True)


WAYS = {"float64": float64, "agree": agree, "syncs": syncs, "graphs": graphs, "run": run}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.ops")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    failures: Failures = []
    if missing := missing_samples(record_calls(0)):
        failures.append(f"no sample in tests/abi/check_second_torch.py of: {', '.join(missing)}")
    count = WAYS[options.way](options.device, failures)
    for failure in failures:
        print("FAILED", failure)
    print(f"{count} calls, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
