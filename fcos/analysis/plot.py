"""An analysis as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..colors import class_color
from .analyze import LEARNED, OUTSIDE, REASONS, Analysis
from .rows import by_level, by_size
from .table import describe

_INK = "#202020"
_GRID = "#e4e4e4"
_LEARNED = "#aab4c2"
_MOST_DOTS = 20_000


def plot_analysis(analysis: Analysis, path: str | Path) -> None:
    """Which boxes are lost, why, and what the levels and sizes get.

    Args:
        analysis: Of ``analyze``.
        path: The picture to write.
    """
    figure = Figure(figsize=(13.0, 10.0), layout="constrained")
    FigureCanvasAgg(figure)
    (scatter, reasons), (sizes, levels) = figure.subplots(2, 2)
    for axes in (scatter, reasons, sizes, levels):
        axes.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{analysis.annotations.path.name}: {analysis.boxes:,} boxes"
    if analysis.boxes:
        title += f", best possible recall {100 * analysis.recall:.2f} %"
        _scatter(scatter, analysis)
        _reasons(reasons, analysis)
        _sizes(sizes, analysis)
        _levels(levels, analysis)
    figure.suptitle(f"{title}\n", fontsize=14, color=_INK, parse_math=False)
    figure.text(0.5, 0.965, describe(analysis.conventions), ha="center", va="top", color="#606060")
    figure.savefig(path, dpi=120)


def _scatter(axes: Axes, analysis: Analysis) -> None:
    """Width and height of every box, the lost ones in colour."""
    height, width = np.maximum(analysis.sizes.T, 0.5)
    learned = np.flatnonzero(analysis.learned)
    shown = learned[:: math.ceil(len(learned) / _MOST_DOTS)] if len(learned) else learned
    dot = 3 + 9 / (1 + len(shown) / 1000)
    axes.scatter(width[shown], height[shown], s=dot, color=_LEARNED, alpha=0.5, linewidths=0)
    axes.scatter([], [], s=20, color=_LEARNED, label=f"learned  {len(learned):,}")
    for reason, color in _colors():
        lost = np.flatnonzero(analysis.reasons == reason)
        if len(lost):
            label = f"{REASONS[reason]}  {len(lost):,}"
            axes.scatter(
                width[lost], height[lost], s=dot + 8, color=color, label=label, linewidths=0
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="width, pixels", ylabel="height, pixels")
    stride = min(analysis.conventions.strides)
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    for shade in (axes.axvspan, axes.axhspan):
        shade(0.01, stride, color="#000000", alpha=0.05, linewidth=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _title(axes, f"boxes in the resized picture; shaded: smaller than stride {stride}")
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)


def _reasons(axes: Axes, analysis: Analysis) -> None:
    """What share of the boxes of a size is lost, and why."""
    rows = by_size(analysis)
    side = np.sqrt(analysis.sizes.astype(np.float64).prod(axis=1))
    bottoms = np.zeros(len(rows))
    for reason, color in _colors():
        of_reason = side[analysis.reasons == reason]
        counts = [int(((of_reason >= row.low) & (of_reason < row.high)).sum()) for row in rows]
        shares = np.array(
            [100 * n / max(1, row.boxes) for n, row in zip(counts, rows, strict=True)]
        )
        if shares.any():
            axes.bar(range(len(rows)), shares, bottom=bottoms, color=color, label=REASONS[reason])
            bottoms += shares
    for place, (bottom, row) in enumerate(zip(bottoms.tolist(), rows, strict=True)):
        if row.boxes:
            text = f"{bottom:.1f}" if bottom else "0"
            axes.text(place, bottom, text, ha="center", va="bottom", fontsize=9, color=_INK)
    axes.set_ylim(0, max(1.0, 1.12 * float(bottoms.max())))
    axes.set(xlabel="sqrt(width x height), pixels", ylabel="% of the boxes of the size")
    axes.set_xticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.grid(False, axis="x")
    _title(axes, "boxes that no location learns, by size")
    if bottoms.any():
        axes.legend(frameon=False, fontsize=9)


def _sizes(axes: Axes, analysis: Analysis) -> None:
    """Boxes beside positives: what the loss is about."""
    rows = by_size(analysis)
    total = max(1, int(analysis.level_positives.sum()))
    boxes = [100 * row.boxes / analysis.boxes for row in rows]
    places = np.arange(len(rows))
    bars = axes.bar(places - 0.2, boxes, 0.4, color=_LEARNED, label="boxes")
    axes.bar_label(bars, [f"{value:.1f}" for value in boxes], fontsize=8)
    bottoms = np.zeros(len(rows))
    colors = level_colors(len(analysis.conventions.strides))
    for level, name in enumerate(analysis.conventions.level_names):
        shares = np.array([100 * row.level_positives[level] / total for row in rows])
        axes.bar(
            places + 0.2,
            shares,
            0.4,
            bottom=bottoms,
            color=colors[level],
            label=f"positives of {name}",
        )
        bottoms += shares
    for place, bottom in zip(places, bottoms.tolist(), strict=True):
        axes.text(place + 0.2, bottom, f"{bottom:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set(xlabel="sqrt(width x height), pixels", ylabel="% of all")
    axes.set_xticks(places, [row.name for row in rows], fontsize=8)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.1 * max(*boxes, *bottoms.tolist(), 1.0))
    _title(axes, "boxes and positive locations, by size")
    axes.legend(frameon=False, fontsize=9)


def _levels(axes: Axes, analysis: Analysis) -> None:
    """Positives of each level: in one box, in several, in several classes'."""
    rows = by_level(analysis)
    positives = np.array([row.positives for row in rows])
    ambiguous = np.array([row.ambiguous for row in rows])
    classes = np.array([row.ambiguous_classes for row in rows])
    bottoms = np.zeros(len(rows), dtype=np.int64)
    for counts, shade, label in (
        (positives - ambiguous, 1.0, "in one box"),
        (ambiguous - classes, 0.6, "in several boxes of a class"),
        (classes, 0.25, "in boxes of several classes"),
    ):
        colors = [tuple(shade * part for part in color) for color in level_colors(len(rows))]
        axes.bar(range(len(rows)), counts, 0.7, bottom=bottoms, color=colors)
        grey = tuple(shade * 0.75 for _ in range(3))
        axes.bar([0], [0], color=[grey], label=label)
        bottoms += counts
    for place, row in enumerate(rows):
        share = 100 * row.ambiguous / max(1, row.positives)
        text = f"{row.positives:,}\n{share:.1f} % ambiguous"
        axes.text(place, row.positives, text, ha="center", va="bottom", fontsize=8, color=_INK)
    names = [f"{row.name}\n{row.boxes:,} boxes" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=9)
    axes.set_xlim(-0.6, max(len(rows), 2) - 0.4)
    axes.set_ylim(0, 1.15 * max(1, int(positives.max())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("positive locations")
    axes.grid(False, axis="x")
    _title(
        axes,
        f"positive locations: {100 * analysis.ambiguous:.2f} % ambiguous, "
        f"{100 * analysis.ambiguous_classes:.2f} % between classes",
    )
    axes.legend(frameon=False, fontsize=9)


def _colors() -> list[tuple[int, tuple[float, ...]]]:
    """The reasons for a loss, with a colour each."""
    return [(reason, _rgb(reason - 1)) for reason in range(LEARNED + 1, OUTSIDE + 1)]


def level_colors(levels: int) -> list[tuple[float, ...]]:
    """RGB in 0..1 of each level, from the finest to the coarsest."""
    steps = np.linspace(0.25, 0.92, levels) if levels > 1 else np.array([0.5])
    return [tuple(matplotlib.colormaps["viridis"](step)[:3]) for step in steps.tolist()]


def _rgb(label: int) -> tuple[float, ...]:
    return tuple(part / 255 for part in class_color(label))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=_INK)
