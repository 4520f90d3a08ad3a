"""Pictures of what the locations learn: positives by box, centerness, and distances as arrows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from ..colors import class_color, text_color
from ..data.annotations import Annotations
from ..data.coco import read_picture
from ..draw import Picture, to_pil
from .conventions import Conventions
from .panels import (
    INK,
    PANEL_AREA,
    draw_arrows,
    draw_centerness,
    draw_positives,
    largest_first,
    outline,
    rgb,
    rgb_of,
    show,
)
from .targets import PictureTargets, picture_targets

_MOST_LISTED = 14  # boxes in the table
_NARROWEST = 3.4  # inches of a panel, for its title
_TITLE = 0.5  # inches


def plot_targets(
    image: Picture,
    targets: PictureTargets,
    path: str | Path,
    names: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw the targets of a picture: a row for each level that learns anything.

    In a row, from the left: the cells of the positive locations in the colours of the boxes that
    they learn; their centerness targets; and the distances to the sides of the box from its most
    central location. Boxes keep their colours; those that no location learns are dashed.

    Args:
        image: The picture, of any size: it is shown at that of the targets.
        targets: Of ``picture_targets``.
        path: The file to write, of a suffix that matplotlib knows, such as .png or .jpg.
        names: Class names.
        title: Written on top, such as the file's name.
    """
    pixels = _pixels(image, targets.size)
    shown = [level for level in targets.levels if (level.matched >= 0).any()]
    height, width = targets.size
    across = math.sqrt(PANEL_AREA * min(3.0, max(0.4, width / height)))  # inches
    header = PANEL_AREA / across
    across = max(_NARROWEST, across)
    panel = min(header, across * height / width)
    rows = [header + _TITLE, *[panel + _TITLE] * len(shown)]
    figure = Figure(figsize=(3 * across + 0.5, sum(rows) + 0.5), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), 3, height_ratios=rows)
    _overview(figure.add_subplot(grid[0, 0]), pixels, targets)
    _table(figure.add_subplot(grid[0, 1:]), targets, names)
    for row, level in enumerate(shown, start=1):
        draw_positives(figure.add_subplot(grid[row, 0]), pixels, targets, level)
        draw_centerness(figure.add_subplot(grid[row, 1]), pixels, targets, level)
        draw_arrows(figure.add_subplot(grid[row, 2]), pixels, targets, level)
    figure.suptitle(
        f"{title}  {width} x {height} pixels".strip(), fontsize=14, color=INK, parse_math=False
    )
    figure.savefig(path)


def draw_targets(
    annotations: Annotations, images: Path, index: int, conventions: Conventions, folder: Path
) -> Path:
    """Draw the targets of an image of a data set.

    Args:
        annotations: Of ``read_annotations``.
        images: The folder that its file names are relative to.
        index: Of the image.
        conventions: Levels, resizing and the rest.
        folder: The picture is written here, as <image id>-<name>.jpg.

    Returns:
        The file.

    Raises:
        ImageError: The image cannot be read.
        AnnotationError: It has another size than the annotations say.
    """
    image = read_picture(annotations, images, index)
    mine = slice(*annotations.offsets[index : index + 2].tolist())
    height, width = annotations.sizes[index].tolist()
    targets = picture_targets(
        annotations.boxes[mine], annotations.labels[mine], (height, width), conventions
    )
    name = PurePath(os.fsdecode(annotations.file_names[index]))
    path = folder / f"{annotations.image_ids[index]}-{name.stem}.jpg"
    plot_targets(image, targets, path, annotations.class_names, name.name)
    return path


def _pixels(image: Picture, size: tuple[int, int]) -> NDArray[np.float32]:
    """[H, W, 3] in 0..1; never more pixels than the resized picture has."""
    picture = to_pil(image)
    height, width = size
    if picture.width * picture.height > width * height:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _overview(axes: Axes, pixels: NDArray[np.float32], targets: PictureTargets) -> None:
    """All boxes with their numbers; dashed if no location learns them."""
    show(axes, pixels, targets.size, "the boxes")
    learned = targets.positives().sum(axis=1) > 0
    for index in largest_first(targets):
        box = targets.boxes[index]
        color = rgb(index)
        line = "-" if learned[index] else (0, (4, 2))
        outline(axes, box, edgecolor=color, linewidth=2.2, linestyle=line)
        axes.text(
            float(box[0]) + 2,
            float(box[1]) + 2,
            f"{index + 1}",
            fontsize=8,
            va="top",
            color=rgb_of(text_color(class_color(index))),
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2},
            clip_on=True,
        )


def _table(axes: Axes, targets: PictureTargets, names: Sequence[str]) -> None:
    """Each box, its class and size, and how many locations of each level learn it."""
    axes.set(xlim=(0, 1), ylim=(_MOST_LISTED + 1.5, -0.5))
    axes.set_axis_off()
    axes.set_title("locations that learn each box", loc="left", fontsize=11, color=INK)
    levels = [level.name for level in targets.levels]
    columns = np.linspace(0.56, 0.97, len(levels) + 1)
    for x, name in zip(columns, [*levels, "all"], strict=True):
        axes.text(x, 0, name, ha="right", fontsize=10, color="#606060")
    axes.text(0.44, 0, "pixels", ha="right", fontsize=10, color="#606060")
    positives = targets.positives()
    listed = largest_first(targets)[:_MOST_LISTED]
    for row, index in enumerate(listed, start=1):
        label = int(targets.labels[index])
        name = names[label] if 0 <= label < len(names) else f"class {label}"
        x0, y0, x1, y1 = targets.boxes[index].tolist()
        axes.add_patch(Rectangle((0, row - 0.55), 0.035, 0.75, color=rgb(index)))
        axes.text(0.045, row, f"{index + 1}  {name[:26]}", fontsize=10, color=INK, parse_math=False)
        axes.text(0.44, row, f"{x1 - x0:.0f} x {y1 - y0:.0f}", ha="right", fontsize=10, color=INK)
        counts = positives[index].tolist()
        for x, count in zip(columns, [*counts, sum(counts)], strict=True):
            lost = not sum(counts)
            color = "#d02020" if lost else INK if count else "#b0b0b0"
            weight = "bold" if lost or x == columns[-1] else "normal"
            axes.text(x, row, f"{count:,}", ha="right", fontsize=10, color=color, weight=weight)
    more = len(targets.boxes) - len(listed)
    if more:
        axes.text(0.045, len(listed) + 1, f"and {more:,} smaller", fontsize=10, color="#606060")
