"""Runs benchmark cases: verifies, then times, and writes rows that say where they come from.

- A provider whose result is not the reference's, in float64, gets no time.
- Providers take turns, in a new order each round, so that a change of clock or a busy neighbour
  meets all of them. Ratios are taken within a round.
- Inputs rotate through more memory than the caches have.
- On a GPU there are also times of the GPU alone, see ``cuda_timing``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda_timing
from .machine import copy_gb_per_s, stamp, wait

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "fcos_ext"
#: Inputs rotate through this much memory, or ``MAX_ROTATION`` sets of them.
ROTATED_BYTES, MAX_ROTATION = 128 << 20, 8

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One line-up. Nothing is computed before it runs."""

    settings: dict[str, Any]
    """What tells it from the others: "mode", "shape", "dtype", "threads", ..."""
    device: torch.device
    make_inputs: Callable[[int], tuple[Any, ...]]
    """Arguments for the providers from a seed; always of the same size."""
    providers: dict[str, Callable[..., Results]]
    """What is compared, ours under the name ``OURS``."""
    reference: Callable[..., Results]
    """The truth, in float64, from the same arguments."""
    tolerance: float
    """Highest relative error, in the L2 norm, of each result."""
    bytes_moved: int = 0
    """What must at least be read and written; 0: not told."""
    logits: int = 0
    """Class scores that go in, to give memory as bytes for each of them; 0: not told."""
    environment: str = ""
    """Variables that the case needs, to be set before its command."""
    own_reference: Mapping[str, Callable[..., Results]] = field(default_factory=dict)
    """The truth of providers that compute something else, such as another detector."""

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    sample_seconds: float
    """A provider is called for about this long each time it has its turn."""
    limit_seconds: float = 40.0
    """After so long a case has no further round, unless it had fewer than five."""


FULL = Effort(rounds=15, sample_seconds=0.1)
#: A GPU repeats itself better than a CPU that others use too.
FULL_CUDA = Effort(rounds=15, sample_seconds=0.02)
QUICK = Effort(rounds=3, sample_seconds=0.005)


def relative_errors(actual: Results, truth: Results) -> list[float]:
    """|actual - truth| / |truth| of each result, in float64; infinite if not finite.

    0 where both are 0 throughout.
    """
    errors = []
    for ours, exact in zip(actual, truth, strict=True):
        if ours.shape != exact.shape or not ours.isfinite().all():
            errors.append(float("inf"))
            continue
        difference = torch.linalg.vector_norm(ours.detach().double() - exact).item()
        size = torch.linalg.vector_norm(exact).item()
        errors.append(difference / size if size > 0 else float("inf") if difference else 0.0)
    return errors


def run_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    """A row for each provider; one with ``"refused"`` and no time where the result is wrong."""
    threads_before = torch.get_num_threads()
    if case.device.type == "cpu":
        torch.set_num_threads(case.settings["threads"])
    torch._dynamo.reset()  # what was compiled for another number of threads
    try:
        inputs = _rotation(case)
        rows = {name: verify(case, name, inputs[0]) for name in case.providers}
        timed = [name for name, row in rows.items() if "refused" not in row]
        for name in timed:
            rows[name]["peak_extra_bytes"] = peak_extra_bytes(case, name, inputs[0])
        samples = _sample(case, timed, itertools.cycle(inputs), effort)
        if case.device.type == "cuda":
            for name in timed:
                rows[name] |= cuda_timing.measure(case.providers[name], inputs)
    finally:
        torch.set_num_threads(threads_before)
    for name in timed:
        rows[name] |= _summary(samples[name], samples.get(OURS))
        if case.bytes_moved:
            rows[name]["gb_per_s"] = case.bytes_moved / device_ms(rows[name]) / 1e6
        if case.logits:
            rows[name]["peak_bytes_per_logit"] = rows[name]["peak_extra_bytes"] / case.logits
    return list(rows.values())


def device_ms(row: dict[str, Any]) -> float:
    """Of one call: that of the GPU by itself where it could be told from the host's."""
    time_ms: float = row.get("graph_ms", row["median_ms"])
    return time_ms


def _rotation(case: Case) -> list[tuple[Any, ...]]:
    first = case.make_inputs(0)
    size = sum(x.nbytes for x in first if isinstance(x, Tensor))
    rotated = ROTATED_BYTES
    if case.device.type == "cuda":
        rotated = max(rotated, 3 * torch.cuda.get_device_properties(case.device).L2_cache_size)
    count = min(MAX_ROTATION, max(1, -(-rotated // max(size, 1))))
    return [first, *(case.make_inputs(seed) for seed in range(1, count))]


def verify(case: Case, name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """A row with the errors of a provider, and, if they are too large, ``"refused"``."""
    start = time.perf_counter()
    results = case.providers[name](*inputs)
    wait(case.device)
    row = case.settings | {"provider": name, "first_call_ms": (time.perf_counter() - start) * 1e3}
    reference = case.own_reference.get(name, case.reference)
    row["errors"] = relative_errors(results, reference(*inputs))
    if not all(error <= case.tolerance for error in row["errors"]):
        worst = max(row["errors"])
        row["refused"] = f"wrong result: relative error {worst:.1e}, limit {case.tolerance:.0e}"
    return row


def _sample(
    case: Case, names: Sequence[str], inputs: Iterator[tuple[Any, ...]], effort: Effort
) -> dict[str, list[float]]:
    """Seconds of one call in each round, by provider."""
    calls = {}
    for name in names:
        _seconds(case, name, inputs, 2)
        once = _seconds(case, name, inputs, 1)
        calls[name] = max(1, round(effort.sample_seconds / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(effort.rounds):
            if done >= 5 and time.perf_counter() - start > effort.limit_seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(_seconds(case, name, inputs, calls[name]))
    finally:
        gc.enable()
    return samples


def _seconds(case: Case, name: str, inputs: Iterator[tuple[Any, ...]], calls: int) -> float:
    provider = case.providers[name]
    wait(case.device)
    start = time.perf_counter()
    for _ in range(calls):
        provider(*next(inputs))
    wait(case.device)
    return (time.perf_counter() - start) / calls


def _summary(seconds: list[float], ours: list[float] | None) -> dict[str, float]:
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    row = {
        "median_ms": statistics.median(seconds) * 1e3,
        "low_ms": low * 1e3,
        "high_ms": high * 1e3,
        "rounds": len(seconds),
    }
    if ours is not None:
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        row["ratio_to_ours"] = statistics.median(ratios)
    return row


def peak_extra_bytes(case: Case, name: str, inputs: tuple[Any, ...]) -> int:
    """Most memory that a call holds at a time beyond its inputs, results included."""
    provider = case.providers[name]
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        results = provider(*inputs)
        wait(case.device)
        del results
        return torch.cuda.max_memory_allocated(case.device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = provider(*inputs)
        del results
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def command(op: str, case: Case) -> str:
    """What measures the case again."""
    parts = ["python -m benchmarks", op, "--only", shlex.quote(case.name)]
    if case.device.type != "cpu":
        parts += ["--device", case.device.type]
    elif isa := os.environ.get("FCOS_CPU_ISA"):
        parts.insert(0, f"FCOS_CPU_ISA={isa}")
    return " ".join([*filter(None, [case.environment]), *parts])


def select(cases: Sequence[Case], name: str) -> list[Case]:
    """The case of that name, or those whose names contain it."""
    return [case for case in cases if case.name == name] or [c for c in cases if name in c.name]


def print_rows(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{case.name}\n  $ {rows[0]['command']}")
    for row in rows:
        if refused := row.get("refused"):
            print(f"  {row['provider']:<28} {refused}")
            continue
        spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        line = f"  {row['provider']:<28} {row['median_ms']:9.3f} ms  ({spread})"
        if "ratio_to_ours" in row:
            line += f"  {row['ratio_to_ours']:6.2f} x ours"
        if "event_ms" in row:
            graph = f"{row['graph_ms'] * 1e3:.1f} us" if "graph_ms" in row else "not capturable"
            line += f"  graph {graph} ({row.get('percent_of_copy', 0):.0f} % of copy)"
        line += f"  {row['peak_extra_bytes'] / 2**20:8.1f} MiB  error {max(row['errors']):.0e}"
        print(line, flush=True)


def main(
    op: str,
    make_cases: Callable[[torch.device, bool], Sequence[Case]],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a benchmark. Returns 1 if a result was wrong, else 0.

    Args:
        op: name of what is measured, and of the file of results.
        make_cases: from the device, and whether the run is to be quick.
        arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{op}")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--only", metavar="TEXT", help="the case of that name, or all that have it")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file of rows; without --quick and --only benchmarks/results/...",
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    output: Path | None = options.output
    if output is None and not options.quick and options.only is None:
        output = RESULTS / f"{op}-{device.type}.json"

    where = stamp(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    effort = QUICK if options.quick else FULL if device.type == "cpu" else FULL_CUDA
    cases = make_cases(device, options.quick)
    if options.only is not None:
        cases = select(cases, options.only)
        if not cases:
            parser.error(f"--only {options.only!r}: no case of {op} has it in its name")
    ceilings = {
        threads: copy_gb_per_s(device, threads)
        for threads in {case.settings.get("threads") for case in cases}
    }
    rows = []
    for case in cases:
        case_rows = run_case(case, effort)
        ceiling = ceilings[case.settings.get("threads")]
        for row in case_rows:
            row["command"] = command(op, case)
            if "gb_per_s" in row:
                row["percent_of_copy"] = 100 * row["gb_per_s"] / ceiling
        print_rows(case, case_rows)
        rows += [{"op": op} | row | {"copy_gb_per_s": ceiling} | where for row in case_rows]
        if output is not None:  # after each case: a run that is stopped leaves what it had
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(rows, indent=1) + "\n")
    if output is not None:
        print(f"\n{len(rows)} rows in {output}")
    return int(any("refused" in row for row in rows))
