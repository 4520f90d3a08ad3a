"""How pictures and boxes are presented to the network.

Training, evaluation and prediction share the resizing and the normalisation below; boxes follow
by the true ratio of the integer sizes, so nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcos.config import DataConfig


def train_transforms(config: DataConfig) -> v2.Compose:
    """Resizes to one of `config.min_sizes`, augments and normalises.

    Call it with a tv_tensors.Image (uint8 [3, H, W]) and a target of tv_tensors, as any
    transform of torchvision's v2. All randomness is torch's CPU generator.
    """
    steps: list[v2.Transform] = [
        ResizeShorterSide(config.min_sizes, config.max_size),
        v2.RandomHorizontalFlip(config.flip_probability),
    ]
    if config.photometric:
        # After resizing, so that the cost does not grow with the size of the file.
        steps.append(v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.03))
    return v2.Compose([*steps, *_normalize(config)])


def eval_transforms(config: DataConfig) -> v2.Compose:
    """Resizes to the last of `config.min_sizes` and normalises; nothing is random."""
    resize = ResizeShorterSide(config.min_sizes[-1:], config.max_size)
    return v2.Compose([resize, *_normalize(config)])


def prepare_image(image: Tensor, config: DataConfig) -> Tensor:
    """One picture as evaluation presents it to the network.

    Args:
        image (Tensor[3, H, W]): uint8, RGB.
        config (DataConfig): Sizes, mean and standard deviation.

    Returns:
        Tensor[3, h, w]: float32, resized and normalised.

    Raises:
        ValueError: The tensor has another shape or type.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(
            f"prepare_image: image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}"
        )
    prepared: Tensor = eval_transforms(config)(tv_tensors.Image(image))
    return prepared


def resized_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `shorter`, unless the longer would pass `longest`.

    The aspect ratio is kept to half a pixel.
    """
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class ResizeShorterSide(v2.Transform):
    """Resizes as `resized_size` says, bilinear with antialiasing; boxes follow.

    Not torchvision's RandomShortestSize, which rounds down and so bends the aspect ratio by up
    to a pixel.

    Args:
        sizes (sequence of int): Shorter side in pixels; one is drawn each time.
        longest (int): Limit of the longer side in pixels.
    """

    def __init__(self, sizes: Sequence[int], longest: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.longest = longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(value for value in flat_inputs if isinstance(value, tv_tensors.Image))
        choice = int(torch.randint(len(self.sizes), ())) if len(self.sizes) > 1 else 0
        height, width = image.shape[-2:]
        return {"size": resized_size(height, width, self.sizes[choice], self.longest)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"], antialias=True)


def _normalize(config: DataConfig) -> list[v2.Transform]:
    # of the file's uint8 values, scale makes 0..1
    steps: list[v2.Transform] = [v2.ToDtype(torch.float32, scale=config.pixel_range == 1)]
    if config.color_order == "bgr":
        steps.append(ReverseChannels())
    return [*steps, v2.Normalize(config.mean, config.std), v2.ToPureTensor()]


class ReverseChannels(v2.Transform):
    """RGB to BGR."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(inpt.flip(-3), like=inpt)
