"""The plots of docs/benchmarks.md. Each names, in its own file, the results it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .figures import COMPILED, EAGER, GOALS, Figures, by_case
from .harness import OURS, RESULTS

_KEY = "results"
_OURS, _OTHER, _THIRD, _LINE = "#2364aa", "#b8b8b8", "#ea7317", "#222222"
_NAMES = {OURS: "ours", EAGER: "our reference, eager", COMPILED: "the same, torch.compile"}
_COLORS = {OURS: _OURS, EAGER: _OTHER, COMPILED: _THIRD, "torchvision": _LINE}


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str
    size: tuple[float, float]
    """Inches."""
    draw: Callable[[Figure, Figures], None]


def outdated() -> list[Path]:
    """Those that are missing or were drawn from other results."""
    return [picture.path for picture in PICTURES if _drawn_from(picture.path) != _fingerprint()]


def draw(path: Path) -> None:
    picture = next(picture for picture in PICTURES if picture.path == path)
    figure = Figure(figsize=picture.size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    picture.draw(figure, Figures())
    figure.savefig(path, metadata={_KEY: _fingerprint()})


def _fingerprint() -> str:
    """Of all times that are committed."""
    digest = hashlib.sha256()
    for file in sorted(RESULTS.glob("*-cpu*.json")):
        for row in json.loads(file.read_text()):
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _drawn_from(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return str(image.info.get(_KEY))


def _goals(figure: Figure, figures: Figures) -> None:
    measured = [(goal, min(ratios)) for goal in GOALS if (ratios := figures.ratios(goal))]
    axes = figure.subplots()
    places = range(len(measured))
    values = [value for _, value in measured]
    colors = [_OURS if value >= goal.at_least else _THIRD for goal, value in measured]
    axes.barh(places, values, color=colors, height=0.7)
    axes.scatter(
        [goal.at_least for goal, _ in measured], places, marker="|", s=140, color=_LINE, zorder=3
    )
    short = {EAGER: "eager", COMPILED: "torch.compile"}
    titles = [
        f"{goal.title.replace('`', '')}  vs {short.get(goal.against, goal.against)}"
        for goal, _ in measured
    ]
    axes.set_yticks(places, titles, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(1, 2 * max(values))
    axes.set_ylim(len(measured) - 0.4, -0.6)
    for place, (goal, value) in zip(places, measured, strict=True):
        text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        axes.text(max(value, goal.at_least) * 1.05, place, text, va="center", fontsize=8)
    axes.set_xlabel("times our time")
    _plain(axes)


def _assignment(figure: Figure, figures: Figures) -> None:
    time, memory = figure.subplots(1, 2)
    for provider in (OURS, EAGER, "torchvision"):
        rows = [
            case[provider]
            for case in by_case(figures.rows("assign_targets", {}))
            if provider in case and case[provider]["boxes"]
        ]
        style = {"marker": "o", "color": _COLORS[provider], "label": _NAMES.get(provider, provider)}
        boxes = [row["boxes"] for row in rows]
        time.plot(boxes, [row["median_ms"] for row in rows], **style)
        memory.plot(boxes, [row["peak_extra_bytes"] / 2**20 for row in rows], **style)
    for axes, label in ((time, "ms"), (memory, "MiB beyond the inputs")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("boxes an image")
        axes.set_ylabel(label)
        _plain(axes)
    time.legend(frameon=False, fontsize=8)


def _nms(figure: Figure, figures: Figures) -> None:
    axes = figure.subplots()
    for mode, line in (("keep all", "-"), ("keep 100", ":")):
        for provider in (OURS, "torchvision"):
            where = {"mode": mode, "boxes": "random", "groups": 1}
            rows = [
                case[provider] for case in by_case(figures.rows("nms", where)) if provider in case
            ]
            rows.sort(key=lambda row: int(row["shape"][0]))
            axes.plot(
                [row["shape"][0] for row in rows],
                [row["median_ms"] for row in rows],
                line,
                marker="o",
                color=_COLORS[provider],
                label=f"{_NAMES.get(provider, provider)}, {mode}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("boxes")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


_DOCS = RESULTS.parents[1] / "docs"
PICTURES = (
    Picture(
        _DOCS / "benchmarks-goals.png",
        "Times our time, and the goal as a stroke; two threads, float32",
        (9, 9),
        _goals,
    ),
    Picture(
        _DOCS / "benchmarks-assignment.png",
        "Target assignment for 2 images of 22,400 locations: time and memory against boxes",
        (9, 3.6),
        _assignment,
    ),
    Picture(
        _DOCS / "benchmarks-nms.png",
        "NMS against the number of boxes, random ones of one class",
        (6, 3.8),
        _nms,
    ),
)
