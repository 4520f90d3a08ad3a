"""What the tests of postprocess share: pyramids of outputs, and how the operator is called."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fcos_ext import Postprocessed, PostprocessOptions
from fcos_ext.postprocess import operator_arguments
from tests.simt.build import load_simt_library

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
#: The compiled kernels, and the CUDA source in the simulator.
BACKENDS = ["cpu", "simt", pytest.param("cuda", marks=NO_GPU)]
SIMT_SEEDS = (0, 1, 12345)
INF, NAN = float("inf"), float("nan")
Predictions = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


class Call(NamedTuple):
    """Arguments of postprocess and of its reference."""

    predictions: Predictions
    image_sizes: Tensor
    options: PostprocessOptions
    original_sizes: Tensor | None = None
    padded_size: tuple[int, int] | None = None
    anchors: list[Tensor] | None = None

    def of(self, function: Callable[..., Any]) -> Any:
        return function(
            self.predictions,
            self.image_sizes,
            self.options,
            anchors=self.anchors,
            original_sizes=self.original_sizes,
            padded_size=self.padded_size,
        )

    def to(self, device: str) -> Call:
        def moved(x: Any) -> Any:
            if x is None:
                return None
            return [y.to(device) for y in x] if isinstance(x, list) else x.to(device)

        return self._replace(
            predictions=tuple(moved(levels) for levels in self.predictions),  # type: ignore
            image_sizes=moved(self.image_sizes),
            original_sizes=moved(self.original_sizes),
            anchors=moved(self.anchors),
        )


def run_on(backend: str, call: Call, seed: int = 0) -> Postprocessed:
    """The operator on a backend, with results on the CPU."""
    if backend == "simt":
        library = load_simt_library()
        library.set_seed(seed)
        with library.guarded_memory():
            return Postprocessed(*torch.ops.fcos_ext_simt.postprocess(*call.of(operator_arguments)))
    arguments = call.to(backend).of(operator_arguments)
    return Postprocessed(*(x.cpu() for x in torch.ops.fcos_ext.postprocess(*arguments)))


def assert_same(actual: Postprocessed, expected: Postprocessed) -> None:
    for name, ours, truth in zip(Postprocessed._fields, actual, expected, strict=True):
        assert ours.dtype == truth.dtype
        assert torch.equal(ours, truth), name


def in_memory(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another order of the memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # images, rows and columns out of a larger tensor
        n, c, h, w = x.shape
        larger = x.new_zeros(2 * n, c, h + 1, w + 3)
        larger[::2, :, :h, 2 : w + 2] = x
        return larger[::2, :, :h, 2 : w + 2]
    if layout == "every other image":
        return x.repeat_interleave(2, dim=0)[::2]
    return x.contiguous()


LAYOUTS = ["contiguous", "channels_last", "sliced", "every other image"]


def make_call(
    *,
    images: int = 2,
    classes: int = 3,
    sizes: tuple[tuple[int, int], ...] = ((12, 17), (6, 9), (3, 5)),
    mean: float = -2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    ties: bool = False,
    original: bool = True,
    layout: str = "contiguous",
    padded_size: tuple[int, int] | None = None,
    anchors: bool = False,
    with_centerness: bool = True,
    **options: Any,
) -> Call:
    """Logits around ``mean`` and boxes of up to 5 strides to each side; ``ties``: coarse logits.

    ``anchors``: some of odd sizes, one for each location.
    """
    generator = torch.Generator().manual_seed(seed)
    strides = tuple(8 * 2**level for level in range(len(sizes)))

    def noise(channels: int, height: int, width: int) -> Tensor:
        return torch.randn(images, channels, height, width, generator=generator)

    logits = [noise(classes, *size) * 1.5 + mean for size in sizes]
    centerness = [noise(1, *size) for size in sizes]
    if ties:
        logits, centerness = [x.round() for x in logits], [x.round() for x in centerness]
    ltrb = [noise(4, *size).abs() * 2 for size in sizes]
    height, width = sizes[0][0] * 8, sizes[0][1] * 8
    shrunk = torch.randint(0, 9, (images, 2), generator=generator)
    image_sizes = (torch.tensor([height, width]) - shrunk).clamp(min=1)
    predictions = [
        [in_memory(x.to(dtype), layout) for x in levels] for levels in (logits, ltrb, centerness)
    ]
    return Call(
        (predictions[0], predictions[1], predictions[2] if with_centerness else None),
        image_sizes,
        PostprocessOptions(**({"strides": strides} | options)),
        image_sizes * 3 // 2 if original else None,
        padded_size,
        make_anchors(sizes, generator) if anchors else None,
    )


def make_anchors(sizes: tuple[tuple[int, int], ...], generator: torch.Generator) -> list[Tensor]:
    """Boxes of 1 to 3 strides around the places where the locations would be."""
    result = []
    for level, (height, width) in enumerate(sizes):
        stride = 8 * 2**level
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        center = torch.stack([x, y], dim=-1).view(-1, 2) * stride + 3.3
        sides = (1 + 2 * torch.rand(len(center), 2, generator=generator)) * stride
        result.append(torch.cat([center - sides / 2, center + sides / 2], dim=1))
    return result


def fuzzed_call(seed: int) -> Call:
    """A small pyramid with everything drawn at random, odd numbers, ties and odd sizes."""
    rng = random.Random(seed)
    levels = rng.choice([1, 1, 2, 3, 4])
    sides = [1, 2, 3, 5, 7, 8, 11] if levels > 1 else [1, 3, 8, 13, 16]
    sizes = tuple((rng.choice(sides), rng.choice(sides)) for _ in range(levels))
    classes = rng.choice([1, 1, 2, 3, 5, 8, 16, 21])
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
    layout = rng.choice(LAYOUTS)
    with_anchors = rng.random() < 0.3
    call = make_call(
        images=rng.choice([1, 1, 2, 3]),
        classes=classes,
        sizes=sizes,
        mean=rng.choice([-6.0, -3.0, -1.0, 0.0, 3.0]),
        seed=seed,
        ties=rng.random() < 0.3,
        original=rng.random() < 0.5,
        padded_size=rng.choice([None, (sizes[0][0] * 8 + 5, sizes[0][1] * 8)]),
        normalize_ltrb=rng.random() < 0.7,
        score=rng.choice(["sqrt", "product"]),
        score_threshold=rng.choice([0.0, 0.05, 0.2, 0.5, 0.7, 1.0]),
        threshold_on=rng.choice(["class", "final"]),
        topk_candidates=rng.choice([1, 3, 10, 50, 1000]),
        iou_threshold=rng.choice([0.0, 0.3, 0.5, 0.6, 1.0]),
        max_detections=rng.choice([1, 5, 20, 100]),
        class_agnostic=rng.random() < 0.3,
        clip=rng.random() < 0.8,
        keep_empty=rng.random() < 0.3,
        overlaps=rng.choice(["exact", "torchvision", "edges"]),
        topk_by=rng.choice(["final", "class"]),
        corners=rng.choice(["edges", "pixels"]),
        with_centerness=rng.random() < 0.8,
        anchors=with_anchors,
        coding=rng.choice(["ltrb", "deltas"]) if with_anchors else "ltrb",
        delta_weights=rng.choice([(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]),
        delta_limit=rng.choice([math.log(1000 / 16), 1.0]),
        locations=rng.choice(["half_stride", "half_stride", "torchvision"]),
    )
    generator = torch.Generator().manual_seed(seed)
    predictions: list[Any] = []
    for kind, tensors in enumerate(call.predictions):
        if tensors is None:
            predictions.append(None)
            continue
        dtype = rng.choice(dtypes)
        for x in tensors:
            if kind == 1 and rng.random() < 0.2:
                x.copy_(x.round())  # boxes without area, and equal ones
            if rng.random() < 0.15:
                odd = rng.choice([NAN, INF, -INF, 0.0, 1e30, -1e30, -100.0])
                x[torch.rand(x.shape, generator=generator) < 0.05] = odd
        predictions.append([in_memory(x.to(dtype), layout) for x in tensors])
    anchors = call.anchors
    if anchors is not None:
        dtype = rng.choice(dtypes)
        anchors = [x.to(dtype) for x in anchors]
        if rng.random() < 0.2:
            anchors[0][::3] = rng.choice([NAN, INF, 0.0])
    sizes_dtype = rng.choice([torch.int64, torch.int32, torch.float32, torch.float64])
    return call._replace(
        predictions=tuple(predictions),  # type: ignore[arg-type]
        image_sizes=call.image_sizes.to(sizes_dtype),
        anchors=anchors,
    )
