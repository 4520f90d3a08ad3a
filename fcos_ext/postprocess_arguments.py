"""What :func:`fcos_ext.postprocess` takes: rules, and the forms it is computed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grids import Grid, grid_of
from .postprocess_options import PostprocessOptions

Levels = Sequence[Tensor]
Predictions = tuple[Levels, Levels, "Levels | None"]


def grids_of(
    predictions: Predictions, options: PostprocessOptions, padded_size: tuple[int, int] | None
) -> list[Grid]:
    """The grid of each level."""
    grids = []
    for stride, level in zip(options.strides, predictions[0], strict=True):
        grid = grid_of(stride)
        if options.locations == "torchvision" and not isinstance(stride, Grid):
            grid = grid._replace(first=(0.0, 0.0))
            if padded_size is not None:
                height, width = level.shape[2:]
                grid = grid._replace(step=(padded_size[0] // height, padded_size[1] // width))
        grids.append(grid)
    return grids


def max_apart(options: PostprocessOptions, device: torch.device) -> int:
    """Up to so many candidates of an image, boxes of each class are compared in a place of their
    own."""
    if options.overlaps != "torchvision" or options.class_agnostic:
        return 0
    return 1000 if device.type == "cpu" else 25_000


def ends_of(options: PostprocessOptions) -> tuple[float, float]:
    """What is added to right and bottom sides: before overlaps are computed, and in all."""
    added = float(options.corners == "pixels")
    return (0.0 if options.overlaps == "edges" else added), added


def check(
    predictions: Predictions,
    image_sizes: Tensor,
    options: PostprocessOptions,
    anchors: Levels | None,
    original_sizes: Tensor | None,
    padded_size: tuple[int, int] | None,
) -> None:
    """All that can be known on the host."""
    if len(predictions) != 3:
        raise ValueError(
            "postprocess: predictions must be logits, regression and centerness, "
            f"got {len(predictions)} sequences"
        )
    levels = len(options.strides)
    logits, regression, centerness = predictions
    given = {"logits": logits, "regression": regression}
    given |= {} if centerness is None else {"centerness": centerness}
    given |= {} if anchors is None else {"anchors": anchors}
    for name, tensors in given.items():
        if len(tensors) != levels:
            raise ValueError(
                f"postprocess: {name} must have one level for each of {levels} strides, "
                f"got {len(tensors)}"
            )
    if options.coding == "deltas" and anchors is None:
        raise ValueError("postprocess: anchors must be given with coding 'deltas', got None")
    first = logits[0]
    if first.dim() != 4 or first.shape[1] < 1:
        raise ValueError(
            f"postprocess: logits must be [N, C, H_l, W_l] with C >= 1, got {list(first.shape)}"
        )
    channels = {"logits": first.shape[1], "regression": 4, "centerness": 1}
    for name, tensors in given.items():
        for level, (tensor, like) in enumerate(zip(tensors, logits, strict=True)):
            if name == "anchors":
                _check_anchors(tensor, like, level)
            else:
                _check_map(name, tensor, like, level, (first.shape[0], channels[name]))
            if not tensor.is_floating_point() or tensor.dtype != tensors[0].dtype:
                raise TypeError(
                    f"postprocess: {name} must be floating point, the same in all levels, "
                    f"got {tensor.dtype} at level {level}"
                )
            if tensor.device != first.device:
                raise ValueError(
                    f"postprocess: {name} must be on the device of logits, {first.device}, "
                    f"got {tensor.device}"
                )
    _check_sizes("image_sizes", image_sizes, first)
    if original_sizes is not None:
        _check_sizes("original_sizes", original_sizes, first)
    if padded_size is not None and (len(padded_size) != 2 or min(padded_size) < 1):
        raise ValueError(
            f"postprocess: padded_size must be (height, width) >= 1, got {padded_size}"
        )


def _check_map(
    name: str, tensor: Tensor, logits: Tensor, level: int, shape: tuple[int, int]
) -> None:
    if (
        tensor.dim() != 4
        or tensor.shape[:2] != shape
        or tensor.shape[2:] != logits.shape[2:]
        or tensor.shape[2] < 1
        or tensor.shape[3] < 1
    ):
        expected = f"[{shape[0]}, {shape[1]}, H_{level}, W_{level}]"
        raise ValueError(
            f"postprocess: {name} of level {level} must be {expected} with the same sides >= 1 in "
            f"all predictions, got {list(tensor.shape)}"
        )


def _check_anchors(anchors: Tensor, logits: Tensor, level: int) -> None:
    expected = [logits.shape[2] * logits.shape[3], 4]
    if list(anchors.shape) != expected:
        raise ValueError(
            f"postprocess: anchors of level {level} must be [H_{level} W_{level}, 4], {expected}, "
            f"got {list(anchors.shape)}"
        )


def _check_sizes(name: str, sizes: Tensor, logits: Tensor) -> None:
    if sizes.dtype == torch.bool or sizes.is_complex():
        raise TypeError(
            f"postprocess: {name} must be integers or floating point, got {sizes.dtype}"
        )
    if sizes.shape != (logits.shape[0], 2):
        raise ValueError(
            f"postprocess: {name} must have shape {[logits.shape[0], 2]}, got {list(sizes.shape)}"
        )
    if sizes.device != logits.device:
        raise ValueError(
            f"postprocess: {name} must be on the device of logits, {logits.device}, "
            f"got {sizes.device}"
        )
