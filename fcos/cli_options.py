"""Options of ``fcos eval``, ``predict`` and ``env``. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How a trained network runs."""

    device: str = "auto"
    """"auto", or as torch names it."""
    amp: Literal["none", "bf16"] = "none"
    """bf16: run the network under bfloat16 autocast."""
    compile: bool = False
    """torch.compile it, which takes minutes at first: for many images."""
    graph: bool = False
    """Record it as a CUDA graph for each of a few shapes that images are padded to."""


@dataclass(frozen=True)
class EvalOptions(InferenceOptions):
    """Measure a checkpoint on annotated images: COCO's 12 numbers and a table by class."""

    checkpoint: tyro.conf.Positional[Path]
    """File that fcos train wrote, such as runs/NAME/best.pt."""
    annotations: Path | None = None
    """COCO JSON. None: the validation annotations of the training run."""
    images: Path | None = None
    """Folder of the images. None: "images" beside the JSON, or the JSON's own folder."""
    output: Path | None = None
    """Folder for evaluation.json, detections.json and pictures. None: only the table."""
    batch_size: int = 8
    """Images at a time."""


@dataclass(frozen=True)
class PredictOptions(InferenceOptions):
    """Draw detections on images and videos, and write them to a JSON file."""

    checkpoint: tyro.conf.Positional[Path]
    """File that fcos train wrote, such as runs/NAME/best.pt."""
    sources: tyro.conf.Positional[tuple[str, ...]]
    """Images, videos, folders, or patterns in quotes such as "shots/*.jpg"."""
    output: Path = Path("predictions")
    """Folder for the drawn copies and detections.json."""
    score_threshold: float = 0.5
    """Detections with a lower score are left out."""
    batch_size: int = 4
    """Images at a time."""


@dataclass(frozen=True)
class EnvOptions:
    """Show what is installed, what is missing and why."""

    json: bool = False
    """As JSON, for a bug report or a program."""
