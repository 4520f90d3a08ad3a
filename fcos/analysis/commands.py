"""``fcos analyze`` and ``fcos targets``: what can be learned, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ..config import ConfigError
from .options import ConventionOptions

# Torch takes over a second to import, so that each command imports it for itself.
if TYPE_CHECKING:
    from ..data.annotations import Annotations
    from .conventions import Conventions


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(ConventionOptions):
    """Best possible recall, ambiguous positives and boxes that cannot be learned; no pictures
    needed, unless the JSON lacks their sizes."""

    output: Path | None = None
    """Folder for analysis.json, with every box that cannot be learned, and analysis.png. None: only
    the table."""
    listed: int = 10
    """Most boxes that the table lists."""
    json: bool = False
    """Print what analysis.json holds instead of the table."""


def analyze(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = tyro.cli(AnalyzeOptions, prog="fcos analyze", args=arguments)
    if options.listed < 0:
        raise ConfigError(f"--listed must be >= 0, got {options.listed}")
    conventions = options.resolve()
    import json

    from rich.console import Console
    from rich.progress import Progress

    from .analyze import analyze
    from .rows import to_dict
    from .table import analysis_table

    annotations = _read(options, conventions)
    errors = Console(stderr=True)  # the bar is for people who wait, not for files and pipes
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("pictures", total=len(annotations.image_ids))
        analysis = analyze(annotations, conventions, lambda done: bar.update(task, completed=done))
    text = json.dumps(to_dict(analysis), indent=2, ensure_ascii=False)
    if options.json:
        print(text)
    else:
        Console().print(analysis_table(analysis, options.listed))
    if options.output is not None:
        from .plot import plot_analysis

        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "analysis.json").write_text(text + "\n", encoding="utf-8")
        plot_analysis(analysis, options.output / "analysis.png")
        if not options.json:
            print(f"written to {options.output}")
    return 0


@dataclass(frozen=True, kw_only=True)
class TargetsOptions(ConventionOptions):
    """Pictures of what the locations of each level learn: positives, centerness, distances."""

    image_ids: tuple[int, ...] = ()
    """Ids of the images to draw, as the JSON has them. None: the first that have boxes."""
    first: int = 4
    """How many are drawn if no ids are given."""
    output: Path = Path("targets")
    """Folder for the pictures, ID-NAME.jpg."""


def targets(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = tyro.cli(TargetsOptions, prog="fcos targets", args=arguments)
    if options.first < 1:
        raise ConfigError(f"--first must be >= 1, got {options.first}")
    conventions = options.resolve()
    from .pictures import draw_targets

    annotations = _read(options, conventions)
    options.output.mkdir(parents=True, exist_ok=True)
    for index in _chosen(options, annotations):
        path = draw_targets(annotations, _images(options), index, conventions, options.output)
        print(path)
    return 0


def _chosen(options: TargetsOptions, annotations: Annotations) -> list[int]:
    """Positions of the images to draw."""
    if not options.image_ids:
        counts = (annotations.offsets[1:] - annotations.offsets[:-1]).tolist()
        with_boxes = [index for index, count in enumerate(counts) if count]
        if not with_boxes:
            raise ConfigError(f"{options.data}: no image has a box; name images by --image-ids")
        return with_boxes[: options.first]
    positions = {number: index for index, number in enumerate(annotations.image_ids.tolist())}
    for number in options.image_ids:
        if number not in positions:
            raise ConfigError(f"{options.data}: --image-ids: there is no image {number}")
    return [positions[number] for number in dict.fromkeys(options.image_ids)]


def _images(options: ConventionOptions) -> Path:
    from ..data.coco import image_folder

    return options.images if options.images is not None else image_folder(options.data)


def _read(options: ConventionOptions, conventions: Conventions) -> Annotations:
    from ..data.annotations import read_annotations

    return read_annotations(
        options.data, _images(options), check_images=False, keep_crowd=conventions.crowd
    )
