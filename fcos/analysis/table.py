"""An analysis on the terminal."""

from __future__ import annotations

import math

from rich import box as lines
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .advice import advice, percent
from .analyze import Analysis
from .conventions import Conventions
from .rows import by_level, by_size, lost_boxes


def analysis_table(analysis: Analysis, listed: int = 10) -> Group:
    """The figures, the levels, the sizes, the boxes that cannot be learned, and advice.

    Args:
        analysis: Of ``analyze``.
        listed: Most boxes that are listed.
    """
    parts: list[RenderableType] = [
        Text(str(analysis.annotations.report)),
        Text(describe(analysis.conventions)),
        _summary(analysis),
    ]
    if analysis.boxes:
        parts += [_levels(analysis), _sizes(analysis)]
    lost = lost_boxes(analysis)
    if lost and listed > 0:
        parts.append(_lost(analysis, listed))
    sentences = Table.grid("", "", padding=(0, 1))
    for sentence in advice(analysis):
        sentences.add_row("-", Text(sentence))
    parts.append(sentences)
    return Group(*parts)


def describe(conventions: Conventions) -> str:
    """The conventions in a line."""
    if conventions.resize == "none":
        size = "pictures as they are"
    else:
        size = f"shorter side {conventions.min_size}, longer at most {conventions.max_size}"
        size += ", rounded down" if conventions.resize == "truncate" else ""
    radius = conventions.center_sampling_radius
    inside = f"center sampling within {radius:g} strides" if radius else "whole boxes positive"
    text = f"{size}; {inside}; size ranges {conventions.boundary.replace('_', '-')}"
    text += "; boxes end at their last pixel" if conventions.corners == "pixels" else ""
    return text + ("; crowd boxes kept" if conventions.crowd else "")


def _summary(analysis: Analysis) -> Table:
    table = Table(show_header=False, box=lines.SIMPLE)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("best possible recall", _exact(analysis.recall))
    table.add_row("ambiguous positives", _exact(analysis.ambiguous))
    table.add_row("of different classes", _exact(analysis.ambiguous_classes))
    return table


def _exact(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def _levels(analysis: Analysis) -> Table:
    table = Table("", title="by level", box=lines.SIMPLE_HEAD, pad_edge=False)
    for name in ("stride", "sizes", "boxes", "positives", "share", "ambiguous", "classes"):
        table.add_column(name, justify="right", no_wrap=True)
    total = max(1, int(analysis.level_positives.sum()))
    for row in by_level(analysis):
        low, high = row.size_range
        positives = max(1, row.positives)
        table.add_row(
            row.name,
            str(row.stride),
            f"from {low:g}" if math.isinf(high) else f"{low:g} to {high:g}",
            f"{row.boxes:,}",
            f"{row.positives:,}",
            percent(row.positives / total),
            percent(row.ambiguous / positives),
            percent(row.ambiguous_classes / positives),
        )
    return table


def _sizes(analysis: Analysis) -> Table:
    table = Table(
        "sqrt(w h)", title="by size in the resized picture", box=lines.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("boxes", "share", "recall", "positives", "share", "per box"):
        table.add_column(name, justify="right")
    total = max(1, int(analysis.level_positives.sum()))
    for row in by_size(analysis):
        table.add_row(
            row.name,
            f"{row.boxes:,}",
            percent(row.boxes / analysis.boxes),
            percent(row.learned / row.boxes) if row.boxes else "-",
            f"{row.positives:,}",
            percent(row.positives / total),
            f"{row.positives_per_box:g}",
        )
    return table


def _lost(analysis: Analysis, listed: int) -> Table:
    lost = lost_boxes(analysis)
    title = "boxes that no location learns"
    if len(lost) > listed:
        title += f": the largest {listed} of {len(lost):,}"
    table = Table(title=title, box=lines.SIMPLE_HEAD, pad_edge=False)
    for name in ("image", "class"):
        table.add_column(name, overflow="fold")
    for name in ("x, y, width, height", "resized"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for box in lost[:listed]:
        table.add_row(
            Text(box.file_name),
            Text(box.class_name),
            ", ".join(f"{side:g}" for side in box.bbox),
            f"{box.size[0]:.1f} x {box.size[1]:.1f}",
            box.reason + (", twin" if box.twin else ""),
        )
    return table
