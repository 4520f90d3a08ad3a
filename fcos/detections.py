"""What the detector found in one picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fcos.draw import Picture, draw_boxes

if TYPE_CHECKING:
    from PIL import Image

Index = int | slice | Tensor | Sequence[int] | Sequence[bool]


class Padded(Protocol):
    """Detections of a batch, filled up to a fixed number per image."""

    @property
    def boxes(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...


@dataclass(repr=False, eq=False)
class Detections:
    """The detections of one picture, best first.

    ``len(detections)`` counts them; an index, a slice, a list of indices or a mask selects some of
    them and gives ``Detections`` again; iterating gives one ``Detections`` of length 1 at a time.

    Args:
        boxes (Tensor[K, 4]): left, top, right, bottom in pixels of the picture.
        scores (Tensor[K]): in 0..1, descending.
        labels (Tensor[K]): int64, positions in ``names``.
        names: class names of the model, all of them.
        image_size: height and width of the picture.

    Raises:
        ValueError: The lengths differ, or a label has no name.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        height, width = self.image_size
        self.image_size = (int(height), int(width))
        count = self.scores.numel()
        shapes = (self.boxes.shape, self.scores.shape, self.labels.shape)
        if shapes != ((count, 4), (count,), (count,)):
            raise ValueError(
                "Detections: boxes must be [K, 4], scores and labels [K], got "
                + ", ".join(str(list(shape)) for shape in shapes)
            )
        if count and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.names):
            raise ValueError(
                f"Detections: labels must lie in 0..{len(self.names) - 1}, one per class name, "
                f"got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    @classmethod
    def from_padded(
        cls, padded: Padded, i: int, names: Sequence[str], image_size: tuple[int, int]
    ) -> Detections:
        """Detections of image ``i`` of a batch, on the CPU.

        Args:
            padded: boxes [N, D, 4], scores [N, D], labels [N, D] and counts [N], best first.
                With a GPU, move the whole batch to the CPU first: each field here waits for it.
            i: The image's place in the batch.
            names: Class names of the model.
            image_size: Height and width of the picture that the boxes refer to.
        """
        count = int(padded.counts[i])
        return cls(
            padded.boxes[i, :count].cpu(),
            padded.scores[i, :count].cpu(),
            padded.labels[i, :count].cpu(),
            tuple(names),
            image_size,
        )

    def __len__(self) -> int:
        return self.scores.numel()

    def __getitem__(self, index: Index) -> Detections:
        """Some of the detections.

        Raises:
            IndexError: There is no detection with that index.
        """
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Detections: index {index} of {len(self)} detections")
            index = slice(index % len(self), index % len(self) + 1)
        elif not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.scores.device)
            if index.ndim == 0:
                return self[int(index)]
            if index.numel() == 0 and index.dtype != torch.bool:
                index = index.long()  # an empty list becomes a float tensor, which cannot index
        return Detections(
            self.boxes[index], self.scores[index], self.labels[index], self.names, self.image_size
        )

    def __iter__(self) -> Iterator[Detections]:
        return (self[i] for i in range(len(self)))

    @property
    def class_names(self) -> list[str]:
        """The class name of each detection."""
        return [self.names[label] for label in self.labels.tolist()]

    def filter(
        self,
        score_threshold: float = 0.0,
        classes: str | int | Collection[str | int] | None = None,
    ) -> Detections:
        """The detections of some classes that score at least a threshold.

        Args:
            score_threshold: Lowest score that is kept.
            classes: Names or labels of the classes to keep, or one of them; None: all classes.

        Raises:
            ValueError: A class is not one of the model's.
        """
        keep = self.scores >= score_threshold
        if classes is not None:
            # a str is a collection too: "cat" would be the classes "c", "a" and "t"
            several = [classes] if isinstance(classes, (str, int)) else classes
            wanted = self.labels.new_tensor([self._label(name) for name in several])
            keep = keep & torch.isin(self.labels, wanted)
        return self[keep]

    def _label(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.names:
            return self.names.index(name)
        if isinstance(name, int) and 0 <= name < len(self.names):
            return name
        raise ValueError(
            f"filter: class {name!r} is not one of the model's: {', '.join(self.names)}"
        )

    def plot(
        self,
        image: Picture,
        path: str | Path | None = None,
        *,
        line_width: int | None = None,
        font_size: int | None = None,
    ) -> Image.Image:
        """Draw the detections on their picture.

        Args:
            image: The picture itself: PIL, uint8 ndarray [H, W, 3] or uint8 tensor [3, H, W].
            path: Where to save the drawing as well.
            line_width: Of the boxes, in pixels; None: from the size of the picture.
            font_size: Of the class names, in pixels; None: from the size of the picture.

        Returns:
            A new picture of the same size.

        Raises:
            ValueError: The picture's size is not the one that the boxes refer to.
        """
        drawing = draw_boxes(
            image,
            self.boxes,
            self.labels,
            self.scores,
            self.names,
            line_width=line_width,
            font_size=font_size,
        )
        if (drawing.height, drawing.width) != self.image_size:
            raise ValueError(
                f"plot: image must be {self.image_size[0]} x {self.image_size[1]} (height x width) "
                f"as the detections are, got {drawing.height} x {drawing.width}"
            )
        if path is not None:
            drawing.save(path, quality=92)
        return drawing

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """As entries of a COCO results file, unrounded.

        Args:
            image_id: The picture's id in the annotation file.
            category_ids: Id of each class in the annotation file; None: label + 1.

        Raises:
            ValueError: There are not as many ids as classes.
        """
        if category_ids is None:
            category_ids = range(1, len(self.names) + 1)
        if len(category_ids) != len(self.names):
            raise ValueError(
                f"to_coco: category_ids must have one id per class ({len(self.names)}), "
                f"got {len(category_ids)}"
            )
        boxes = self.boxes.double()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        return [
            {
                "image_id": image_id,
                "category_id": int(category_ids[label]),
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(
                xywh.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON.

        Returns:
            ``{"image_size": [height, width], "detections": [{"name", "label", "score", "box"}]}``
            with boxes as left, top, right, bottom, rounded to 0.001 pixels, and scores to 1e-6.
        """
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return {
            "image_size": list(self.image_size),
            "detections": [
                {
                    "name": self.names[label],
                    "label": label,
                    "score": round(score, 6),
                    "box": [round(side, 3) for side in box],
                }
                for box, score, label in rows
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as a JSON file."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def summary(self) -> str:
        """How many of what, such as "3 detections: 2 cat, 1 dog"."""
        counts = Counter(self.class_names).most_common()
        what = ", ".join(f"{count} {name}" for name, count in counts)
        return f"{len(self)} detection{'' if len(self) == 1 else 's'}{': ' if what else ''}{what}"

    def __repr__(self) -> str:
        return f"<{self.summary()}>"
