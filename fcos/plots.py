"""The figures of a run folder: training curves, precision and recall, confusion, labels."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fcos.colors import class_color
from fcos.confusion import Confusion
from fcos.evaluate import PrecisionRecall

_LOSSES = ("total", "cls", "box", "centerness")
_MEAN_COLOR = "#202020"
_GRID_COLOR = "#e4e4e4"
_MOST_NAMED_CLASSES = 12  # more lines than this cannot be told apart
_MOST_NUMBERED_CLASSES = 20  # beyond, the numbers in the cells are too small to read


def plot_training(metrics_csv: str | Path, path: str | Path) -> None:
    """Losses, learning rate and average precision over the iterations.

    Args:
        metrics_csv: With a column "iteration" and any of "total", "cls", "box", "centerness", "lr",
            "images_per_second", "ap" and "ap50". Cells may be blank; a last line that was cut off
            while it was being written is left out.
        path: The picture to write.

    Raises:
        ValueError: The file has no column "iteration", or a cell is not a number.
    """
    columns = _read_columns(Path(metrics_csv))
    wanted = (
        ("loss", _LOSSES),
        ("average precision", ("ap", "ap50")),
        ("learning rate", ("lr",)),
        ("images per second", ("images_per_second",)),
    )
    panels: list[tuple[str, list[str]]] = []
    for title, names in wanted:
        if present := [name for name in names if name in columns]:
            panels.append((title, present))
    width = 2 if len(panels) > 1 else 1
    height = max(1, -(-len(panels) // 2))
    figure, grid = _figure(5.6 * width, 3.5 * height, height, width)
    for axes, (title, present) in zip(grid, panels, strict=False):
        for i, name in enumerate(present):
            iterations, values = columns[name]
            color = _MEAN_COLOR if i == 0 else _rgb(i - 1)
            if title == "loss":
                axes.plot(iterations, values, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(iterations, _smoothed(values), color=color, label=name, linewidth=1.6)
            else:
                marker = "o" if title == "average precision" else None
                axes.plot(
                    iterations, values, color=color, label=name.upper(), marker=marker, markersize=3
                )
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        if len(present) > 1:
            axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _save(figure, path)


def plot_precision_recall(curves: PrecisionRecall, path: str | Path) -> None:
    """Precision over recall and F1 over the score threshold, per class and on average, at IoU 0.5.

    Args:
        curves: ``CocoMetrics.curves``.
        path: The picture to write.
    """
    figure, (left, right) = _figure(12.5, 5.0, 1, 2)
    present = np.flatnonzero(~np.isnan(curves.precision).any(axis=1)).tolist()
    named = len(present) <= _MOST_NAMED_CLASSES
    for k in present:
        style: dict[str, Any] = {"color": _rgb(k), "linewidth": 1.3}
        if named:
            style["label"] = f"{curves.names[k]}  {curves.precision[k].mean():.3f}"
        else:
            style |= {"alpha": 0.5, "linewidth": 0.8}
        left.plot(curves.recall, curves.precision[k], **style)
        right.plot(curves.thresholds, curves.f1[k], **style)
    if len(present):
        precision, f1 = curves.precision[present].mean(axis=0), curves.f1[present].mean(axis=0)
        best = int(f1.argmax())
        bold: dict[str, Any] = {"color": _MEAN_COLOR, "linewidth": 2.4}
        bold["label"] = f"all {len(present)} classes  {precision.mean():.3f}"
        left.plot(curves.recall, precision, **bold)
        right.plot(curves.thresholds, f1, **bold)
        right.plot(curves.thresholds[best], f1[best], "o", color=_MEAN_COLOR, markersize=6)
        right.set_title(f"F1, best {f1[best]:.3f} at score {curves.thresholds[best]:.2f}")
        left.legend(title="AP50", loc="lower left", fontsize=8, framealpha=0.85)
    else:
        right.set_title("F1")
        left.text(0.5, 0.5, "no true boxes", ha="center", va="center")
    left.set_title("precision over recall")
    for axes, x, y in ((left, "recall", "precision"), (right, "score threshold", "F1")):
        axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
    _save(figure, path)


def plot_confusion(confusion: Confusion, path: str | Path) -> None:
    """The confusion matrix: shares of the true class as shades, counts as numbers.

    Args:
        confusion: Of ``confusion_matrix``.
        path: The picture to write.
    """
    counts = confusion.counts
    # one shade for all of a row, however rare the class is
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(counts)
    side = min(16.0, max(4.5, 0.55 * size + 1.5))
    figure, (axes,) = _figure(side + 1.0, side, 1, 1)
    shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    ticks = [*confusion.names, "background"]
    small = min(9.0, 520 / size)
    axes.set_xticks(range(size), ticks, rotation=90 if size > 6 else 0, fontsize=small)
    axes.set_yticks(range(size), ticks, fontsize=small)
    axes.set(
        xlabel="detected",
        ylabel="true",
        title=f"score >= {confusion.score_threshold:g}, IoU >= {confusion.iou_threshold:g}",
    )
    if size <= _MOST_NUMBERED_CLASSES + 1:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 0.55 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=small)
    figure.colorbar(shades, ax=axes, fraction=0.046, label="share of the true class")
    _save(figure, path)


def plot_label_counts(names: Sequence[str], counts: Sequence[int], path: str | Path) -> None:
    """How many boxes each class has.

    Args:
        names: Class names.
        counts: Boxes of each.
        path: The picture to write.

    Raises:
        ValueError: There are not as many counts as names.
    """
    if len(names) != len(counts):
        raise ValueError(
            f"plot_label_counts: counts must have one number per name ({len(names)}), "
            f"got {len(counts)}"
        )
    figure, (axes,) = _figure(min(16.0, max(4.0, 0.3 * len(names) + 1.5)), 3.8, 1, 1)
    bars = axes.bar(range(len(names)), counts, color=[_rgb(k) for k in range(len(names))])
    if len(names) <= _MOST_NUMBERED_CLASSES:
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axes.set_ylabel("boxes")
    axes.grid(False, axis="x")
    _save(figure, path)


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.grid(True, color=_GRID_COLOR, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=120)


def _rgb(label: int) -> tuple[float, float, float]:
    red, green, blue = class_color(label)
    return red / 255, green / 255, blue / 255


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over the neighbours, a twentieth of the curve; shorter at the ends."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _read_columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Iterations and values of each column that has any, blank cells left out."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if "iteration" not in header:
            raise ValueError(f'{path}: must have a column "iteration", got {list(header)}')
        # DictReader fills the cells that a cut-off line lacks with None
        rows = [row for row in reader if None not in row.values()]
    columns = {}
    for name in header:
        try:
            pairs = [(float(row["iteration"]), float(row[name])) for row in rows if row[name]]
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r} must hold numbers: {error}") from error
        if pairs:
            iterations, values = np.array(pairs).T
            columns[name] = (iterations, values)
    return columns
