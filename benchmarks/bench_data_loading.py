"""From COCO JSON and JPEG files to batches that are ready for the network.

    python -m benchmarks.bench_data_loading [--quick] [--output FILE]

A call is one pass over the pictures: decode, flip (training), resize from 640 x 480 to 1024 x 768,
normalise, put in batches of 8; with 0 and 2 worker processes, whose start is part of it, as it is
of every epoch of torchvision's users. ``shape`` holds the number of pictures of a pass.

Compared with our loader, as ``fcos train`` builds it, is torchvision's ``CocoDetection``, wrapped
for detection, in torch's own loader: once with transforms v2 that do everything in the workers,
and once as torchvision's recipe for training detectors has it, where the model itself resizes and
normalises the batch (``GeneralizedRCNNTransform``), in the main process. A last one is
ours by torchvision's rules for resizing, floating point after normalisation.

The pictures are generated, with as much grain as makes the files those of COCO's, 155 kB each. All
are of one size and, in training, all are flipped, so that the results can be compared: boxes to
0.003 pixels, and means over pixels to 0.3 %.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from fcos.config import DataConfig
from fcos.data.batches import eval_loader, training_loader
from fcos.data.coco import CocoDataset
from fcos.data.scenes import CLASS_NAMES, Scene, draw_scene
from fcos.data.transforms import eval_transforms, train_transforms

from .harness import OURS, Case, Results, main

OP = "data_loading"
HEIGHT, WIDTH = 480, 640
BATCH = 8
#: Standard deviation of the grain, and quality of the files.
GRAIN, QUALITY = 9, 95
#: Every 8th pixel in both directions, and of those the means of 5 x 5.
PIXEL_STEP, PIXEL_MEAN = 8, 5
MODES = ("training", "evaluation")
#: Of one image: its id, padded pixels [3, H, W], height and width, boxes [M, 4], labels [M].
Image_ = tuple[int, Tensor, Sequence[int], Tensor, Tensor]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    """None on a GPU, which has no part in it."""
    if device.type == "cuda":
        return []
    images, shorter = (BATCH, 576) if quick else (6 * BATCH, 768)
    workers = (0,) if quick else (0, 2)
    return [make_case(images, shorter, *line) for line in itertools.product(MODES, workers)]


def make_case(images: int, shorter: int, mode: str, workers: int) -> Case:
    data = functools.partial(
        DataConfig,
        min_sizes=(shorter,),
        max_size=shorter * 5 // 3,
        flip_probability=1.0,
        workers=workers,
    )
    training = mode == "training"
    truth = pass_over(lambda: exact(images, data(), training))
    return Case(
        settings={"mode": mode, "shape": [images, 3, HEIGHT, WIDTH], "shorter side": shorter}
        | {"workers": workers, "threads": 1},
        device=torch.device("cpu"),
        make_inputs=lambda seed: (),
        providers={
            OURS: pass_over(lambda: ours(images, data(), training)),
            "torchvision, transforms in workers": pass_over(
                lambda: torchvision_v2(images, data(), training)
            ),
            "torchvision, in the model": pass_over(
                lambda: torchvision_model(images, data(), training)
            ),
            f"{OURS}, torchvision's resize": pass_over(
                lambda: ours(images, data(resize="torchvision"), training)
            ),
        },
        reference=truth,
        tolerance=3e-3,
    )


def pass_over(images: Callable[[], Iterable[Image_]]) -> Callable[[], Results]:
    """A provider: goes through all images and keeps a little of each, in the order of their ids."""

    def run() -> Results:
        kept = []
        for image_id, padded, size, boxes, labels in images():
            few = padded[:, ::PIXEL_STEP, ::PIXEL_STEP].contiguous()
            kept.append((image_id, few, [*size, *padded.shape[1:]], boxes.clone(), labels.clone()))
        kept.sort(key=lambda one: one[0])
        _, few, sizes, boxes, labels = zip(*kept, strict=True)
        return (
            torch.tensor(sizes, dtype=torch.float64),
            torch.nn.functional.avg_pool2d(torch.stack(few).double(), PIXEL_MEAN),
            # The errors of sines are those of the coordinates, however large these are.
            torch.cat(boxes).double().sin(),
            torch.cat(labels).double(),
        )

    return run


# ---- the line-up --------------------------------------------------------------------------------


def ours(images: int, data: DataConfig, training: bool) -> Iterator[Image_]:
    make = train_transforms if training else eval_transforms
    dataset = _dataset(images, make(data))
    if training:
        loader = training_loader(dataset, data, BATCH, iterations=images // BATCH)
    else:
        loader = eval_loader(dataset, data, BATCH)
    for batch in loader:
        for i, image_id in enumerate(batch.image_ids):
            count = int(batch.counts[i])
            size = batch.image_sizes[i].tolist()
            yield image_id, batch.images[i], size, batch.boxes[i, :count], batch.labels[i, :count]


def torchvision_v2(images: int, data: DataConfig, training: bool) -> Iterator[Image_]:
    resize = v2.RandomShortestSize(data.min_sizes, data.max_size)
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    flip = [v2.RandomHorizontalFlip(data.flip_probability)] if training else []
    transforms = v2.Compose([v2.ToImage(), resize, *flip, *normalize, v2.ToPureTensor()])
    loader = _torchs_loader(images, transforms, data.workers, training, _pad)
    for padded, sizes, targets in loader:
        for image, size, target in zip(padded, sizes, targets, strict=True):
            yield target["image_id"], image, size, target["boxes"], target["labels"] - 1


def torchvision_model(images: int, data: DataConfig, training: bool) -> Iterator[Image_]:
    flip = [v2.RandomHorizontalFlip(data.flip_probability)] if training else []
    to_float = v2.ToDtype(torch.float32, scale=True)
    transforms = v2.Compose([v2.ToImage(), *flip, to_float, v2.ToPureTensor()])
    batched = GeneralizedRCNNTransform(data.min_sizes, data.max_size, data.mean, data.std)
    batched.train(training)
    for given in _torchs_loader(images, transforms, data.workers, training, _as_lists):
        found, targets = batched(*given)
        for image, size, target in zip(found.tensors, found.image_sizes, targets, strict=True):
            yield target["image_id"], image, size, target["boxes"], target["labels"] - 1


def exact(images: int, data: DataConfig, training: bool) -> Iterator[Image_]:
    """In float64, picture by picture, without a loader or transforms."""
    dataset = _dataset(images, None)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (data.mean, data.std))
    scale = min(data.min_sizes[0] / HEIGHT, data.max_size / WIDTH)
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    for i in range(len(dataset)):
        pixels, boxes, labels, image_id, _ = dataset[i]
        boxes = boxes.double()
        if training:
            pixels = pixels.flip(2)
            boxes[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
        boxes *= torch.tensor([width / WIDTH, height / HEIGHT]).double().repeat(2)
        normal = (pixels.double() / 255 - mean) / std
        resized = torch.nn.functional.interpolate(normal[None], (height, width), mode="bilinear")
        padded = torch.zeros(3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.float64)
        padded[:, :height, :width] = resized[0]
        yield image_id, padded, (height, width), boxes, labels


def _dataset(images: int, transforms: Any) -> CocoDataset:
    return CocoDataset(pictures(images) / "boxes.json", transforms=transforms)


@functools.cache
def _coco_detection(images: int) -> Any:
    folder = pictures(images)
    with contextlib.redirect_stdout(io.StringIO()):
        return CocoDetection(folder / "images", folder / "boxes.json")


def _torchs_loader(
    images: int, transforms: Any, workers: int, training: bool, collate: Callable[..., Any]
) -> DataLoader[Any]:
    dataset = _coco_detection(images)
    dataset.transforms = transforms
    dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=("image_id", "boxes", "labels"))
    return DataLoader(
        dataset,
        BATCH,
        shuffle=training,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def _as_lists(samples: Sequence[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _pad(
    samples: Sequence[tuple[Tensor, Any]],
) -> tuple[Tensor, list[tuple[int, ...]], list[Any]]:
    """By torchvision's own function."""
    images, targets = _as_lists(samples)
    batched = GeneralizedRCNNTransform(0, 0, [], [])
    return batched.batch_images(images), [tuple(image.shape[1:]) for image in images], targets


# ---- the pictures -------------------------------------------------------------------------------


@functools.cache
def pictures(count: int) -> Path:
    """A folder of boxes.json and images/; gone when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="pictures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, count + 1):
        scene = _scene(random)
        grain = random.normal(0, GRAIN, scene.pixels.shape)
        pixels = np.clip(scene.pixels + grain, 0, 255).astype(np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(pixels).save(folder / "images" / name, quality=QUALITY)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for (x0, y0, x1, y1), label in zip(scene.boxes, scene.labels, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1}
                | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def _scene(random: np.random.Generator) -> Scene:
    """One that is as large as can be, and not empty: torchvision has no boxes for those."""
    while True:
        scene = draw_scene(random, (HEIGHT, WIDTH))
        if scene.pixels.shape == (HEIGHT, WIDTH, 3) and scene.boxes:
            return scene


if __name__ == "__main__":
    sys.exit(main(OP, cases))
