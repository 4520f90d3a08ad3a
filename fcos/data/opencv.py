"""Bilinear resizing of 8-bit pictures, the same to the bit as OpenCV's.

Samples lie at the centres of the new pixels, and each is made of the four old pixels around it: no
antialiasing, so that pictures that shrink have jagged edges. OpenCV rounds the weights to 11 bits
and computes in integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONE = 1 << 11  # a weight of 1


def resize_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``cv2.resize`` with ``INTER_LINEAR``.

    Args:
        image (Tensor[..., H, W]): uint8, on the CPU.
        size: (height, width) to resize to.

    Returns:
        Tensor[..., height, width]: uint8.

    Raises:
        ValueError: The image has another type or no pixels, or the size is not positive.
    """
    if image.dtype != torch.uint8 or image.ndim < 2 or not image.numel():
        raise ValueError(
            f"resize_bilinear: image must be uint8 [..., H, W] with pixels, got {image.dtype} "
            f"{list(image.shape)}"
        )
    if min(size) < 1:
        raise ValueError(f"resize_bilinear: size must be (height, width) >= 1, got {size}")
    left, right, left_weight, right_weight = _samples(image.shape[-1], size[1])
    above, below, above_weight, below_weight = _samples(image.shape[-2], size[0])

    # Rows first: pixels times 2^11, of which 7 bits are kept, and then 2 more than a pixel has.
    rows = image.index_select(-1, left).int().mul_(left_weight)
    rows.add_(image.index_select(-1, right).int().mul_(right_weight)).bitwise_right_shift_(4)
    result = rows.index_select(-2, above).mul_(above_weight[:, None]).bitwise_right_shift_(16)
    other = rows.index_select(-2, below).mul_(below_weight[:, None]).bitwise_right_shift_(16)
    return result.add_(other).add_(2).bitwise_right_shift_(2).to(torch.uint8)


def _samples(old: int, new: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the two pixels that each new one is between, and their weights, int32."""
    place = (torch.arange(new, dtype=torch.float64) + 0.5) * (1 / (new / old)) - 0.5
    place = place.float()
    first = place.floor()
    fraction = place - first
    before, after = (first.long() + i for i in range(2))  # beyond the border: its own pixels
    weights = (((1 - fraction) * _ONE).round(), (fraction * _ONE).round())  # halves to even
    return before.clamp(0, old - 1), after.clamp(0, old - 1), weights[0].int(), weights[1].int()
