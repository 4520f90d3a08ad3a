"""The panels of the pictures of targets: each draws one level on one picture."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..colors import class_color
from .targets import LevelTargets, PictureTargets

INK = "#202020"
PANEL_AREA = 17.0  # square inches
_MOST_DOTS = 2_000  # background locations; beyond, they would be a grey veil
_MOST_ARROWS = 6  # boxes with arrows, on a level
_OUTLINE = [patheffects.withStroke(linewidth=2.6, foreground="white")]


def _grey(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """[H, W, 3] without colours, so that what is drawn has them all."""
    grey: NDArray[np.float32] = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return grey


def show(axes: Axes, pixels: NDArray[np.float32], size: tuple[int, int], title: str) -> None:
    """A picture, [H, W, 3] in 0..1, in the coordinates of the resized one's (height, width)."""
    height, width = size
    axes.imshow(np.clip(pixels, 0, 1), extent=(0, width, height, 0), interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def _overlay(axes: Axes, rgba: NDArray[np.float32], level: LevelTargets) -> None:
    """[H, W, 4] of a level, a cell for each location, which is in the middle."""
    limits = axes.axis()
    axes.imshow(rgba, extent=level.extent(), interpolation="nearest")
    axes.axis(limits)


def outline(axes: Axes, box: NDArray[np.float32], **style: object) -> None:
    """The border of a box, in a style of matplotlib's."""
    x0, y0, x1, y1 = box.tolist()
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))  # type: ignore[arg-type]


def draw_positives(
    axes: Axes, pixels: NDArray[np.float32], targets: PictureTargets, level: LevelTargets
) -> None:
    """The cells of the positives in the colours of their boxes, with rings if ambiguous."""
    positive = level.matched >= 0
    low, high = level.size_range
    sizes = f"from {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
    ambiguous = positive & (level.candidates > 1)
    count = int(positive.sum())
    text = f"{level.name}, stride {level.stride}, sizes {sizes}\n"
    text += f"{count:,} locations" if count > 1 else "1 location"
    text += f", {int(ambiguous.sum()):,} in several boxes (ringed)" if ambiguous.any() else ""
    show(axes, 0.35 * _grey(pixels) + 0.6, targets.size, text)
    rgba = np.zeros((*positive.shape, 4), dtype=np.float32)
    for index in level.boxes().tolist():
        rgba[level.matched == index] = (*rgb(index), 0.75)
    _overlay(axes, rgba, level)
    if positive.size <= _MOST_DOTS:
        axes.scatter(*_places(level, ~positive), s=1.2, color="#707070", linewidths=0)
    size = _dot(axes, targets, level)
    axes.scatter(*_places(level, positive), s=size, color="black", linewidths=0)
    if ambiguous.any():
        axes.scatter(
            *_places(level, ambiguous),
            s=8 * size,
            facecolors="none",
            edgecolors="black",
            linewidths=0.8,
        )
    for index in level.boxes().tolist():
        outline(axes, targets.boxes[index], edgecolor=rgb(index), linewidth=1.8)


def draw_centerness(
    axes: Axes, pixels: NDArray[np.float32], targets: PictureTargets, level: LevelTargets
) -> None:
    """The centerness targets of the positive locations, as heat."""
    show(axes, 0.3 * _grey(pixels), targets.size, "centerness")
    limits = axes.axis()
    shades = axes.imshow(
        np.ma.masked_where(level.matched < 0, level.centerness),
        extent=level.extent(),
        interpolation="nearest",
        cmap="inferno",
        vmin=0,
        vmax=1,
    )
    axes.axis(limits)
    for index in level.boxes().tolist():
        outline(axes, targets.boxes[index], edgecolor="white", linewidth=0.8, alpha=0.8)
    bar = axes.inset_axes((0.03, 0.04, 0.3, 0.025))
    axes.figure.colorbar(shades, cax=bar, orientation="horizontal", ticks=[0, 1])
    bar.xaxis.set_ticks_position("top")
    bar.tick_params(labelsize=8, colors="white", length=0, pad=1)


def draw_arrows(
    axes: Axes, pixels: NDArray[np.float32], targets: PictureTargets, level: LevelTargets
) -> None:
    """From the most central location of each of the largest boxes to its sides."""
    show(axes, 0.55 * pixels + 0.42, targets.size, "left, top, right, bottom")
    learned = set(level.boxes().tolist())
    chosen = [index for index in largest_first(targets) if index in learned][:_MOST_ARROWS]
    for index in chosen:
        color = tuple(0.72 * part for part in rgb(index))
        outline(axes, targets.boxes[index], edgecolor=rgb(index), linewidth=2.0)
        mine = np.where(level.matched == index, level.centerness, -1.0)
        row, column = np.unravel_index(int(mine.argmax()), mine.shape)
        x, y = level.location(int(row), int(column))
        left, top, right, bottom = level.ltrb[row, column].tolist()
        for name, dx, dy in (("l", -left, 0), ("t", 0, -top), ("r", right, 0), ("b", 0, bottom)):
            axes.annotate(
                "",
                xy=(x + dx, y + dy),
                xytext=(x, y),
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.22,head_length=0.4",
                    "color": color,
                    "linewidth": 1.5,
                    "shrinkA": 0,
                    "shrinkB": 0,
                    "path_effects": _OUTLINE,
                },
            )
            if abs(dx + dy) > 0.075 * max(targets.size):
                _number(
                    axes, x + 0.6 * dx, y + 0.6 * dy, f"{name} {abs(dx + dy):.0f}", color, bool(dy)
                )
        axes.plot(x, y, "o", color=color, markersize=5, markeredgecolor="white")
    if len(learned) > len(chosen):
        axes.set_title(
            f"left, top, right, bottom of the largest {len(chosen)}", loc="left", fontsize=11
        )


def _number(
    axes: Axes, x: float, y: float, text: str, color: tuple[float, ...], beside: bool
) -> None:
    """Above a horizontal arrow, or beside a vertical one."""
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0) if beside else (0, 3),
        textcoords="offset points",
        ha="left" if beside else "center",
        va="center" if beside else "bottom",
        fontsize=8,
        color=color,
        path_effects=_OUTLINE,
    )


def largest_first(targets: PictureTargets) -> list[int]:
    sides = targets.boxes[:, 2:] - targets.boxes[:, :2]
    order: list[int] = np.argsort(-sides.prod(axis=1), kind="stable").tolist()
    return order


def _places(
    level: LevelTargets, chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """x and y of these locations, [H, W], in the resized picture."""
    rows, columns = np.nonzero(chosen)
    return level.location(rows, columns)


def _dot(axes: Axes, targets: PictureTargets, level: LevelTargets) -> float:
    """Area in square points of a dot a fifth as wide as a cell, within reason."""
    across = 72 * math.sqrt(PANEL_AREA * targets.size[1] / targets.size[0]) / targets.size[1]
    return min(9.0, max(0.8, 0.2 * across * level.stride) ** 2)


def rgb(index: int) -> tuple[float, ...]:
    return rgb_of(class_color(index))


def rgb_of(color: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in color)
