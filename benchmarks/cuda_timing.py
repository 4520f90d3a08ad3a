"""What a GPU does in a call, apart from the host that starts it.

The harness times calls as a program makes them, host included. Small kernels are then hidden
behind the launches. Replays of a CUDA graph show the kernels by themselves.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Calls in one graph: gaps between replays become small.
_CAPTURED_CALLS = 8
_ROUNDS = 15
#: No more calls are timed one by one after this time.
_EVENT_SECONDS = 0.5

Call = Callable[..., Any]
Inputs = tuple[Any, ...]


def measure(call: Call, rotation: Sequence[Inputs]) -> dict[str, Any]:
    """Figures for a row of results.

    - ``event_ms``: median between the events before and after one call
    - ``graph_ms``: of one call in a replayed graph, or ``no_graph``: why it cannot be captured
    - ``launches``: kernels, copies and fills of one call, where the profiler can count them
    - ``synchronizations``: how often one call makes the host wait for the device
    """
    figures: dict[str, Any] = {"event_ms": event_ms(call, rotation)}
    figures["launches"] = count_launches(call, rotation[0])
    figures["synchronizations"] = count_synchronizations(call, rotation[0])
    # First, as a failed capture can leave random number generators unusable.
    if reason := why_not_capturable(call, rotation[0]):
        figures["no_graph"] = reason
        return figures
    try:
        figures["graph_ms"] = graph_ms(call, rotation)
    except RuntimeError as error:
        figures["no_graph"] = _first_line(error)
    return figures


def event_ms(call: Call, rotation: Sequence[Inputs]) -> float:
    samples: list[float] = []
    deadline = time.perf_counter() + _EVENT_SECONDS
    for inputs in itertools.islice(itertools.cycle(rotation), 3 * _ROUNDS):
        if len(samples) >= 3 and time.perf_counter() > deadline:
            break
        start, end = _event(), _event()
        start.record()
        call(*inputs)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples[len(samples) // 3 :])  # the first ones warm up


def graph_ms(call: Call, rotation: Sequence[Inputs]) -> float:
    """Median over replays of a graph with several calls, each on inputs of its own."""
    calls = list(itertools.islice(itertools.cycle(rotation), max(_CAPTURED_CALLS, len(rotation))))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*rotation[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in calls:
            call(*inputs)
    samples = []
    for _ in range(2 + _ROUNDS):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return statistics.median(samples[2:])


def why_not_capturable(call: Call, inputs: Inputs) -> str | None:
    """What PyTorch says of a call that waits for the device; None if it does not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    except RuntimeError as error:
        return _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def count_launches(call: Call, inputs: Inputs) -> int | None:
    """None where the profiler does not work."""
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(*inputs)
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    kinds = (event.device_type for event in profile.events() or ())
    return sum(kind == torch.autograd.DeviceType.CUDA for kind in kinds) or None


def count_synchronizations(call: Call, inputs: Inputs) -> int:
    """PyTorch warns of each, the ones in extensions that do not ask it left out."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def copy_gb_per_s(device: torch.device) -> float:
    """What copies of 1 GiB reach, reads and writes together."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    copies = 4
    samples = []
    for _ in range(9):
        start, end = _event(), _event()
        start.record()
        for _ in range(copies):
            target.copy_(source)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / copies)
    return 2 * source.nbytes / statistics.median(samples) / 1e6


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
