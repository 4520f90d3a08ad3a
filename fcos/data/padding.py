"""The common size that the images of a batch are padded to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fcos.config import DataConfig

#: The coarsest of the levels P3 to P5, each of which is to double the next one's size exactly.
SIZE_DIVISOR = 32
_LENGTHS = 4

Shape = tuple[int, int]
Padding = Literal["multiple", "beyond"]


def pad_images(
    images: Sequence[Tensor], shapes: Sequence[Shape] = (), padding: Padding = "multiple"
) -> tuple[Tensor, Tensor]:
    """Puts images of different sizes into one tensor.

    Args:
        images (sequence of Tensor[3, H_i, W_i]): At least one.
        shapes: (height, width) that the result may have: it gets the smallest that holds every
            image. Where none does, and by default, it is as large as the images need.
        padding: And that is by this rule; see ``DataConfig``.

    Returns:
        (Tensor[N, 3, H, W], Tensor[N, 2]): The images, zero at the right and the bottom, and
        the int64 (height, width) of each, on the CPU.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("pad_images: images must hold at least one image, got none")
    sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64)
    largest = int(sizes[:, 0].max()), int(sizes[:, 1].max())
    height, width = padded_size(largest, shapes, padding)
    padded = _empty((len(images), images[0].shape[0], height, width), images[0])
    for slot, image in zip(padded, images, strict=True):
        rows, columns = image.shape[-2:]
        slot[:, :rows, :columns] = image
        slot[:, :rows, columns:] = 0
        slot[:, rows:] = 0
    return padded, sizes


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """In a loader's worker, in memory shared with training: else sending it would copy it."""
    if get_worker_info() is None:
        return like.new_empty(shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * like.itemsize)
    return like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]


def padded_size(size: Shape, shapes: Sequence[Shape] = (), padding: Padding = "multiple") -> Shape:
    """The smallest of the shapes that holds ``size``, or else its next multiples of 32."""
    fitting = [shape for shape in shapes if shape[0] >= size[0] and shape[1] >= size[1]]
    if fitting:
        return min(fitting, key=lambda shape: shape[0] * shape[1])
    return _round_up(size[0], padding), _round_up(size[1], padding)


def fixed_shapes(data: DataConfig) -> tuple[Shape, ...]:
    """A few shapes, one of which holds any batch of images resized by these settings.

    ``data.image_shapes``, if there are any. Otherwise the shorter side at its largest, with the
    longer side in four equal steps up to its largest, upright and wide; and the square that holds
    both kinds together. For 800 and 1333 pixels these are 800 x 960, 1088, 1216 and 1344, their
    upright forms and 1344 x 1344; pictures of 4:3 and of 3:2 fill theirs to 98 %. Where
    ``data.padding`` is "beyond", they are larger accordingly: 832 x 960 and so on.
    """
    if data.image_shapes:
        return data.image_shapes
    longest = _round_up(data.max_size, data.padding)
    shorter = min(_round_up(max(data.min_sizes), data.padding), longest)
    steps = range(1, _LENGTHS + 1)
    lengths = [
        _round_up(shorter + (longest - shorter) * step // _LENGTHS, "multiple") for step in steps
    ]
    wide = [(shorter, length) for length in lengths]
    upright = [(length, shorter) for length in lengths]
    return tuple(dict.fromkeys([*wide, *upright, (longest, longest)]))


def _round_up(pixels: int, padding: Padding) -> int:
    return -(-(pixels + (padding == "beyond")) // SIZE_DIVISOR) * SIZE_DIVISOR
