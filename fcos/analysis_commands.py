"""``fcos analyze``: what can be learned of a data set, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from .analysis_options import ConventionOptions
from .config import ConfigError

# Torch takes over a second to import, so that each command imports it for itself.
if TYPE_CHECKING:
    from .conventions import Conventions
    from .data.annotations import Annotations


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

    from .analysis_rows import to_dict
    from .analysis_table import analysis_table
    from .analyze import analyze

    analysis = analyze(_read(options, conventions), conventions)
    text = json.dumps(to_dict(analysis), indent=2, ensure_ascii=False)
    if options.json:
        print(text)
    else:
        Console().print(analysis_table(analysis, options.listed))
    if options.output is not None:
        from .analysis_plot import plot_analysis

        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "analysis.json").write_text(text + "\n", encoding="utf-8")
        plot_analysis(analysis, options.output / "analysis.png")
        if not options.json:
            print(f"written to {options.output}")
    return 0


def _read(options: ConventionOptions, conventions: Conventions) -> Annotations:
    from .data.annotations import read_annotations
    from .data.coco import image_folder

    images = options.images if options.images is not None else image_folder(options.data)
    return read_annotations(options.data, images, check_images=False, keep_crowd=conventions.crowd)
