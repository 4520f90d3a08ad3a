"""What assign_targets refuses, by the public function and by the operator itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import Grid, assign_targets, assign_targets_ref
from tests.simt.build import load_simt_library

INF = math.inf
GRID = Grid(step=(8, 8), first=(0, 0), unit=8, reach=INF)
ONE_LEVEL: dict[str, Any] = {
    "feature_sizes": [(4, 4)],
    "strides": [8],
    "size_ranges": [(0, INF)],
    "center_sampling_radius": 0.0,
}
#: Arguments that make the batch of the tests a padded one.
PADDED: dict[str, Any] = {
    "boxes": torch.ones(1, 2, 4),
    "labels": torch.zeros(1, 2).long(),
    "offsets": None,
    "counts": torch.tensor([2]),
}
LEVELS_33: dict[str, Any] = {
    "feature_sizes": [(4, 4)] * 33,
    "strides": [8] * 33,
    "size_ranges": [(0, INF)] * 33,
}


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(assign_targets) == inspect.signature(assign_targets_ref)


@pytest.mark.parametrize("function", [assign_targets, assign_targets_ref])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"offsets": None}, ValueError, "offsets or counts must be given, got neither"),
        ({"counts": torch.zeros(1).long()}, ValueError, "offsets or counts must be .* got both"),
        ({"boxes": torch.ones(2, 4).long()}, TypeError, "boxes must be floating point, got torch"),
        ({"labels": torch.ones(2)}, TypeError, "labels must be int64 or int32, got torch.float32"),
        ({"offsets": torch.ones(2)}, TypeError, "offsets must be int64 or int32, got torch.float"),
        (
            {"boxes": torch.ones(2, 5)},
            ValueError,
            r"boxes must have shape \[K, 4\] with offsets, got \[2, 5\]",
        ),
        (
            {"boxes": torch.ones(8)},
            ValueError,
            r"boxes must have shape \[K, 4\] with offsets, got \[8\]",
        ),
        ({"labels": torch.ones(3).long()}, ValueError, r"labels must .* \[2\], got \[3\]"),
        ({"offsets": torch.tensor(2)}, ValueError, r"offsets must have shape \[N \+ 1\], got \[\]"),
        ({"offsets": torch.tensor([]).long()}, ValueError, r"offsets must have shape .* got \[0\]"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, "offsets must start at 0 .*got 1 and 2"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "boxes, 2, got 0 and 3"),
        (
            {"offsets": torch.tensor([0, 2, 1, 2])},
            ValueError,
            "offsets must not decrease, got 2 then 1 at image 1",
        ),
        ({"offsets": torch.zeros(2, device="meta").long()}, ValueError, "offsets must be on the"),
        (PADDED | {"boxes": torch.ones(2, 4)}, ValueError, r"boxes .* \[N, M, 4\] .* got \[2, 4\]"),
        ({"boxes": torch.ones(1, 2, 4)}, ValueError, r"boxes .* \[K, 4\] .* got \[1, 2, 4\]"),
        (PADDED | {"labels": torch.ones(2).long()}, ValueError, r"labels .* \[1, 2\], got \[2\]"),
        (PADDED | {"counts": torch.ones(1)}, TypeError, "counts must be int64 or int32, got"),
        (PADDED | {"counts": torch.ones(2).long()}, ValueError, r"counts .* N = 1 .* got \[2\]"),
        (PADDED | {"counts": torch.tensor(1)}, ValueError, r"counts must .* got \[\]"),
        (PADDED | {"counts": torch.tensor([3])}, ValueError, "counts .* M = 2, got 3 at image 0"),
        (PADDED | {"counts": torch.tensor([-1])}, ValueError, "counts .* M = 2, got -1 at"),
        (LEVELS_33, ValueError, "strides must be of at most 32 levels, got 33"),
        ({"strides": [8, 16]}, ValueError, "feature_sizes, strides and .* got 1, 2 and 1"),
        (
            {"strides": [], "feature_sizes": [], "size_ranges": []},
            ValueError,
            "feature_sizes, strides and size_ranges must .* got 0, 0 and 0",
        ),
        ({"strides": [0]}, ValueError, "strides must be whole numbers >= 1, got 0 at level 0"),
        ({"strides": [8.5]}, ValueError, "strides must be whole numbers >= 1, got 8.5"),
        ({"feature_sizes": [(4, 0)]}, ValueError, r"feature_sizes .* got \(4, 0\) at level 0"),
        ({"size_ranges": [(9, 3)]}, ValueError, r"size_ranges .* got \(9, 3\) at level 0"),
        ({"size_ranges": [(0, math.nan)]}, ValueError, r"size_ranges .* got \(0, nan\)"),
        ({"center_sampling_radius": -1.0}, ValueError, "center_sampling_radius must be >= 0, got"),
        ({"center_sampling_radius": math.nan}, ValueError, "center_sampling_radius must .* nan"),
        ({"boundary": "open"}, ValueError, "boundary must be one of .*'half_open'.*, got 'open'"),
        ({"ties": "first"}, ValueError, r"ties must be one of \('exact', .*\), got 'first'"),
        ({"corners": 1}, ValueError, r"corners must be one of .'edges', 'pixels'.*, got 1"),
        ({"strides": [GRID._replace(step=(8, 0))]}, ValueError, "Grid must have .* at level 0"),
        ({"strides": [GRID._replace(step=(INF, 8))]}, ValueError, "Grid must have finite steps"),
        ({"strides": [GRID._replace(first=(0, -INF))]}, ValueError, "Grid must .* finite firsts"),
        (
            {"strides": [GRID._replace(unit=math.nan)]},
            ValueError,
            "Grid .* unit above 0.* unit=nan",
        ),
        ({"strides": [GRID._replace(reach=-1)]}, ValueError, "Grid must .* reach >= 0.*reach=-1"),
    ],
)
def test_errors(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    arguments = {
        "boxes": torch.ones(2, 4),
        "labels": torch.zeros(2).long(),
        "offsets": torch.tensor([0, 2]),
        **ONE_LEVEL,
        **changes,
    }
    with pytest.raises(error, match="^assign_targets: .*" + message):
        function(**arguments)


BOXES, LABELS, OFFSETS = torch.ones(2, 4), torch.zeros(2).long(), torch.tensor([0, 2])
#: Of the operator.
ARGUMENTS: dict[str, Any] = {
    "boxes": BOXES,
    "labels": LABELS,
    "extents": OFFSETS,
    "feature_sizes": [4, 4],
    "grids": [8.0, 8.0, 4.0, 4.0, 8.0, 12.0],
    "size_ranges": [0.0, INF],
    "boundary": 0,
    "normalize": False,
    "ties": 0,
    "pixels": False,
}


def grid(**changes: float) -> dict[str, Any]:
    numbers = {"step_y": 8.0, "step_x": 8.0, "y": 4.0, "x": 4.0, "unit": 8.0, "reach": 12.0}
    return {"grids": list((numbers | changes).values())}


def simt(*arguments: Any) -> Any:
    load_simt_library()
    return torch.ops.fcos_ext_simt.assign_targets(*arguments)


OPERATORS: list[Any] = [torch.ops.fcos_ext.assign_targets.default, simt]


@pytest.mark.parametrize("operator", OPERATORS, ids=["kernel", "simt"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"boxes": BOXES.long()}, "boxes must be floating point, got Long"),
        ({"boxes": BOXES[0]}, r"boxes must have shape \[K, 4\] or \[N, M, 4\]"),
        ({"boxes": BOXES[:, :3]}, r"boxes must have shape \[K, 4\] or \[N, M, 4\]"),
        ({"labels": LABELS.float()}, "labels must be int64 or int32, got Float"),
        ({"labels": LABELS[:1]}, "labels must have the shape of boxes without the last 4"),
        ({"labels": LABELS[None]}, "labels must have the shape of boxes without the last 4"),
        ({"extents": OFFSETS.short()}, "offsets or counts must be int64 or int32, got Short"),
        ({"extents": OFFSETS[:0]}, r"offsets must have shape \[N \+ 1\]"),
        ({"extents": OFFSETS[None]}, r"offsets must have shape \[N \+ 1\]"),
        ({"boxes": BOXES[None], "labels": LABELS[None]}, r"counts must have shape \[N\] .* N = 1"),
        ({"grids": []}, "feature_sizes and size_ranges .* 1 to 32 levels, got 2, 2 and 0"),
        ({"grids": [8.0] * 7}, "feature_sizes and size_ranges .* 1 to 32 levels, got 2, 2 and 7"),
        ({"grids": [8.0] * 12}, "feature_sizes and size_ranges .* grids 6 .* got 2, 2 and 12"),
        ({"feature_sizes": [4]}, "feature_sizes and size_ranges .* got 1, 2 and 6"),
        ({"size_ranges": [4.0]}, "feature_sizes and size_ranges .* got 2, 1 and 6"),
        ({"feature_sizes": [4, 0]}, r"feature_sizes must be .* at least 1 .* got \(4, 0\)"),
        ({"feature_sizes": [2**20, 2**20]}, r"feature_sizes must be .* at most 2\^30 locations"),
        ({"feature_sizes": [2**62, 2]}, r"feature_sizes must be .* at most 2\^30 locations"),
        (grid(step_y=0), "grids must have finite steps above 0 .*, got 0 and 4 at level 0"),
        (grid(step_x=-8), "grids must have finite steps above 0 .*, got -8 and 4 at level 0"),
        (grid(step_x=1e39), "grids must have finite steps .*, got 1e\\+39 and 4 at level 0"),
        (grid(step_y=1e-40), "grids must have finite steps .* at level 0"),
        (grid(x=math.nan), "grids must have .* a finite first, got 8 and nan at level 0"),
        (grid(y=-INF), "grids must have .* a finite first, got 8 and -inf at level 0"),
        (grid(unit=0), "grids must have a finite unit above 0 .*, got 0 and 12 at level 0"),
        (grid(unit=INF), "grids must have a finite unit above 0 .*, got inf and 12 at level 0"),
        (grid(reach=-1), "grids must have .* a reach >= 0, got 8 and -1 at level 0"),
        (grid(reach=math.nan), "grids must have .* a reach >= 0, got 8 and nan at level 0"),
        ({"size_ranges": [5.0, 4.0]}, r"size_ranges must be .* got \(5, 4\) at level 0"),
        ({"size_ranges": [0.0, math.nan]}, r"size_ranges must be .* got \(0, nan\) at level 0"),
        ({"boundary": 3}, "boundary must be 0, 1 or 2, got 3"),
        ({"ties": 2}, "ties must be 0 or 1, got 2"),
    ],
)
def test_kernel_errors(operator: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"assign_targets: {message}"):
        operator(*(ARGUMENTS | changes).values())


@pytest.mark.parametrize(
    "shape, extents, message",
    [
        ((2, 4), [0, 3], "offsets must start at 0 and end .* boxes, 2, got 0 and 3"),
        ((2, 4), [-1, 2], "offsets must start at 0 .* got -1 and 2"),
        ((2, 4), [0, 2**62, 2], "offsets must not decrease, got .* then 2 at image 1"),
        ((1, 2, 4), [3], "counts must lie in 0..M with M = 2, got 3 at image 0"),
        ((2, 2, 4), [0, -1], "counts must lie in 0..M with M = 2, got -1 at image 1"),
    ],
)
def test_kernel_errors_of_values(shape: tuple[int, ...], extents: list[int], message: str) -> None:
    """On the CPU, where the operator reads them."""
    boxes = torch.ones(shape)
    changes = {"boxes": boxes, "labels": boxes[..., 0].long(), "extents": torch.tensor(extents)}
    with pytest.raises(RuntimeError, match=f"assign_targets: {message}"):
        OPERATORS[0](*(ARGUMENTS | changes).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["labels", "extents"])
def test_kernel_errors_of_devices(name: str) -> None:
    tensors: dict[str, Tensor] = {"boxes": BOXES.cuda(), "labels": LABELS, "extents": OFFSETS}
    moved = {key: value.cuda() for key, value in tensors.items() if key != name}
    with pytest.raises(RuntimeError, match="must be on the same device"):
        OPERATORS[0](*(ARGUMENTS | moved).values())
