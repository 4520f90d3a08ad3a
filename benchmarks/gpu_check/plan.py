"""Which stages the check has on this machine. Tests and benchmarks are found, not listed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .stages import Stage

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPS = "benchmarks.gpu_check.ops"
#: Several at a time share the cores and the GPU; nothing is timed meanwhile.
CHECKS = "checks"


def make_stages(capability: tuple[int, int], logs: Path) -> list[Stage]:
    """Build, then all that checks results, then all that takes times.

    Args:
        capability: of the present GPU: the kernels are built for it alone.
        logs: folder that stages leave files in.
    """
    python = [sys.executable, "-u"]
    common = {"PYTHONPATH": str(ROOT), "FCOS_TEST_DEVICE": "cuda"}
    major, minor = capability
    build = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    stages = [
        Stage(
            name="build",
            command=[*python, str(ROOT / "setup.py"), "-q", "build_ext", "--inplace"],
            budget_s=180,
            environment=common | build,
        )
    ]
    for way in ("float64", "agree", "syncs", "graphs"):
        stages.append(
            Stage(
                name=way,
                command=[*python, "-m", OPS, way],
                budget_s=120,
                environment=common,
                group=CHECKS,
            )
        )
    stages.append(_tests(python, common, logs))
    stages += [_sanitizer(tool, python, common, logs) for tool in SANITIZERS]
    for bench in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        stages.append(_bench(bench.stem, python, common, logs))
    return stages


def _tests(python: list[str], environment: dict[str, str], logs: Path) -> Stage:
    report = logs / "tests.xml"
    command = [*python, "-m", "pytest", str(ROOT / "tests" / "ops"), "-q", "--rootdir", str(ROOT)]
    # Not those that say they are of the CPU or of the simulator: all others.
    command += ["-k", "not cpu and not simt", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return Stage(
        name="tests",
        command=command,
        budget_s=200,
        environment=environment,
        read=lambda: read_tests(report),
        group=CHECKS,
    )


def read_tests(report: Path) -> dict[str, Any]:
    """Counts, the names of those that failed, and a failure if nothing ran on the GPU."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcome = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        kinds = {child.tag for child in case}
        kind = next((k for k, tags in outcome.items() if kinds & set(tags)), "passed")
        names[kind].append(f"{case.get('classname')}::{case.get('name')}")
    on_gpu = sum("cuda" in name for name in names["passed"] + names["failed"])
    result: dict[str, Any] = {kind: len(found) for kind, found in names.items()}
    result |= {"on_gpu": on_gpu, "failures": names["failed"]}
    result["summary"] = ", ".join(f"{len(found)} {kind}" for kind, found in names.items())
    result["summary"] += f", {on_gpu} of them on the GPU"
    if on_gpu == 0:
        result["failure"] = "no test ran on the GPU"
    return result


def _sanitizer(tool: str, python: list[str], environment: dict[str, str], logs: Path) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    command = [str(program), "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        # PyTorch tries calls that may fail. Those that matter raise, and fail the stage.
        command += ["--report-api-errors", "no"]
    return Stage(
        name=tool,
        command=[*command, *python, "-m", OPS, "run"],
        budget_s=200,
        # Each tensor has memory of its own, so that an access behind it is seen.
        environment=environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing=None if program else "compute-sanitizer was not found",
        read=lambda: read_sanitizer(logs / f"{tool}.log"),
        group=CHECKS,
    )


def read_sanitizer(log: Path) -> dict[str, Any]:
    """What was found. A failure if that is not nothing, or if the tool did not get to its end: it
    may leave with 0 where it cannot work, and after warnings of hazards."""
    text = log.read_text(errors="replace")
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)", text)
    calls = re.findall(r"^\d+ calls, \d+ failures$", text, re.MULTILINE)
    if not summaries or not calls:
        return {"failure": "the tool did not get to its end"}
    result: dict[str, Any] = {"summary": f"{summaries[-1][0]}; {calls[-1]}"}
    if any(int(count) > 0 for _, count in summaries):
        result["failure"] = "something was found"
    return result


def _bench(name: str, python: list[str], environment: dict[str, str], logs: Path) -> Stage:
    rows = logs / f"{name}.json"
    return Stage(
        name=name,
        command=[*python, "-m", f"benchmarks.{name}", "--device", "cuda", "--output", str(rows)],
        budget_s=120,
        environment=environment,
        read=lambda: read_rows(rows),
    )


def read_rows(path: Path) -> dict[str, Any]:
    """Rows of a benchmark, and a failure if a result was wrong."""
    rows = json.loads(path.read_text())
    refused = [row for row in rows if "refused" in row]
    result = {"rows": rows, "summary": f"{len(rows)} rows"}
    if refused:
        result["failure"] = f"wrong results: {sorted({row['provider'] for row in refused})}"
    return result
