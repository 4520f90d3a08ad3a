"""How fast a kernel could be, and should be: ``limits.json`` against rows of results.

An entry of the file::

    kernel     what it is about, in words
    op, where  which rows: of that benchmark, with these settings; the first that has them all
    provider   whose time it is about, if not that of our ordinary function
    limit_us   no version is faster: bytes over bandwidth, or instructions over issue rate
    goal_us    what the kernel should take
    why        where the limit comes from

The figures are those of an NVIDIA H200 at a batch of 16 images of 800 x 1344 and 80 classes. A time
on another GPU is shown beside them, and meets or misses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..harness import OURS, device_ms

LIMITS = Path(__file__).with_name("limits.json")
DEVICE = "NVIDIA H200"

Row = Mapping[str, Any]


def load_limits(path: Path = LIMITS) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return entries


def judge(rows: Sequence[Row], limits: Sequence[Row], device: str) -> list[dict[str, Any]]:
    """An entry for each limit: the time of our kernel, and what it is worth.

    ``verdict`` is "meets the goal", "misses the goal", "wrong result", "not measured", or "no goal
    for this GPU".
    """
    judged = []
    for limit in limits:
        entry: dict[str, Any] = {key: limit[key] for key in ("kernel", "limit_us", "goal_us")}
        judged.append(entry)
        matching = _matching(rows, limit)
        if not matching:
            entry["verdict"] = "not measured"
            continue
        ours, *others = matching
        if "refused" in ours:
            entry["verdict"] = "wrong result"
        else:
            microseconds = device_ms(dict(ours)) * 1e3
            entry["us"] = microseconds
            entry["percent_of_copy"] = ours.get("percent_of_copy")
            entry["wall_us"] = ours["median_ms"] * 1e3
            entry["ratios"] = dict(
                _ratio(other, ours) for other in others if "refused" not in other
            )
            entry["verdict"] = (
                "no goal for this GPU"
                if not device.startswith(DEVICE)
                else "meets the goal"
                if microseconds <= limit["goal_us"]
                else "misses the goal"
            )
    return judged


def _matching(rows: Sequence[Row], limit: Row) -> list[Row]:
    """Our row, then those of what others offer for the same case."""
    settings = {"op": limit["op"]} | limit["where"]
    matching = [row for row in rows if settings.items() <= row.items()]
    ours = [row for row in matching if row["provider"] == limit.get("provider", OURS)]
    if not ours:
        return []
    case = _case(ours[0])
    others = [
        row for row in matching if not row["provider"].startswith(OURS) and _case(row) == case
    ]
    return [ours[0], *others]


def _ratio(other: Row, ours: Row) -> tuple[str, float]:
    """Provider, and its time in ours: of the GPU alone if both could be captured in a graph, else
    of both with the host."""
    if "graph_ms" in other and "graph_ms" in ours:
        return other["provider"], other["graph_ms"] / ours["graph_ms"]
    return f"{other['provider']}, both with the host", other["median_ms"] / ours["median_ms"]


def _case(row: Row) -> dict[str, Any]:
    """Settings of the case: what stands before the provider in a row."""
    keys = list(row)
    return {key: row[key] for key in keys[: keys.index("provider")]}


def table(judged: Sequence[Row]) -> list[str]:
    """Lines for a reader."""
    lines = [f"{'kernel':<44} {'time':>9} {'limit':>7} {'goal':>7}  {'of copy':>7}  verdict"]
    for entry in judged:
        time = f"{entry['us']:.1f} us" if "us" in entry else "-"
        percent = entry.get("percent_of_copy")
        lines.append(
            f"{entry['kernel']:<44} {time:>9} {entry['limit_us']:>7g} {entry['goal_us']:>7g}  "
            f"{'-' if percent is None else f'{percent:.0f} %':>7}  {entry['verdict']}"
        )
        ratios = entry.get("ratios", {}).items()
        lines += [f"    {ratio:8.1f} x  {provider}" for provider, ratio in ratios]
    return lines
