"""The plots of docs/benchmarks.md. Each names, in its own file, the results it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from . import drawings
from .figures import Figures
from .harness import RESULTS

_KEY = "results"


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


_DOCS = RESULTS.parents[1] / "docs"
PICTURES = (
    Picture(
        _DOCS / "benchmarks-goals.png",
        "Times our time, and the goal as a stroke; two threads, float32",
        (9, 9),
        drawings.goals,
    ),
    Picture(
        _DOCS / "benchmarks-assignment.png",
        "Target assignment for 2 images of 22,400 locations: time and memory against boxes",
        (9, 3.6),
        drawings.assignment,
    ),
    Picture(
        _DOCS / "benchmarks-roofline.png",
        "How near each comes to the speed of memory",
        (9, 7),
        drawings.roofline,
    ),
    Picture(
        _DOCS / "benchmarks-steps.png",
        "Whole training steps and inference, ResNet-50",
        (9, 3),
        drawings.steps,
    ),
    Picture(
        _DOCS / "benchmarks-memory.png",
        "Memory against classes, two images of 640 x 640, gradients included",
        (9, 3.6),
        drawings.memory,
    ),
    Picture(
        _DOCS / "benchmarks-growth.png",
        "Time against images (of 640 x 640, 80 classes) and classes (of two such images)",
        (11, 3.6),
        drawings.growth,
    ),
    Picture(
        _DOCS / "benchmarks-nms.png",
        "NMS against the number of boxes and of images",
        (10, 3.8),
        drawings.nms,
    ),
)
