"""postprocess: what it refuses, in Python and in the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import Grid, PostprocessOptions, postprocess, postprocess_ref
from fcos_ext.postprocess import operator_arguments
from tests.ops.postprocess_inputs import BACKENDS, NO_GPU, make_call
from tests.simt.build import load_simt_library

SIZES = ((6, 9), (3, 5))
GRID = Grid(step=(8, 8), first=(0, 0), unit=8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strides": ()}, r"strides must be 1 to 8 numbers >= 1, got \(\)"),
        ({"strides": (8,) * 9}, "strides must be 1 to 8 numbers"),
        ({"strides": (8, 0)}, r"strides must be .*, got \(8, 0\)"),
        ({"strides": (8, GRID._replace(unit=0.0))}, "a Grid must have finite .*unit=0.0.* level 1"),
        ({"coding": "corners"}, "coding must be one of .*, got 'corners'"),
        ({"delta_weights": (1.0, 1.0, 0.0, 1.0)}, "delta_weights must be 4 numbers above 0, got"),
        ({"delta_weights": (1.0,) * 3}, "delta_weights must be 4 numbers above 0, got"),
        ({"delta_limit": float("nan")}, "delta_limit must be above -inf, got nan"),
        ({"overlaps": "moved"}, "overlaps must be one of .*, got 'moved'"),
        ({"topk_by": "score"}, r"topk_by must be one of \('final', 'class'\), got 'score'"),
        ({"corners": "+1"}, r"corners must be one of .*, got '\+1'"),
        ({"score": "root"}, r"score must be one of \('sqrt', 'product'\), got 'root'"),
        ({"threshold_on": "box"}, "threshold_on must be one of .*, got 'box'"),
        ({"locations": "corner"}, "locations must be one of .*, got 'corner'"),
        ({"score_threshold": -0.1}, r"score_threshold must be in \[0, 1\], got -0.1"),
        ({"score_threshold": float("nan")}, r"score_threshold must be in \[0, 1\], got nan"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"topk_candidates": 0}, "topk_candidates must be at least 1, got 0"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^postprocess: {message}"):
        PostprocessOptions(**changes)


@pytest.mark.parametrize("function", [postprocess, postprocess_ref])
def test_errors(function: Any) -> None:
    logits, ltrb, centerness = make_call(sizes=SIZES).predictions
    sizes = torch.ones(2, 2)
    good: dict[str, Any] = {"predictions": (logits, ltrb, centerness), "image_sizes": sizes}
    good |= {"options": PostprocessOptions(strides=(8, 16))}
    function(**good)
    anchors = [torch.rand(h * w, 4) for h, w in SIZES]
    deltas = PostprocessOptions(strides=(8, 16), coding="deltas")
    function(**good | {"options": deltas, "anchors": anchors})
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"predictions": (logits, ltrb)}, ValueError, "predictions must be .*, got 2 sequences"),
        (
            {"predictions": (logits, ltrb[:1], centerness)},
            ValueError,
            "regression must have one level for each of 2 strides, got 1",
        ),
        (
            {"predictions": ([x[0] for x in logits], ltrb, centerness)},
            ValueError,
            r"logits must be \[N, C, H_l, W_l\] with C >= 1, got \[3, 6, 9\]",
        ),
        (
            {"predictions": (logits, [x[:, :3] for x in ltrb], centerness)},
            ValueError,
            r"regression of level 0 must be \[2, 4, H_0, W_0\] .*, got \[2, 3, 6, 9\]",
        ),
        (
            {"predictions": (logits, ltrb, [centerness[0], centerness[1][:, :, :2]])},
            ValueError,
            r"centerness of level 1 must be .*, got \[2, 1, 2, 5\]",
        ),
        (
            {"predictions": ([logits[0], logits[1][:1]], ltrb, centerness)},
            ValueError,
            r"logits of level 1 must be .*, got \[1, 3, 3, 5\]",
        ),
        (
            {"predictions": tuple([x[:, :, :0] for x in y] for y in (logits, ltrb, centerness))},
            ValueError,
            r"logits of level 0 must be .*, got \[2, 3, 0, 9\]",
        ),
        (
            {"predictions": ([x.long() for x in logits], ltrb, centerness)},
            TypeError,
            "logits must be floating point, .*, got torch.int64 at level 0",
        ),
        (
            {"predictions": (logits, [ltrb[0], ltrb[1].double()], centerness)},
            TypeError,
            "regression must be floating point, .*, got torch.float64 at level 1",
        ),
        (
            {"predictions": (logits, ltrb, [x.to("meta") for x in centerness])},
            ValueError,
            "centerness must be on the device of logits, cpu, got meta",
        ),
        ({"options": deltas}, ValueError, "anchors must be given with coding 'deltas', got None"),
        ({"anchors": anchors[:1]}, ValueError, "anchors must have one level for each of 2 strides"),
        (
            {"anchors": [anchors[0], anchors[0]]},
            ValueError,
            r"anchors of level 1 must be \[H_1 W_1, 4\], \[15, 4\], got \[54, 4\]",
        ),
        ({"anchors": [x.long() for x in anchors]}, TypeError, "anchors must be floating point"),
        ({"anchors": [x.to("meta") for x in anchors]}, ValueError, "anchors must be on the dev"),
        ({"image_sizes": sizes[:1]}, ValueError, r"image_sizes must have shape \[2, 2\], got"),
        ({"image_sizes": sizes > 0}, TypeError, "image_sizes must be integers or .*bool"),
        ({"original_sizes": sizes[0]}, ValueError, r"original_sizes must .*, got \[2\]"),
        ({"original_sizes": sizes.to("meta")}, ValueError, "original_sizes .* cpu, got meta"),
        ({"padded_size": (0, 5)}, ValueError, r"padded_size must be .* >= 1, got \(0, 5\)"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=f"^postprocess: {message}"):
            function(**{**good, **changes})


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float16])
def test_image_sizes_of_other_dtypes(dtype: torch.dtype) -> None:
    call = make_call(sizes=SIZES)
    expected = call.of(postprocess)
    actual = call._replace(image_sizes=call.image_sizes.to(dtype)).of(postprocess)
    assert all(map(torch.equal, actual, expected))


def changed(position: int, value: Any) -> Any:
    """The good arguments of the operator but for one."""

    def change(arguments: list[Any]) -> list[Any]:
        old = arguments[position]
        arguments[position] = value(old) if callable(value) else value
        return arguments

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(0, []), "logits must have 1 to 8 levels, got 0"),
        (changed(0, lambda x: x * 5), "logits must have 1 to 8 levels, got 10"),
        (changed(0, lambda x: [y[0] for y in x]), r"logits must be \[N, C, H, W\] with C >= 1"),
        (changed(0, lambda x: [y[:, :0] for y in x]), r"logits must be \[N, C, H, W\] with C >= 1"),
        (changed(0, lambda x: [y[:, :, :0] for y in x]), "regression must be .* H and W of logits"),
        (changed(0, lambda x: [y.long() for y in x]), "logits must be floating point, got Long"),
        (changed(0, lambda x: [x[0], x[1][:, :2]]), r"logits must be \[N, 3, H, W\]"),
        (changed(1, lambda x: x[:1]), "regression must have 2 levels, got 1"),
        (changed(1, lambda x: [y[:, :3] for y in x]), r"regression must be \[N, 4, H, W\]"),
        (
            changed(1, lambda x: [x[0], x[1].half()]),
            "all levels of regression must have the same dtype",
        ),
        (changed(2, lambda x: [y[:1] for y in x]), r"centerness must be \[N, 1, H, W\]"),
        (changed(3, [torch.zeros(54, 4)]), "anchors must have 2 levels, or none, got 1"),
        (changed(3, [torch.zeros(54, 4)] * 2), r"anchors must be \[H W, 4\] with the H and W of"),
        (changed(3, [torch.zeros(54, 4).int()] * 2), "anchors must be floating point, got Int"),
        (changed(7, [1.0] * 5), "deltas need anchors"),
        (changed(7, [1.0] * 4), "deltas must be 4 weights and a limit, or nothing, got 4 numbers"),
        (changed(4, lambda x: x[0]), r"image_sizes must be \[N, 2\]"),
        (changed(4, lambda x: x.half()), "image_sizes must be Long, Int, Float or Double, got"),
        (changed(5, lambda x: x[:, :1]), r"original_sizes must be \[N, 2\]"),
        (changed(6, [1.0] * 9), "grids must be 5 numbers a level, got 9"),
        (changed(8, float("nan")), r"score_threshold must be in \[0, 1\], got nan"),
        (changed(10, 0), "topk_candidates must be at least 1, got 0"),
        (changed(11, 0), "max_detections must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_errors(backend: str, change: Any, message: str) -> None:
    if backend == "simt":
        load_simt_library()
    namespace = torch.ops.fcos_ext_simt if backend == "simt" else torch.ops.fcos_ext
    call = make_call(sizes=SIZES).to("cpu" if backend == "simt" else backend)
    arguments = list(call.of(operator_arguments))
    namespace.postprocess(*arguments)
    with pytest.raises(RuntimeError, match=f"postprocess: {message}"):
        namespace.postprocess(*change(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_grids_and_sizes(backend: str) -> None:
    """Nothing is read or written out of bounds, whatever the numbers are."""
    if backend == "simt":
        library = load_simt_library()
    namespace = torch.ops.fcos_ext_simt if backend == "simt" else torch.ops.fcos_ext
    call = make_call(sizes=SIZES).to("cpu" if backend == "simt" else backend)
    for odd in (float("nan"), float("inf"), -float("inf"), -1e30, 1e38):
        arguments = list(call.of(operator_arguments))
        for position, value in (
            (3, [torch.full((h * w, 4), odd) for h, w in SIZES]),
            (4, torch.full_like(arguments[4], odd, dtype=torch.float32)),
            (5, torch.full_like(arguments[4], odd, dtype=torch.float32)),
            (6, [odd] * 10),
        ):
            changed_arguments = [*arguments[:position], value, *arguments[position + 1 :]]
            if backend == "simt":
                with library.guarded_memory():
                    results = namespace.postprocess(*changed_arguments)
            else:
                results = namespace.postprocess(*changed_arguments)
            assert check_padding(*results)


def check_padding(
    boxes: Tensor, scores: Tensor, labels: Tensor, counts: Tensor, dropped: Tensor
) -> bool:
    rows = torch.arange(boxes.shape[1], device=boxes.device)
    padding = rows >= counts[:, None]
    empty = (labels == -1) & (scores == 0) & (boxes == 0).all(-1)
    return bool((empty == padding).all()) and bool((dropped >= 0).all())


@NO_GPU
def test_mixed_devices() -> None:
    call = make_call(sizes=SIZES)
    arguments = list(call.to("cuda").of(operator_arguments))
    arguments[4] = call.image_sizes
    with pytest.raises(RuntimeError, match="logits and image_sizes must be on the same device"):
        torch.ops.fcos_ext.postprocess(*arguments)
