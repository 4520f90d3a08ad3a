"""How pictures and boxes are presented to the network.

Training, evaluation and prediction share the resizing and the normalisation below; boxes follow
by the true ratio of the integer sizes, so nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcos.config import DataConfig
from fcos.data.opencv import resize_bilinear

Rule = Literal["round", "truncate", "torchvision", "opencv"]
Corners = Literal["edges", "pixels"]


def train_transforms(config: DataConfig, corners: Corners = "edges") -> v2.Compose:
    """Resizes to one of `config.min_sizes`, augments and normalises.

    Boxes end at edges, whatever `corners` is, that of the model: it decides how they are scaled.

    Call it with a tv_tensors.Image (uint8 [3, H, W]) and a target of tv_tensors, as any
    transform of torchvision's v2. All randomness is torch's CPU generator.
    """
    augment: list[v2.Transform] = [v2.RandomHorizontalFlip(config.flip_probability)]
    if config.photometric:
        augment.append(v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.03))
    return _pipeline(config, config.min_sizes, augment, corners)


def eval_transforms(config: DataConfig, corners: Corners = "edges") -> v2.Compose:
    """Resizes to the last of `config.min_sizes` and normalises; nothing is random."""
    return _pipeline(config, config.min_sizes[-1:], [], corners)


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


def resized_size(
    height: int, width: int, shorter: int, longest: int, rule: Rule = "round"
) -> tuple[int, int]:
    """(height, width) with the shorter side at `shorter`, unless the longer would pass `longest`.

    Args:
        height (int), width (int): Of the picture, in pixels.
        shorter (int), longest (int): What the sides are to be.
        rule (str): "round" keeps the aspect ratio to half a pixel, "torchvision" rounds down.
            "truncate" is that of the original code: a shorter side that `longest` decides is
            rounded, and the longer one, which follows from it, rounded down. "opencv" is "round".
    """
    if rule == "truncate":
        return _truncated_size(height, width, shorter, longest)
    scale = min(shorter / min(height, width), longest / max(height, width))
    half = 0.0 if rule == "torchvision" else 0.5
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def _truncated_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    low, high = min(height, width), max(height, width)
    if high / low * shorter > longest:
        shorter = round(longest * low / high)
    shorter = max(1, shorter)
    if low == shorter:
        return height, width
    if width < height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


class ResizeShorterSide(v2.Transform):
    """Resizes as `resized_size` says, bilinear; boxes follow.

    Args:
        sizes (sequence of int): Shorter side in pixels; one is drawn each time.
        longest (int): Limit of the longer side in pixels.
        rule (str): See `resized_size`. With "torchvision" nothing is antialiased; "opencv" is
            `fcos.data.opencv.resize_bilinear`.
        corners (str): "pixels": of boxes, the first and the last pixel are scaled, instead of
            their edges. A box ends at an edge all the same: 1 behind the last pixel.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        longest: int,
        rule: Rule = "round",
        corners: Corners = "edges",
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.longest = longest
        self.rule = rule
        self.corners = corners

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(value for value in flat_inputs if isinstance(value, tv_tensors.Image))
        choice = int(torch.randint(len(self.sizes), ())) if len(self.sizes) > 1 else 0
        height, width = image.shape[-2:]
        size = resized_size(height, width, self.sizes[choice], self.longest, self.rule)
        return {"size": size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = params["size"]
        if self.rule == "opencv" and isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(resize_bilinear(inpt.as_subclass(torch.Tensor), size), like=inpt)
        resized = v2.functional.resize(inpt, size, antialias=self.rule != "torchvision")
        if self.corners == "pixels" and isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            ratio = torch.tensor([size[1] / width, size[0] / height], dtype=resized.dtype)
            resized[:, 2:] += 1 - ratio  # (end - 1) ratio + 1
        return resized


class _Divide(v2.Transform):
    """uint8 images to 0..1 by division, as torchvision's detectors get them.

    Its ToDtype multiplies by 1 / 255 instead, which is often another float32 number.
    """

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(inpt.float().div_(255), like=inpt)


def _pipeline(
    config: DataConfig,
    sizes: Sequence[int],
    augment: Sequence[v2.Transform],
    corners: Corners,
) -> v2.Compose:
    resize = ResizeShorterSide(sizes, config.max_size, config.resize, corners)
    if config.resize == "torchvision":
        return v2.Compose([*augment, *_normalize(config), resize, v2.ToPureTensor()])
    # First the size, so that the cost of the rest does not grow with that of the file.
    return v2.Compose([resize, *augment, *_normalize(config), v2.ToPureTensor()])


def _normalize(config: DataConfig) -> list[v2.Transform]:
    # of the file's uint8 values, scale makes 0..1
    to_float: v2.Transform = v2.ToDtype(torch.float32, scale=config.pixel_range == 1)
    if config.resize == "torchvision" and config.pixel_range == 1:
        to_float = _Divide()
    reverse = [_ReverseChannels()] if config.color_order == "bgr" else []
    # In place, on the copy that to_float made: new memory costs more than the arithmetic.
    return [to_float, *reverse, v2.Normalize(config.mean, config.std, inplace=True)]


class _ReverseChannels(v2.Transform):
    """RGB to BGR."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(inpt.flip(-3), like=inpt)
