"""Boxes, class names and scores drawn on pictures, and pictures arranged in a grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fcos.colors import BLACK, WHITE, Color, class_color, text_color

if TYPE_CHECKING:
    from fcos.data.batches import Batch

Picture = Image.Image | np.ndarray | Tensor


def to_pil(image: Picture) -> Image.Image:
    """A new RGB picture from a PIL image, a uint8 ndarray [H, W, 3] or a uint8 tensor [3, H, W].

    Raises:
        TypeError: It is none of these.
        ValueError: Its shape or type of number is another one.
    """
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":  # Pillow would clip them at 255
            raise ValueError(f"image: must have 8 bits a channel, got a PIL image of {image.mode}")
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                "image: a tensor must be uint8 [3, H, W] in RGB, "
                f"got {image.dtype} {list(image.shape)}"
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"image: must be a PIL image, an ndarray or a tensor, got {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image: an array must be uint8 [H, W, 3] in RGB, got {image.dtype} {list(image.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def unnormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The picture that a normalised image shows.

    Args:
        image (Tensor[3, H, W]): float, ``(rgb - mean) / std`` with rgb in 0..1.
        mean: Of the three channels.
        std: Of the three channels.

    Returns:
        Tensor[3, H, W]: uint8.
    """
    scale = image.new_tensor(std, dtype=torch.float32).view(3, 1, 1)
    shift = image.new_tensor(mean, dtype=torch.float32).view(3, 1, 1)
    return (image.float() * scale + shift).mul(255).round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=32)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)  # shipped inside Pillow: no file of the system is needed


def draw_boxes(
    image: Picture,
    boxes: Tensor,
    labels: Tensor | None = None,
    scores: Tensor | None = None,
    names: Sequence[str] = (),
    *,
    line_width: int | None = None,
    font_size: int | None = None,
    captions: bool = True,
) -> Image.Image:
    """Draw boxes in the colours of their classes, with class names and scores.

    The best-scored box is drawn last and therefore on top. Boxes may reach over the picture's edge;
    those with a side that is not finite are left out.

    Args:
        image: PIL, uint8 ndarray [H, W, 3] or uint8 tensor [3, H, W]; it is not changed.
        boxes (Tensor[K, 4]): left, top, right, bottom in pixels.
        labels (Tensor[K]): int64; None: all of class 0.
        scores (Tensor[K]): written after the name; None: not written.
        names: Class names; a label without one is written as a number.
        line_width: In pixels; None: from the size of the picture.
        font_size: In pixels; None: from the size of the picture.
        captions: Whether to write names and scores at all.

    Returns:
        A new RGB picture of the same size.
    """
    picture = to_pil(image)
    line = line_width or max(1, round((picture.width + picture.height) / 500))
    font = _font(font_size or max(9, round((picture.width + picture.height) / 85)))
    draw = ImageDraw.Draw(picture)
    rows = _rows(boxes, labels, scores)
    for box, label, _ in rows:
        draw.rectangle(_outline(box, picture.size), outline=class_color(label), width=line)
    # captions after all the outlines, so that no line runs through a text
    for box, label, score in rows if captions and (names or scores is not None) else ():
        name = names[label] if 0 <= label < len(names) else str(label)
        name = " ".join(name.split())  # a line break would be an error
        text = name if score is None else f"{name} {score:.2f}"
        _caption(draw, picture.size, _outline(box, picture.size), text, class_color(label), font)
    return picture


def draw_truth(
    image: Picture, boxes: Tensor, labels: Tensor | None = None, *, line_width: int | None = None
) -> Image.Image:
    """Draw ground truth: thin dashed boxes, white dashes between dashes of the class colour.

    To compare, draw the truth first and the detections over it: their captions stay readable.

    Args:
        image: PIL, uint8 ndarray [H, W, 3] or uint8 tensor [3, H, W]; it is not changed.
        boxes (Tensor[K, 4]): left, top, right, bottom in pixels.
        labels (Tensor[K]): int64; None: black takes the place of the class colour.
        line_width: In pixels; None: from the size of the picture.

    Returns:
        A new RGB picture of the same size.
    """
    picture = to_pil(image)
    line = line_width or max(1, round((picture.width + picture.height) / 900))
    draw = ImageDraw.Draw(picture)
    for box, label, _ in _rows(boxes, labels, None):
        left, top, right, bottom = _outline(box, picture.size)
        color = BLACK if labels is None else class_color(label)
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
        dash = 4 * line
        for x in range(left, right + 1, 2 * dash):
            end = min(x + dash - 1, right)
            draw.rectangle((x, top, end, min(top + line - 1, bottom)), fill=WHITE)
            draw.rectangle((x, max(bottom - line + 1, top), end, bottom), fill=WHITE)
        for y in range(top, bottom + 1, 2 * dash):
            end = min(y + dash - 1, bottom)
            draw.rectangle((left, y, min(left + line - 1, right), end), fill=WHITE)
            draw.rectangle((max(right - line + 1, left), y, right, end), fill=WHITE)
    return picture


def _rows(
    boxes: Tensor, labels: Tensor | None, scores: Tensor | None
) -> list[tuple[list[float], int, float | None]]:
    """Boxes in drawing order: worst score first."""
    count = len(boxes)
    label_list = [0] * count if labels is None else [int(label) for label in labels.tolist()]
    score_list: list[float | None] = [None] * count if scores is None else scores.tolist()
    rows = list(zip(boxes.tolist(), label_list, score_list, strict=True))
    rows = [row for row in rows if all(math.isfinite(side) for side in row[0])]
    return sorted(rows, key=lambda row: row[2] or 0.0)


def _outline(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of a box, moved into the picture."""
    width, height = size
    # A box covers pixels round(left) .. round(right) - 1: edges lie between pixels, lines on them.
    left = min(max(round(box[0]), 0), width - 1)
    top = min(max(round(box[1]), 0), height - 1)
    right = min(max(round(box[2]) - 1, left), width - 1)
    bottom = min(max(round(box[3]) - 1, top), height - 1)
    return left, top, right, bottom


def _caption(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    outline: tuple[int, int, int, int],
    text: str,
    color: Color,
    font: Any,
) -> None:
    """Write above the box, or inside it where there is no room above; never off the picture."""
    ascent, descent = font.getmetrics()
    pad = max(1, round(ascent / 6))
    width = math.ceil(draw.textlength(text, font=font)) + 2 * pad
    height = ascent + descent + pad
    left = max(0, min(outline[0], size[0] - width))
    top = outline[1] - height if outline[1] >= height else outline[1]
    top = max(0, min(top, size[1] - height))
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
    draw.text((left + pad, top + pad / 2), text, fill=text_color(color), font=font)


def mosaic(
    images: Sequence[Picture],
    columns: int | None = None,
    cell: tuple[int, int] | None = None,
    *,
    gap: int = 4,
    background: Color = (32, 32, 32),
) -> Image.Image:
    """Arrange pictures in a grid, each made to fit its cell and centred in it.

    Args:
        images: The pictures, row by row.
        columns: None: about as many as rows.
        cell: Height and width of a cell in pixels; None: of the largest picture.
        gap: Pixels between cells.
        background: RGB of what no picture covers.

    Raises:
        ValueError: There is no picture, or columns or cell is not positive.
    """
    if not images:
        raise ValueError("mosaic: images must not be empty")
    pictures = [to_pil(image) for image in images]
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    height, width = cell or (max(p.height for p in pictures), max(p.width for p in pictures))
    if columns < 1 or height < 1 or width < 1:
        raise ValueError(
            f"mosaic: columns and cell must be positive, got {columns} and {height} x {width}"
        )
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, background)
    for i, picture in enumerate(pictures):
        factor = min(width / picture.width, height / picture.height)
        fitted = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        if fitted != picture.size:
            picture = picture.resize(fitted, Image.Resampling.LANCZOS)
        x = (i % columns) * (width + gap) + (width - fitted[0]) // 2
        y = (i // columns) * (height + gap) + (height - fitted[1]) // 2
        sheet.paste(picture, (x, y))
    return sheet


def draw_batch(
    batch: Batch,
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    limit: int = 16,
    cell: tuple[int, int] | None = None,
) -> Image.Image:
    """A training batch as the network sees it, without the padding, with its boxes.

    Args:
        batch: Images and ground truth.
        names: Class names.
        mean: Of the normalisation, to undo it.
        std: Of the normalisation, to undo it.
        limit: Most images shown.
        cell: Height and width of each image on the sheet in pixels; None: of the largest.
    """
    pictures = []
    for i in range(min(limit, len(batch.images))):
        height, width = batch.image_sizes[i].tolist()
        image = unnormalize(batch.images[i, :, :height, :width], mean, std)
        count = int(batch.counts[i])
        boxes, labels = batch.boxes[i, :count], batch.labels[i, :count]
        pictures.append(draw_boxes(image, boxes, labels, names=names))
    return mosaic(pictures, cell=cell)
