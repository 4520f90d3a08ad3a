"""COCO annotations: read once, checked entry by entry, kept as flat arrays.

A wrong box or a wrong class in the JSON would train silently, so what is wrong is an error
that names the file, the entry and the rule. Python objects would cost gigabytes in forked
loader workers (reference counts copy every page); flat arrays stay shared.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fcos.data.images import ImageError, image_size

_CLIP_TOLERANCE = 0.01  # pixels; the rounding of x + w in decimal JSON is not worth a report


class AnnotationError(ValueError):
    """A COCO JSON that breaks a rule; the message names the file, the entry and the rule."""


@dataclass(frozen=True)
class AnnotationReport:
    """What was read, and what was left out of it."""

    images: int
    """All images, with and without boxes."""
    images_without_boxes: int
    """Kept as images in which everything is background."""
    boxes: int
    """Boxes kept."""
    crowd: int
    """Crowd boxes, left out."""
    dropped: int
    """Boxes left out because no width or height is left inside the image."""
    clipped: int
    """Boxes kept that reached out of the image and were cut at its border."""

    def __str__(self) -> str:
        text = f"{self.images:,} images ({self.images_without_boxes:,} without boxes), "
        text += f"{self.boxes:,} boxes"
        for count, what in (
            (self.crowd, "crowd boxes left out"),
            (self.dropped, "empty boxes dropped"),
            (self.clipped, "boxes clipped to the image"),
        ):
            text += f", {count:,} {what}" if count else ""
        return text


@dataclass(frozen=True)
class Annotations:
    """A checked COCO JSON. Images are in the order of the file; M boxes, N images."""

    path: Path
    class_names: tuple[str, ...]
    """In ascending order of the category ids: the name of each label."""
    category_ids: tuple[int, ...]
    """The id in the JSON of each label."""
    image_ids: NDArray[np.int64]
    """[N]"""
    file_names: NDArray[np.bytes_]
    """[N], in the file system's encoding, relative to the image folder."""
    sizes: NDArray[np.int32]
    """[N, 2] (height, width) in pixels."""
    boxes: NDArray[np.float32]
    """[M, 4] xyxy pixels, inside the image, all of one image together."""
    labels: NDArray[np.int64]
    """[M]"""
    offsets: NDArray[np.int64]
    """[N + 1]: image i has boxes offsets[i] to offsets[i + 1]."""
    report: AnnotationReport


def read_annotations(
    path: Path, images: Path, check_images: bool = True, keep_crowd: bool = False
) -> Annotations:
    """Reads and checks a COCO JSON.

    Args:
        path (Path): The JSON.
        images (Path): The folder that its file names are relative to.
        check_images (bool): Whether every picture must exist.
        keep_crowd (bool): Whether crowd boxes are boxes like all others, instead of left out.

    Raises:
        AnnotationError: A rule is broken, or pictures are missing.
        ImageError: The JSON lacks an image's size and its picture cannot be read.
    """
    return _Reader(path, images, check_images, keep_crowd).read()


@dataclass(frozen=True)
class _Reader:
    path: Path
    images: Path
    check_images: bool
    keep_crowd: bool

    def fail(self, where: str, rule: str) -> NoReturn:
        raise AnnotationError(f"{self.path}: {where}: {rule}")

    def read(self) -> Annotations:
        document, literal = self.document()
        names, category_ids = self.categories(document)
        image_ids, file_names, sizes = self.image_entries(document)
        boxes, labels, owners, crowd = self.box_entries(document, image_ids, category_ids)
        if literal is not None:  # a box would have been named by now; it stands elsewhere
            self.fail(literal, "NaN and Infinity are not JSON")

        limits = sizes[owners][:, [1, 0, 1, 0]].astype(np.float64)
        inside = np.clip(boxes, 0, limits)
        kept = ((inside[:, 2:] > inside[:, :2]) & (boxes[:, 2:] > boxes[:, :2])).all(axis=1)
        # float32 may round two distinct edges to one
        inside32 = inside.astype(np.float32)
        kept &= (inside32[:, 2:] > inside32[:, :2]).all(axis=1)
        moved = (np.abs(inside - boxes) > _CLIP_TOLERANCE).any(axis=1)

        order = np.flatnonzero(kept)[np.argsort(owners[kept], kind="stable")]
        counts = np.bincount(owners[order], minlength=len(image_ids))
        return Annotations(
            path=self.path,
            class_names=names,
            category_ids=category_ids,
            image_ids=np.array(list(image_ids), dtype=np.int64),
            file_names=file_names,
            sizes=sizes,
            boxes=inside32[order],
            labels=labels[order],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            report=AnnotationReport(
                images=len(image_ids),
                images_without_boxes=int((counts == 0).sum()),
                boxes=len(order),
                crowd=crowd,
                dropped=int((~kept).sum()),
                clipped=int((moved & kept).sum()),
            ),
        )

    def document(self) -> tuple[dict[str, Any], str | None]:
        """The parsed JSON, and where the first NaN or Infinity literal stands, if one does."""
        if not self.path.is_file():
            raise AnnotationError(f"{self.path}: no such annotation file")
        found: list[str] = []

        def constant(literal: str) -> float:
            found.append(literal)
            return float(literal)

        try:
            text = self.path.read_bytes().decode("utf-8-sig")
            document = json.loads(text, parse_constant=constant)
        except json.JSONDecodeError as error:
            self.fail(f"line {error.lineno}, column {error.colno}", f"not JSON: {error.msg}")
        except (UnicodeDecodeError, RecursionError) as error:
            raise AnnotationError(f"{self.path}: not JSON in UTF-8: {error}") from error
        except OSError as error:
            raise AnnotationError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not isinstance(document, dict):
            self.fail(
                "top level",
                "must be an object with images, annotations and categories, got a "
                + ("list, as a file of detection results has" if document else "bare value"),
            )
        if not found:
            return document, None
        place = re.search(rf"(?<=[\[:,\s]){re.escape(found[0])}(?=[\],}}\s])", text)
        line = text.count("\n", 0, place.start()) + 1 if place else 1
        return document, f"line {line}"

    def entries(self, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
        if key not in document:
            self.fail("top level", f"key {key!r} is missing")
        entries = document[key]
        if not isinstance(entries, list):
            self.fail(key, f"must be a list, got {_short(entries)}")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.fail(f"{key}[{position}]", f"must be an object, got {_short(entry)}")
        return entries

    def integer(self, entry: dict[str, Any], key: str, where: str) -> int:
        if key not in entry:
            self.fail(where, f"field {key!r} is missing")
        value = entry[key]
        if type(value) is not int or abs(value) >= 2**63:
            self.fail(where, f"{key} must be a 64-bit integer, got {_short(value)}")
        return value

    def categories(self, document: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names: dict[int, str] = {}
        for position, entry in enumerate(self.entries(document, "categories")):
            number = self.integer(entry, "id", f"categories[{position}]")
            if number in names:
                self.fail(f"category {number}", "the id occurs twice; ids must be unique")
            name = entry.get("name")
            if not isinstance(name, str) or not name:
                self.fail(f"category {number}", f"name must be a text, got {_short(name)}")
            names[number] = name
        if not names:
            self.fail("categories", "the list is empty; at least one class is needed")
        ids = tuple(sorted(names))
        return tuple(names[number] for number in ids), ids

    def image_entries(
        self, document: dict[str, Any]
    ) -> tuple[dict[int, int], NDArray[np.bytes_], NDArray[np.int32]]:
        """Each image id's position, the file names, the sizes."""
        positions: dict[int, int] = {}
        names: list[str] = []
        entries = self.entries(document, "images")
        if not entries:
            self.fail("images", "the list is empty; at least one image is needed")
        for position, entry in enumerate(entries):
            number = self.integer(entry, "id", f"images[{position}]")
            if number in positions:
                self.fail(f"image {number}", "the id occurs twice; ids must be unique")
            positions[number] = position
            names.append(self.file_name(entry, f"image {number}"))
        if self.check_images:
            self.require_pictures(names)
        sizes = np.empty((len(names), 2), dtype=np.int32)
        for position, (number, entry) in enumerate(zip(positions, entries, strict=True)):
            sizes[position] = self.size(entry, f"image {number}", names[position])
        return positions, np.array([os.fsencode(name) for name in names]), sizes

    def file_name(self, entry: dict[str, Any], where: str) -> str:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            self.fail(where, f"file_name must be the name of a file, got {_short(name)}")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            self.fail(where, f"file_name is not a text the file system can hold: {name!r}")
        for kind in (PurePosixPath(name), PureWindowsPath(name)):
            if ".." in kind.parts or kind.anchor:
                self.fail(where, f"file_name must stay inside the image folder, got {name!r}")
        return name

    def require_pictures(self, names: list[str]) -> None:
        if not self.images.is_dir():
            raise AnnotationError(f"{self.images}: no such image folder (for {self.path})")
        listed: dict[Path, set[str]] = {}  # one listing a folder: far cheaper than a stat a file
        missing = []
        for name in names:
            file = self.images / name
            if file.parent not in listed:
                exists = file.parent.is_dir()
                listed[file.parent] = set(os.listdir(file.parent)) if exists else set()
            # The second look is for file systems that ignore case.
            if file.name not in listed[file.parent] and not file.is_file():
                missing.append(name)
        if missing:
            first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise AnnotationError(
                f"{self.path}: {len(missing):,} of {len(names):,} pictures are missing in "
                f"{self.images}: {first}"
            )

    def size(self, entry: dict[str, Any], where: str, name: str) -> tuple[int, int]:
        if entry.get("height") is None or entry.get("width") is None:
            try:
                return image_size(self.images / name)
            except ImageError as error:
                rule = f"height or width is missing and cannot be read from the file: {error}"
                raise ImageError(f"{self.path}: {where}: {rule}") from error
        for key in ("height", "width"):
            value = entry[key]
            if type(value) not in (int, float) or value != value // 1 or not 0 < value < 2**31:
                self.fail(where, f"{key} must be a positive whole number, got {_short(value)}")
        return int(entry["height"]), int(entry["width"])

    def box_entries(
        self, document: dict[str, Any], image_ids: dict[int, int], category_ids: tuple[int, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], int]:
        """Boxes as xyxy, labels, the position of each box's image; the number of crowd boxes."""
        label_of = {number: label for label, number in enumerate(category_ids)}
        seen: set[int] = set()
        boxes: list[list[float]] = []
        labels: list[int] = []
        owners: list[int] = []
        crowd = 0
        for position, entry in enumerate(self.entries(document, "annotations")):
            number = self.integer(entry, "id", f"annotations[{position}]")
            where = f"annotation {number}"
            if number in seen:
                self.fail(where, "the id occurs twice; ids must be unique")
            seen.add(number)
            image = self.integer(entry, "image_id", where)
            if image not in image_ids:
                self.fail(where, f"image_id {image} is not among the images")
            category = self.integer(entry, "category_id", where)
            if category not in label_of:
                self.fail(where, f"category_id {category} is not among the categories")
            box = self.bbox(entry, where)
            if entry.get("iscrowd", 0) not in (0, 1):
                self.fail(where, f"iscrowd must be 0 or 1, got {_short(entry['iscrowd'])}")
            if entry.get("iscrowd", 0) and not self.keep_crowd:
                crowd += 1
                continue
            boxes.append(box)
            labels.append(label_of[category])
            owners.append(image_ids[image])
        xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        with np.errstate(over="ignore"):  # a sum beyond the largest float is clipped soon after
            xyxy[:, 2:] += xyxy[:, :2]
        return xyxy, np.array(labels, dtype=np.int64), np.array(owners, dtype=np.int64), crowd

    def bbox(self, entry: dict[str, Any], where: str) -> list[float]:
        if "bbox" not in entry:
            self.fail(where, "field 'bbox' is missing")
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            self.fail(where, f"bbox must be four numbers [x, y, width, height], got {_short(box)}")
        for value in box:
            # The comparison is false for NaN, infinities and integers beyond any float.
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                self.fail(where, f"bbox must hold finite numbers, got {_short(box)}")
        return box


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
