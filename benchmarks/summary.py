"""Writes the README's table, docs/benchmarks.md and its plots from the committed results.

    python -m benchmarks.summary [--check]

With ``--check`` nothing is written; the exit code is 1 if something is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import plots
from .figures import COMPILED, EAGER, GOALS, LINES, Figures, Goal, Line, Row, by_case
from .harness import RESULTS

ROOT = RESULTS.parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->\n", "<!-- benchmarks: end -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary")
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is old")
    options = parser.parse_args(arguments)
    figures = Figures()
    texts = {README: readme(README.read_text(), figures), PAGE: page(figures)}
    old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    pictures = plots.outdated()
    if options.check:
        for path in [*old, *pictures]:
            print(
                f"{path.relative_to(ROOT)} is older than the results: python -m benchmarks.summary"
            )
        return int(bool(old or pictures))
    for path in old:
        path.write_text(texts[path])
    for path in pictures:
        plots.draw(path)
    for path in [*old, *pictures]:
        print(path.relative_to(ROOT))
    return 0


def readme(text: str, figures: Figures) -> str:
    """``text`` with the table between the two marks made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table(figures)}{END}{after}"


def table(figures: Figures) -> str:
    """Our time and the others' as multiples of it, two threads, float32."""
    lines = ["| | ours | torchvision | our reference, eager | the same, `torch.compile` |"]
    lines.append("|---|---|---|---|---|")
    lines += [_line(line, figures) for line in LINES]
    return "\n".join(line for line in lines if line) + "\n"


def _line(line: Line, figures: Figures) -> str:
    """Empty where nothing has been measured."""
    cases = [case for where in line.cases for case in by_case(figures.rows(line.op, where))]
    cases = [case for case in cases if line.ours in case]
    if not cases:
        return ""
    ours = [case[line.ours]["median_ms"] for case in cases]
    cells = [line.title, _join([_milliseconds(time) for time in ours]) + " ms"]
    for provider in (line.torchvision, EAGER, COMPILED):
        others = [case.get(provider) for case in cases]
        ratios = [
            f"{other['median_ms'] / time:,.{1 if other['median_ms'] < 15 * time else 0}f}"
            for other, time in zip(others, ours, strict=True)
            if other is not None
        ]
        cells.append(f"{_join(ratios)} x" if ratios else "")
    return "| " + " | ".join(cells).replace("|  |", "| |").rstrip() + " |"


def _join(parts: Sequence[str]) -> str:
    return " / ".join(parts)


def _milliseconds(time: float) -> str:
    return f"{time:.2g}" if time < 100 else f"{time:.0f}"


def page(figures: Figures) -> str:
    """docs/benchmarks.md."""
    with_results = sorted({goal.op for goal in GOALS})
    stamps = {op: _stamp(rows[0]) for op in with_results if (rows := figures.rows(op, {}))}
    text = [
        "# Benchmarks",
        "",
        "Made from [benchmarks/results](../benchmarks/results) by `python -m benchmarks.summary`.",
        "Times are medians over rounds in which the providers take turns; a provider whose result",
        "is not the reference's, in float64, gets none. Everything here is float32 on two CPU",
        "threads. No GPU has been timed yet: `python -m benchmarks.gpu_check` does it in one go.",
        "",
        "## Goals",
        "",
        "How many times our time the other takes; of several cases (memory formats, sizes) the",
        "least.",
        "",
        "| | against | goal | measured | |",
        "|---|---|---|---|---|",
        *(_goal_line(goal, figures.ratios(goal)) for goal in GOALS),
        "",
        "## Pictures",
        "",
    ]
    for picture in plots.PICTURES:
        text += [f"![{picture.caption}]({picture.path.name})", "", picture.caption + ".", ""]
    text += [
        "## Where the figures come from",
        "",
        "| results | measured on | command |",
        "|---|---|---|",
        *(
            f"| {op} | {stamp} | `python -m benchmarks.bench_{op}` |"
            for op, stamp in stamps.items()
        ),
        "",
    ]
    return "\n".join(text)


def _goal_line(goal: Goal, ratios: Sequence[float]) -> str:
    against = {EAGER: "eager", COMPILED: "`torch.compile`"}.get(goal.against, goal.against)
    if not ratios:
        return f"| {goal.title} | {against} | {goal.at_least:g} x | | not measured |"
    least = min(ratios)
    measured = f"{least:,.{2 if least < 10 else 1 if least < 100 else 0}f} x"
    verdict = "met" if least >= goal.at_least else "**missed**"
    return f"| {goal.title} | {against} | {goal.at_least:g} x | {measured} | {verdict} |"


def _stamp(row: Row) -> str:
    keys = ("device", "instruction_set", "torch", "commit", "date")
    return ", ".join(str(row[key]) for key in keys)


if __name__ == "__main__":
    sys.exit(main())
