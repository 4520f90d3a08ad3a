"""A generated detection data set: coloured shapes, in COCO format, ready in seconds.

    python -m fcos.data.shapes --output data/shapes --train 600 --val 120 --seed 0

writes train.json, val.json and images/train-00000.png and so on. Six classes, from 16 pixels to
nearly the whole picture, partly covering each other; one picture in twenty holds none. The same
seed gives the same pictures, and a larger set begins with the pictures of a smaller one.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcos.data.scenes import CLASS_NAMES, Scene, draw_scene

_VERSION = 1  # of the drawing: raise it when the same seed gives other pictures


class ShapesError(ValueError):
    """The data set cannot be written: the output holds something else, or the disk is full."""


def generate_shapes(
    folder: Path,
    *,
    split: str = "train",
    images: int = 600,
    seed: int = 0,
    size: tuple[int, int] = (320, 320),
) -> Path:
    """Writes one split: <folder>/<split>.json and <folder>/images/<split>-00000.png and so on.

    A complete split of the same settings is kept as it is. The JSON is written last: without it
    a split is incomplete, and its pictures are written anew.

    Args:
        folder (Path): Made if missing.
        split (str): Name of the split; each has pictures of its own.
        images (int): Number of pictures.
        seed (int): Not negative.
        size (tuple): Largest (height, width) in pixels, each at least 64.

    Returns:
        Path: The JSON.

    Raises:
        ShapesError: An argument is out of its range, the folder holds a JSON of this name that
            is not this set, or it cannot be written to.
    """
    _check(split, images, seed, size)
    settings = {"generator": "fcos.data.shapes", "version": _VERSION, "split": split}
    settings |= {"images": images, "seed": seed, "size": list(size)}
    target = folder / f"{split}.json"
    names = [f"{split}-{number:05d}.png" for number in range(images)]
    if _complete(target, settings, [folder / "images" / name for name in names]):
        print(f"{target}: {images:,} pictures are there already")
        return target

    document: dict[str, Any] = {
        "info": settings,
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)],
    }
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # only ours gets here; until the end the split is partial
        for number, name in enumerate(names):
            # Streams that share a seed but not the split and the number are independent.
            key = (*split.encode(), number)
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            scene = draw_scene(random, size)
            _write(folder / "images" / name, _png(scene))
            _describe(document, scene, number + 1, name)
        _write(target, json.dumps(document).encode())
    except OSError as error:
        raise ShapesError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}"
        ) from error
    print(f"{target}: {images:,} pictures, {len(document['annotations']):,} boxes")
    return target


def _check(split: str, images: int, seed: int, size: tuple[int, int]) -> None:
    if not split.isidentifier():
        raise ShapesError(f"split must be a plain name, got {split!r}")
    if images < 1:
        raise ShapesError(f"images must be at least 1, got {images}")
    if seed < 0:
        raise ShapesError(f"seed must not be negative, got {seed}")
    if min(size) < 64:
        raise ShapesError(f"size must be at least 64 x 64 (height x width), got {size}")


def _complete(target: Path, settings: dict[str, Any], pictures: Sequence[Path]) -> bool:
    """Whether the split is there; an error if there is another one in its place."""
    if not target.exists():
        return False
    try:
        found = json.loads(target.read_text())["info"]
        generator = found["generator"]
    except (OSError, ValueError, LookupError, TypeError):
        found, generator = {}, None
    if generator != settings["generator"]:
        raise ShapesError(f"{target}: exists and was not generated; choose another folder")
    other = [f"{key} {found.get(key)}" for key in settings if found.get(key) != settings[key]]
    if other:
        raise ShapesError(
            f"{target}: holds another generated set ({', '.join(other)}); "
            "delete it or choose another folder"
        )
    return all(picture.is_file() for picture in pictures)


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene.pixels).save(file, "PNG", compress_level=1)  # more costs time, not size
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    """All of the file or nothing of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _describe(document: dict[str, Any], scene: Scene, number: int, name: str) -> None:
    height, width = scene.pixels.shape[:2]
    document["images"].append({"id": number, "file_name": name, "height": height, "width": width})
    for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels, strict=True):
        annotation = {
            "id": len(document["annotations"]) + 1,
            "image_id": number,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        document["annotations"].append(annotation)


@dataclass(frozen=True)
class Arguments:
    """Generates a small detection data set of coloured shapes, in COCO format."""

    output: Path
    """Folder for train.json, val.json and images/."""
    train: int = 600
    """Training pictures."""
    val: int = 120
    """Validation pictures, drawn independently of the training pictures."""
    seed: int = 0
    """The same seed gives the same pictures."""
    height: int = 320
    """Largest height in pixels."""
    width: int = 320
    """Largest width in pixels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    import tyro

    options = tyro.cli(Arguments, args=arguments, prog="python -m fcos.data.shapes")
    try:
        for split, images in (("train", options.train), ("val", options.val)):
            size = (options.height, options.width)
            generate_shapes(
                options.output, split=split, images=images, seed=options.seed, size=size
            )
    except ShapesError as error:
        raise SystemExit(f"error: {error}") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
