"""Runs the stages of the check, each in a process of its own with a time of its own.

A stage that fails, hangs or kills its process takes nothing with it: the later ones run, and what
was found so far is on disk after each.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Less is not worth starting a stage for.
LEAST_SECONDS = 2.0
#: Of what a stage printed, this much is kept with the outcome of one that failed.
TAIL_CHARACTERS = 4000

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]
    budget_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    """Why it cannot run here: it then fails without being started."""
    read: Callable[[], dict[str, Any]] | None = None
    """What the stage left behind, for its outcome. ``"failure"`` in it makes the stage fail."""
    group: str | None = None
    """Neighbours of the same group run at the same time."""


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float
    budget_s: float
    detail: str = ""
    """One line."""
    tail: str = ""
    """End of what it printed, if it did not pass."""
    data: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_stages(
    stages: Sequence[Stage],
    *,
    seconds: float,
    logs: Path,
    jobs: int,
    finished: Callable[[Outcome], None],
) -> list[Outcome]:
    """All outcomes, in the order of ``stages``.

    Args:
        seconds: for all together; a stage gets at most what is left.
        logs: folder for the whole output of each.
        jobs: stages of a group that run at the same time.
        finished: called with each outcome as soon as it is there, from one thread.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for group in _groups(stages):
        with ThreadPoolExecutor(max_workers=max(1, min(jobs, len(group)))) as pool:
            futures = [pool.submit(run_stage, stage, deadline, logs) for stage in group]
            for future in as_completed(futures):
                outcome = future.result()
                outcomes[outcome.name] = outcome
                finished(outcome)
    return [outcomes[stage.name] for stage in stages]


def _groups(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    numbered = enumerate(stages)
    for _, members in itertools.groupby(numbered, lambda pair: pair[1].group or str(pair[0])):
        yield [stage for _, stage in members]


def run_stage(stage: Stage, deadline: float, logs: Path) -> Outcome:
    """Start, wait, and judge one stage."""
    start = time.monotonic()
    allowed = min(stage.budget_s, deadline - start)
    outcome = Outcome(stage.name, FAILED, 0.0, stage.budget_s)
    if stage.missing is not None:
        outcome.detail = stage.missing
        return outcome
    if allowed < LEAST_SECONDS:
        outcome.status, outcome.detail = NOT_RUN, "no time was left for it"
        return outcome
    log = logs / f"{stage.name}.log"
    try:
        with log.open("wb") as output:
            code = _run(stage, output, allowed)
    except OSError as error:
        outcome.detail = str(error)
        return outcome
    outcome.seconds = round(time.monotonic() - start, 1)
    if code is None:
        outcome.status, outcome.detail = TIMED_OUT, f"stopped after {allowed:.0f} s"
    elif code == 0:
        outcome.status = PASSED
    elif code < 0:
        outcome.detail = f"killed by {signal.Signals(-code).name}"
    else:
        outcome.detail = f"exit code {code}"
    if stage.read is not None:
        _add_data(stage.read, outcome)
    if outcome.status != PASSED:
        outcome.tail = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
    return outcome


def _run(stage: Stage, output: Any, seconds: float) -> int | None:
    """Exit code, or None if the time was up and the process with its children was killed."""
    process = subprocess.Popen(
        stage.command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(stage.environment),
        start_new_session=True,  # a process group, so that its children can be ended with it
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _add_data(read: Callable[[], dict[str, Any]], outcome: Outcome) -> None:
    """Also of a stage that failed or was stopped: it may have got far."""
    try:
        outcome.data = read()
    except (OSError, ValueError, KeyError) as error:
        if outcome.status == PASSED:
            outcome.status, outcome.detail = FAILED, f"its results cannot be read: {error}"
        return
    failure = outcome.data.pop("failure", None)
    summary = outcome.data.pop("summary", "")
    if failure and outcome.status == PASSED:
        outcome.status = FAILED
    outcome.detail = "; ".join(part for part in (outcome.detail, failure, summary) if part)
