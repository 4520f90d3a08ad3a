"""Everything that needs a GPU, in one command and under 9 minutes, on a machine of any kind.

    python -m benchmarks.gpu_check [--stages build,tests,...] [--minutes 9] [--output FILE]

- build: the kernels, in place, for the present GPU
- float64, agree: every operator against its reference in float64, and against the CPU kernels
- syncs, graphs: no waiting for the device where shapes are fixed; capture and replay
- tests: tests/ops on the GPU
- memcheck, racecheck, synccheck, initcheck: compute-sanitizer on every operator
- bench_*: times against eager PyTorch, torch.compile and torchvision, and against limits.json

Each stage runs in a process of its own and within a time of its own; one that fails hides none.
Results are in benchmarks/results/gpu_check-<device>.json after every stage, whole outputs in
build/gpu_check. Needs torch, torchvision, numpy, pytest, nvcc and ninja.

Exit code: 0 if all stages passed, 1 if one did not, 2 if there is no GPU or an argument is wrong. A
goal that is missed is shown and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..machine import stamp
from .limits import judge, load_limits, table
from .plan import ROOT, make_stages
from .stages import PASSED, Outcome, Stage, run_stages

LOGS = ROOT / "build" / "gpu_check"


def no_gpu() -> str | None:
    """Why nothing can be checked here; None if there is a GPU."""
    if torch.version.cuda is None:
        return f"no GPU: torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) finds none"
    return None


def select(stages: Sequence[Stage], names: str | None) -> list[Stage]:
    """Those named, in the order of the check.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return list(stages)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in stages]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown stages {', '.join(unknown)}; there are {', '.join(known)}")
    return [stage for stage in stages if stage.name in wanted]


def report(outcomes: Sequence[Outcome], where: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the file of results holds."""
    stages = [outcome.as_json() for outcome in outcomes]
    rows = [row for stage in stages for row in stage["data"].pop("rows", [])]
    return {
        **where,
        "build": build_info(),
        "passed": bool(outcomes) and all(outcome.status == PASSED for outcome in outcomes),
        "seconds": round(seconds, 1),
        "stages": stages,
        "limits": judge(rows, load_limits(), str(where.get("device", ""))) if rows else [],
        "rows": rows,
    }


def build_info() -> dict[str, Any] | None:
    """What the kernels were built for, by now."""
    from fcos_ext import _library

    return _library.build_info().get("cuda")


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for a reader, the verdict last."""
    lines = [", ".join(f"{key} {result.get(key)}" for key in ("device", "torch", "cuda", "commit"))]
    for stage in result["stages"]:
        times = f"{stage['seconds']:6.1f} of {stage['budget_s']:.0f} s"
        lines.append(f"  {stage['name']:<28} {stage['status']:<10} {times:>15}  {stage['detail']}")
    if result["limits"]:
        lines += ["", *table(result["limits"])]
    bad = [stage["name"] for stage in result["stages"] if stage["status"] != PASSED]
    verdict = f"not passed: {', '.join(bad)}" if bad else "all stages passed"
    return [*lines, "", f"{verdict}, {result['seconds']:.0f} s"]


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def check(stages: Sequence[Stage], where: dict[str, Any], output: Path, minutes: float) -> int:
    """Run stages, write what they find, print it. Returns the exit code."""
    start = time.monotonic()
    done: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        done.append(outcome)
        line = f"{outcome.name}: {outcome.status}, {outcome.seconds:.1f} s  {outcome.detail}"
        print(line, flush=True)
        write(output, report(done, where, time.monotonic() - start))

    jobs = max(1, min(5, (os.cpu_count() or 1) // 3))
    outcomes = run_stages(stages, seconds=60 * minutes, logs=LOGS, jobs=jobs, finished=finished)
    result = report(outcomes, where, time.monotonic() - start)
    write(output, result)
    for outcome in outcomes:
        if outcome.tail:
            print(f"\n---- {outcome.name}: {outcome.status} ----\n{outcome.tail[-1500:]}")
    print("", *summary(result), f"results in {output}", sep="\n")
    return 0 if result["passed"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", help="names, separated by commas; all unless given")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all together")
    parser.add_argument("--output", type=Path, help="benchmarks/results/gpu_check-<device>.json")
    options = parser.parse_args(arguments)
    if reason := no_gpu():
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        stages = select(make_stages(torch.cuda.get_device_capability(device), LOGS), options.stages)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    where = stamp(device)
    slug = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    output = options.output or ROOT / "benchmarks" / "results" / f"gpu_check-{slug}.json"
    return check(stages, where, output, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
