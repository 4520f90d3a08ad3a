"""What the losses that take feature levels [N, C, H_l, W_l] have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: As many as the kernels take in one launch.
MAX_LEVELS = 8
#: As many classes as there are if nobody says.
ANY_CLASS = 1 << 62


def check_levels(
    op: str, name: str, levels: Sequence[Tensor], channels: int | None = None
) -> tuple[int, int]:
    """Raise unless these are levels [N, C, H_l, W_l] of one N, C and dtype.

    Args:
        op: the operator, and
        name: the argument that the messages are about.
        levels: what was given.
        channels: C, if it is known.

    Returns:
        N, and the number of locations L of all levels.
    """
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"{op}: {name} must have 1 to {MAX_LEVELS} levels, got {len(levels)}")
    shapes = [tuple(level.shape) for level in levels]
    if any(len(shape) != 4 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(
            f"{op}: levels must be [N, C, H_l, W_l] of the same N and C, got {name} {shapes}"
        )
    if channels is not None and shapes[0][1] != channels:
        raise ValueError(f"{op}: levels of {name} must have C = {channels}, got {shapes[0][1]}")
    dtypes = [level.dtype for level in levels]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise TypeError(f"{op}: all levels must have the same dtype, got {name} {dtypes}")
    if not dtypes[0].is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point, got {dtypes[0]}")
    return shapes[0][0], sum(shape[2] * shape[3] for shape in shapes)


def flatten(levels: Sequence[Tensor]) -> Tensor:
    """Tensor[N, L, C] of levels [N, C, H_l, W_l]: locations level by level, each row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def new_like(x: Tensor) -> Tensor:
    """As the kernels make a result: in the layout of ``x``; a level with gaps: contiguous."""
    dense = x.dim() != 4 or any(
        x.is_contiguous(memory_format=layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    memory_format = torch.preserve_format if dense else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format)


def sum_dtype(x: Tensor) -> torch.dtype:
    """What a loss of ``x`` is computed and summed up in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_parts(op: str, parts: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise unless the levels of all parts have the same N, H_l and W_l, and are on one device.

    Args:
        op: the operator.
        parts: by the names of the arguments.
    """
    grids = {name: [(x.shape[0], *x.shape[2:]) for x in levels] for name, levels in parts.items()}
    (first, grid), *others = grids.items()
    for name, other in others:
        if other != grid:
            raise ValueError(
                f"{op}: {name} must agree with {first} in N, H_l and W_l of every level, got "
                f"{other} and {grid}"
            )
    device = parts[first][0].device
    for name, levels in parts.items():
        for level in levels:
            if level.device != device:
                raise ValueError(
                    f"{op}: {name} must be on the device of the first level, {device}, got "
                    f"{level.device}"
                )


def check_normalizers(op: str, name: str, normalizers: Tensor) -> None:
    """Raise unless they are two numbers."""
    if not normalizers.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {normalizers.dtype}")
    if normalizers.shape != (2,):
        raise ValueError(f"{op}: {name} must have shape [2], got {list(normalizers.shape)}")
