"""Writes the README's table, docs/benchmarks.md, the tables of docs/scaling.md and their plots.

From the committed results.

    python -m benchmarks.summary [--check]

With ``--check`` nothing is written; the exit code is 1 if something is out of date.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence

from . import plots, scaling_page
from .figures import COMPILED, EAGER, GOALS, LINES, Figures, Goal, Line, by_case
from .harness import OURS, RESULTS

ROOT = RESULTS.parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGE, SCALING = DOCS / "benchmarks.md", DOCS / "scaling.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary")
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is old")
    options = parser.parse_args(arguments)
    figures = Figures()
    texts = {
        README: between_marks(README.read_text(), {"benchmarks": table(figures)}),
        PAGE: page(figures),
        SCALING: between_marks(SCALING.read_text(), scaling_page.tables(figures)),
    }
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


def between_marks(text: str, contents: Mapping[str, str]) -> str:
    """``text`` with what stands between the two marks of each name made anew."""
    for name, content in contents.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{content}{end}{after}"
    return text


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
    gpus = sorted({row["device"] for row in figures.all_rows("cuda")})
    text = [
        "# Benchmarks",
        "",
        "Made from [benchmarks/results](../benchmarks/results) by `python -m benchmarks.summary`.",
        "Times are medians over rounds in which the providers take turns; a provider whose result",
        "is not the reference's, in float64, gets none. Unless said otherwise everything here is",
        "float32 on two CPU threads. "
        + (
            f"Rows of {', '.join(gpus)} are there too."
            if gpus
            else "No GPU has been timed yet, so there are no rows of one:\n"
            "`python -m benchmarks.gpu_check` measures in one go what the goals for GPUs name."
        ),
        "",
        "How cost grows with images, classes, boxes and processes: [scaling.md](scaling.md).",
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
        "## Where another is faster",
        "",
        "Every row, of any dtype, size and number of threads, in which one of the others took less",
        "time than `fcos_ext` did.",
        "",
        *_losses(figures),
        "",
        "## Where the figures come from",
        "",
        "Each row of the JSON holds the command that measures it again. All rows of a file (with",
        "`FCOS_COCO_BOXES=instances_val2017.json` those of COCO's boxes, too):",
        "",
        "| results | measured on | command |",
        "|---|---|---|",
        *_origins(figures),
        "",
    ]
    return "\n".join(text)


def _losses(figures: Figures) -> list[str]:
    """Rows of a table, or a sentence if there are none."""
    lines = []
    for row in figures.all_rows():
        ratio = row.get("ratio_to_ours", 1)
        if ratio < 1 and not row["provider"].startswith((OURS, *_PARTS)):
            words = shlex.split(row.get("command", ""))
            name = words[words.index("--only") + 1] if "--only" in words else ""
            lines.append(f"| {row['op']} | {name} | {row['provider']} | {ratio:.2f} x |")
    if not lines:
        return ["There is none."]
    return [
        "| benchmark | case | the other | its time as a multiple of ours |",
        "|---|---|---|---|",
    ] + lines


#: Providers that are no rivals: parts of our own steps, to compare with.
_PARTS = ("network alone", "1 process", "gradients not exchanged")


def _origins(figures: Figures) -> list[str]:
    lines = []
    for path in figures.files():
        row = json.loads(path.read_text())[0]
        stamp = ", ".join(
            str(row[key])
            for key in ("device", "instruction_set", "torch", "commit", "date")
            if key in row
        )
        prefix = "FCOS_CPU_ISA=avx2 " if path.stem.endswith("avx2") else ""
        device = " --device cuda" if "-cuda" in path.stem else ""
        command = f"{prefix}python -m benchmarks {row['op']}{device}"
        lines.append(
            f"| [{path.stem}](../benchmarks/results/{path.name}) | {stamp} | `{command}` |"
        )
    return lines


def _goal_line(goal: Goal, ratios: Sequence[float]) -> str:
    against = {EAGER: "eager", COMPILED: "`torch.compile`"}.get(goal.against, goal.against)
    if not ratios:
        return f"| {goal.title} | {against} | {goal.at_least:g} x | | not measured |"
    least = min(ratios)
    measured = f"{least:,.{2 if least < 10 else 1 if least < 100 else 0}f} x"
    verdict = "met" if least >= goal.at_least else "**missed**"
    return f"| {goal.title} | {against} | {goal.at_least:g} x | {measured} | {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
