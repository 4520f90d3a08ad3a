"""benchmarks.gpu_check, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import ops, plan
from benchmarks.gpu_check.stages import (
    FAILED,
    NOT_RUN,
    PASSED,
    TIMED_OUT,
    Outcome,
    Stage,
    run_stages,
)

WHERE = {"device": "NVIDIA H200", "torch": "2.11", "cuda": "13.0", "commit": "abc", "date": "now"}


def python_stage(name: str, program: str, **options: Any) -> Stage:
    options = {"budget_s": 20.0} | options
    return Stage(name=name, command=[sys.executable, "-c", program], **options)


def run(tmp_path: Path, *stages: Stage, seconds: float = 60, jobs: int = 4) -> dict[str, Outcome]:
    seen: list[Outcome] = []
    outcomes = run_stages(stages, seconds=seconds, logs=tmp_path, jobs=jobs, finished=seen.append)
    assert [outcome.name for outcome in outcomes] == [stage.name for stage in stages]
    assert sorted(o.name for o in seen) == sorted(o.name for o in outcomes)
    return {outcome.name: outcome for outcome in outcomes}


# ---- stages -------------------------------------------------------------------------------------


def test_a_failing_stage_hides_none(tmp_path: Path) -> None:
    outcomes = run(
        tmp_path,
        python_stage("raises", "print('before'); raise ValueError('planted')"),
        python_stage("crashes", "import os; os.abort()"),
        python_stage("lacks", "pass", missing="tool was not found"),
        Stage("absent", ["/no/such/program"], 20),
        python_stage("works", "print('fine')"),
    )
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("raises", "crashes", "lacks", "absent"), FAILED),
        "works": PASSED,
    }
    assert outcomes["raises"].detail == "exit code 1"
    assert "before" in outcomes["raises"].tail and "planted" in outcomes["raises"].tail
    assert outcomes["crashes"].detail == "killed by SIGABRT"
    assert outcomes["lacks"].detail == "tool was not found"
    assert "/no/such/program" in outcomes["absent"].detail
    assert outcomes["works"].tail == "" and (tmp_path / "works.log").read_text() == "fine\n"


def test_a_hanging_stage_is_ended_with_its_children(tmp_path: Path) -> None:
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("started", flush=True)
child.wait()
"""
    start = time.monotonic()
    outcomes = run(
        tmp_path, python_stage("hangs", program, budget_s=3.0), python_stage("next", "pass")
    )
    assert time.monotonic() - start < 20
    assert outcomes["hangs"].status == TIMED_OUT
    assert outcomes["hangs"].detail == "stopped after 3 s"
    assert "started" in outcomes["hangs"].tail
    assert outcomes["next"].status == PASSED
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # waits for init to collect it


def test_all_together_have_a_time(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(30)"
    outcomes = run(tmp_path, python_stage("first", sleep), python_stage("second", sleep), seconds=3)
    assert outcomes["first"].status == TIMED_OUT
    assert outcomes["second"].status == NOT_RUN
    assert outcomes["second"].detail == "no time was left for it"


def test_a_group_runs_at_the_same_time(tmp_path: Path) -> None:
    # Each waits for the other.
    program = """
import pathlib, sys, time
pathlib.Path({mine!r}).touch()
end = time.monotonic() + 15
while not pathlib.Path({other!r}).exists():
    if time.monotonic() > end: sys.exit(1)
    time.sleep(0.05)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes = run(
        tmp_path,
        python_stage("one", program.format(mine=a, other=b), group="g"),
        python_stage("two", program.format(mine=b, other=a), group="g"),
        python_stage("three", "pass"),
    )
    assert all(outcome.status == PASSED for outcome in outcomes.values())


def test_results_of_a_stage(tmp_path: Path) -> None:
    def unreadable() -> dict[str, Any]:
        raise ValueError("not JSON")

    outcomes = run(
        tmp_path,
        python_stage("good", "pass", read=lambda: {"rows": [1], "summary": "1 row"}),
        python_stage("bad", "pass", read=lambda: {"failure": "wrong", "summary": "1 row"}),
        python_stage("unreadable", "pass", read=unreadable),
        python_stage("failed", "raise SystemExit(3)", read=lambda: {"summary": "2 failed"}),
    )
    good, bad, broken, failed = outcomes.values()
    assert (good.status, good.detail, good.data) == (PASSED, "1 row", {"rows": [1]})
    assert (bad.status, bad.detail) == (FAILED, "wrong; 1 row")
    assert (broken.status, broken.detail) == (FAILED, "its results cannot be read: not JSON")
    assert (failed.status, failed.detail) == (FAILED, "exit code 3; 2 failed")


# ---- the command --------------------------------------------------------------------------------


def test_results_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "check.json"
    row: dict[str, Any] = {"op": "sigmoid_focal_loss", "mode": "forward", "form": "levels"}
    row |= {
        "dtype": "bfloat16",
        "provider": "fcos_ext",
        "median_ms": 0.04,
        "graph_ms": 0.025,
        "percent_of_copy": 53.2,
    }
    read = lambda: {"rows": [row], "summary": "1 rows"}  # noqa: E731
    good = [python_stage("build", "pass"), python_stage("bench_a", "pass", read=read)]
    assert gpu_check.check(good, dict(WHERE), output, minutes=1) == 0
    result = json.loads(output.read_text())
    assert {"device", "torch", "cuda", "commit", "date", "build"} <= result.keys()
    assert result["passed"] and result["rows"] == [row]
    assert [stage["status"] for stage in result["stages"]] == [PASSED, PASSED]
    judged = {entry["kernel"]: entry for entry in result["limits"]}
    assert judged["focal loss, forward, bf16"]["us"] == pytest.approx(25)
    printed = capsys.readouterr().out
    assert "focal loss, forward, bf16" in printed and "meets the goal" in printed
    assert "all stages passed" in printed

    stages = [*good, python_stage("tests", "raise SystemExit('planted')")]
    assert gpu_check.check(stages, dict(WHERE), output, minutes=1) == 1
    assert not json.loads(output.read_text())["passed"]
    printed = capsys.readouterr().out
    assert "planted" in printed and "not passed: tests" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    environment = os.environ | {"PYTHONPATH": str(plan.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=plan.ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("no GPU: torch ")


def test_plan(tmp_path: Path) -> None:
    stages = plan.make_stages((9, 0), tmp_path)
    names = [stage.name for stage in stages]
    assert names[0] == "build" and stages[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    benches = {path.stem for path in (plan.ROOT / "benchmarks").glob("bench_*.py")}
    assert benches == {name for name in names if name.startswith("bench_")}
    assert {*ops.WAYS, "tests", *plan.SANITIZERS} - {"run"} <= set(names)
    # Nothing runs beside what takes times.
    assert all(stage.group is None for stage in stages if stage.name in benches)
    assert [s.name for s in gpu_check.select(stages, "tests, build")] == ["build", "tests"]
    with pytest.raises(ValueError, match="unknown stages nothing; there are build, "):
        gpu_check.select(stages, "build,nothing")


def test_counts_of_tests(tmp_path: Path) -> None:
    program = """
import pytest
@pytest.mark.parametrize("device", ["cuda"])
def test_good(device): pass
@pytest.mark.parametrize("device", ["cuda"])
def test_bad(device): assert False
def test_skipped(): pytest.skip("planted")
"""
    (tmp_path / "test_planted.py").write_text(program)
    report = tmp_path / "report.xml"
    for selected, expected in (("", (1, 1, 1, 2)), ("skipped", (0, 0, 1, 0))):
        command = [sys.executable, "-m", "pytest", "-q", "-k", selected, f"--junitxml={report}"]
        subprocess.run([*command, "--rootdir", tmp_path], cwd=tmp_path, capture_output=True)
        counts = plan.read_tests(report)
        keys = ("passed", "failed", "skipped", "on_gpu")
        assert tuple(counts[key] for key in keys) == expected
        assert ("failure" in counts) == (expected[-1] == 0)
        assert counts["failures"] == ["test_planted::test_bad[cuda]"] * expected[1]


@pytest.mark.parametrize(
    "text, failure",
    [
        ("9 calls, 0 failures\n========= ERROR SUMMARY: 0 errors\n", None),
        ("9 calls, 0 failures\n========= ERROR SUMMARY: 2 errors\n", "something was found"),
        (
            "9 calls, 0 failures\n"
            "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
            "something was found",
        ),
        ("========= Error: Device not supported\n", "the tool did not get to its end"),
        ("========= ERROR SUMMARY: 0 errors\n", "the tool did not get to its end"),
    ],
)
def test_findings_of_a_sanitizer(tmp_path: Path, text: str, failure: str | None) -> None:
    (tmp_path / "log").write_text(f"========= COMPUTE-SANITIZER\n{text}")
    assert plan.read_sanitizer(tmp_path / "log").get("failure") == failure


def test_tests_need_no_package_of_the_detector(tmp_path: Path) -> None:
    """tests/ops are collected where pycocotools and the command line's packages are missing."""
    hidden = ("pycocotools", "tyro", "rich", "matplotlib", "yaml", "av")
    for name in hidden:
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden by a test')")
    command = [sys.executable, "-m", "pytest", "tests/ops", "--collect-only", "-q"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{plan.ROOT}"}
    done = subprocess.run(command, cwd=plan.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
