"""A data set in COCO format: a JSON and a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcos.data.annotations import (
    AnnotationError,
    AnnotationReport,
    Annotations,
    read_annotations,
)
from fcos.data.batches import Sample
from fcos.data.images import exif_orientation, read_image
from fcos.data.sampling import SampleIndex

__all__ = [
    "AnnotationError",
    "AnnotationReport",
    "CocoDataset",
    "image_folder",
    "read_picture",
    "shared_image_files",
]

Transforms = Callable[[tv_tensors.Image, dict[str, Any]], tuple[Tensor, dict[str, Any]]]


class CocoDataset(Dataset[Sample]):
    """Images and boxes of one COCO JSON, checked when it is built.

    Categories may have any ids; in ascending order they become labels 0..C-1. Boxes become xyxy
    without a +1, clipped to the image. Crowd boxes are left out; an image without boxes is kept.

    Args:
        annotations (Path): The JSON.
        images (Path | None): Folder of the pictures. None: "images" beside the JSON, or the
            JSON's own folder.
        transforms (callable | None): Called with the image (tv_tensors.Image, uint8 [3, H, W])
            and a dict of "boxes" (tv_tensors.BoundingBoxes) and "labels", as transforms.v2 are.
            None: samples hold the uint8 picture.
        check_images (bool): False: build without pictures, to work with the annotations alone.

    Raises:
        AnnotationError: The JSON breaks a rule or pictures are missing. Also when an item is
            read whose picture has another size than the JSON says.
        ImageError: A picture cannot be read (when an item is read).
    """

    def __init__(
        self,
        annotations: Path,
        images: Path | None = None,
        transforms: Transforms | None = None,
        check_images: bool = True,
    ) -> None:
        self.annotations = Path(annotations)
        self.images = Path(images) if images is not None else image_folder(self.annotations)
        self.transforms = transforms
        self._data = read_annotations(self.annotations, self.images, check_images)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""
        return self._data.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category id in the JSON of each label."""
        return self._data.category_ids

    @property
    def report(self) -> AnnotationReport:
        """What was read and what was left out."""
        return self._data.report

    @property
    def image_ids(self) -> list[int]:
        """The id in the JSON of each image, in the order of the data set."""
        return self._data.image_ids.tolist()

    @property
    def aspect_ratios(self) -> NDArray[np.float64]:
        """[N] width / height of each image."""
        return self._data.sizes[:, 1] / self._data.sizes[:, 0]

    @property
    def max_boxes(self) -> int:
        """Boxes of the image that has the most."""
        return int(np.diff(self._data.offsets).max(initial=0))

    def path(self, index: int) -> Path:
        """The picture's file."""
        return self.images / os.fsdecode(self._data.file_names[index])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture in pixels, as the JSON has it."""
        height, width = self._data.sizes[index].tolist()
        return height, width

    def target(self, index: int) -> tuple[Tensor, Tensor]:
        """True boxes (Tensor[M, 4], xyxy pixels of the file) and labels (Tensor[M])."""
        first, last = self._data.offsets[index : index + 2]
        boxes = torch.from_numpy(self._data.boxes[first:last].copy())
        return boxes, torch.from_numpy(self._data.labels[first:last].copy())

    def __len__(self) -> int:
        return len(self._data.image_ids)

    def __getitem__(self, item: int | SampleIndex) -> Sample:
        """The sample; its augmentation depends on nothing but `item`.

        A plain int stands for ``SampleIndex(item, epoch=0, seed=0)``.
        """
        if not isinstance(item, SampleIndex):
            item = SampleIndex(int(item))
        index = item.position
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")

        image = read_picture(self._data, self.images, index)
        boxes, labels = self.target(index)
        size = self.size(index)
        if self.transforms is not None:
            target: dict[str, Any] = {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
                "labels": labels,
            }
            # The CPU generator alone: torch.manual_seed would reseed the GPU as well.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(item.random_seed())
                image, target = self.transforms(tv_tensors.Image(image), target)
            boxes, labels = target["boxes"], target["labels"]
        return Sample(
            image.as_subclass(Tensor),
            boxes.as_subclass(Tensor),
            labels,
            int(self._data.image_ids[index]),
            size,
        )


def read_picture(data: Annotations, images: Path, index: int) -> Tensor:
    """The picture of an image, uint8 [3, H, W], of the size that the JSON says.

    Args:
        data (Annotations): Of ``read_annotations``.
        images (Path): The folder that its file names are relative to.
        index (int): Of the image.

    Raises:
        AnnotationError: The picture has another size.
        ImageError: It cannot be read.
    """
    path = images / os.fsdecode(data.file_names[index])
    image = read_image(path)
    height, width = data.sizes[index].tolist()
    if image.shape[1:] == (height, width):
        return image
    got = f"{image.shape[2]}x{image.shape[1]}"
    reason = "the boxes would be wrong"
    if image.shape[1:] == (width, height) and exif_orientation(path) >= 5:
        reason = (
            "they are swapped because the file has an EXIF rotation, which is applied; "
            "annotate the upright picture, or remove the rotation from the file"
        )
    raise AnnotationError(
        f"{path}: the picture is {got} (width x height), but image "
        f"{data.image_ids[index]} in {data.path} is {width}x{height}: {reason}"
    )


def shared_image_files(a: CocoDataset, b: CocoDataset) -> int:
    """How many files two data sets share, e.g. of training and validation: it should be 0."""
    return len(_files(a) & _files(b))


def _files(data: CocoDataset) -> set[str]:
    folder = data.images.resolve()  # once: resolving every file would take minutes on COCO
    names = (data.path(index).relative_to(data.images) for index in range(len(data)))
    return {os.path.normpath(folder / name) for name in names}


def image_folder(annotations: Path) -> Path:
    """Where the pictures are unless one is told: "images" beside the JSON, or its own folder."""
    beside = annotations.parent / "images"
    return beside if beside.is_dir() else annotations.parent
