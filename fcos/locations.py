"""Where the locations of the feature levels lie in the image."""

from __future__ import annotations

from collections.abc import Sequence


def feature_sizes(image_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each feature level, for an image of (height, width) pixels."""
    height, width = image_size
    return [(-(-height // s), -(-width // s)) for s in strides]
