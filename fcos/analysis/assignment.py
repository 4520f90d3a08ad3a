"""Boxes of a file as training sees them, and the locations that learn them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

import fcos_ext
from fcos_ext.assign_targets import AssignedTargets

from ..config import ConfigError
from ..data.padding import padded_size
from ..data.transforms import resized_size
from ..locations import feature_sizes, level_grids
from .conventions import Conventions

_MOST_PIXELS = 10**9  # of a picture; the locations of one box are some bytes a pixel


def network_size(size: tuple[int, int], conventions: Conventions) -> tuple[int, int]:
    """(height, width) that a picture of this (height, width) is resized to.

    Raises:
        ConfigError: It would have more than 10^9 pixels.
    """
    resized = _resized(size, conventions)
    if resized[0] * resized[1] > _MOST_PIXELS:
        raise ConfigError(
            f"min_size and max_size must lead to pictures of at most {_MOST_PIXELS:,} pixels, "
            f"got {resized[1]} x {resized[0]}"
        )
    return resized


def _resized(size: tuple[int, int], conventions: Conventions) -> tuple[int, int]:
    if conventions.resize == "none":
        return size
    return resized_size(*size, conventions.min_size, conventions.max_size, conventions.resize)


def network_boxes(
    boxes: NDArray[np.float32],
    size: tuple[int, int],
    conventions: Conventions,
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Boxes in the pixels of the resized picture.

    Args:
        boxes (ndarray[M, 4]): xyxy in the pixels of the file.
        size: (height, width) of the file.
        conventions: Resizing and corners.

    Returns:
        The boxes [M, 4], float32, and the resized picture's (height, width).
    """
    height, width = network_size(size, conventions)
    boxes = boxes.astype(np.float32)
    if conventions.corners == "pixels":
        boxes[:, 2:] -= 1
    x, y = np.float32(width / size[1]), np.float32(height / size[0])
    return boxes * np.array([x, y, x, y]), (height, width)


def assign(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    offsets: NDArray[np.int64],
    size: tuple[int, int],
    conventions: Conventions,
) -> AssignedTargets:
    """What each location learns, for pictures of one size; see :func:`fcos_ext.assign_targets`.

    Args:
        boxes (ndarray[K, 4]): float32, of ``network_boxes``.
        labels (ndarray[K]): Class of each box.
        offsets (ndarray[N + 1]): Picture i has the boxes offsets[i] to offsets[i + 1].
        size: (height, width) of the resized pictures.
        conventions: Levels, size ranges, boundary, center sampling, ties, corners and locations.
    """
    return fcos_ext.assign_targets(
        torch.from_numpy(np.ascontiguousarray(boxes)),
        torch.from_numpy(labels),
        torch.from_numpy(offsets),
        feature_sizes=feature_sizes(size, conventions.strides),
        strides=level_grids(padded_size(size), conventions.strides, conventions.locations),
        size_ranges=conventions.size_ranges,
        center_sampling_radius=conventions.center_sampling_radius,
        boundary=conventions.boundary,
        ties=conventions.ties,
        corners=conventions.corners,
    )
