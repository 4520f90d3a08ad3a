"""Batches: padding and packing, and an order that workers, ranks and restarts leave alone."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fcos.config import DataConfig
from fcos.data.batches import (
    Sample,
    TrainingBatches,
    collate,
    eval_loader,
    training_loader,
)
from fcos.data.coco import CocoDataset
from fcos.data.images import ImageError
from fcos.data.padding import fixed_shapes, pad_images, padded_size
from fcos.data.transforms import eval_transforms, resized_size, train_transforms

CONFIG = DataConfig(min_sizes=(24, 32, 40), max_size=64, photometric=True, workers=0)


def sample(height, width, boxes, image_id=0):
    return Sample(
        torch.rand(3, height, width),
        torch.rand(boxes, 4),
        torch.arange(boxes),
        image_id,
        (2 * height, 2 * width),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 noise pictures, 7 wide and 4 upright, with 0 to 4 boxes."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    document = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(11):
        height, width = (30, 40) if number % 3 or number == 0 else (44, 28)
        if number == 10:
            height, width = 44, 28
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        document["images"].append(
            {"id": 50 - number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for _ in range(number % 5):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]),
                    "image_id": 50 - number,
                    "category_id": 1,
                    "bbox": random.integers(1, 14, 4).tolist(),
                }
            )
    (folder / "set.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def training(folder):
    return CocoDataset(folder / "set.json", transforms=train_transforms(CONFIG))


def test_pad_images():
    images = [torch.rand(3, 33, 20) + 1, torch.rand(3, 10, 64) + 1]
    padded, sizes = pad_images(images)
    assert padded.shape == (2, 3, 64, 64)
    assert sizes.tolist() == [[33, 20], [10, 64]] and sizes.dtype == torch.int64
    for image, slot in zip(images, padded, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(slot[:, :height, :width], image)
        assert not slot[:, height:].any() and not slot[:, :, width:].any()
    with pytest.raises(ValueError, match="at least one image"):
        pad_images([])


def test_pad_images_to_a_shape():
    images = [torch.rand(3, 33, 20) + 1, torch.rand(3, 10, 64) + 1]
    shapes = [(96, 96), (64, 128), (64, 96), (32, 320)]
    padded, sizes = pad_images(images, shapes)
    assert padded.shape == (2, 3, 64, 96) and sizes.tolist() == [[33, 20], [10, 64]]
    assert torch.equal(padded[:, :, :64, :64], pad_images(images)[0]) and not padded[..., 64:].any()
    assert pad_images(images, shapes[3:])[0].shape == (2, 3, 64, 64)  # none is large enough
    assert pad_images(images, shapes[3:], "beyond")[0].shape == (2, 3, 64, 96)


def test_padding_beyond():
    """(n | 31) + 1"""
    for n in (1, 31, 32, 33, 800, 831, 832, 1333):
        assert padded_size((n, n + 7), (), "beyond") == ((n | 31) + 1, (n + 7 | 31) + 1)
    assert padded_size((800, 1333), (), "beyond") == (832, 1344)
    batch = collate([sample(64, 32, 1)], padding="beyond")
    assert batch.images.shape == (1, 3, 96, 64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            [(800, w) for w in (960, 1088, 1216, 1344)]
            + [(h, 800) for h in (960, 1088, 1216, 1344)]
            + [(1344, 1344)],
        ),
        ({"min_sizes": (640, 64), "max_size": 640}, [(640, 640)]),
        ({"min_sizes": (900,), "max_size": 512}, [(512, 512)]),
        ({"image_shapes": ((64, 96),)}, [(64, 96)]),
        ({"image_shapes": ((64, 96),), "padding": "beyond"}, [(64, 96)]),
        ({"min_sizes": (640, 64), "max_size": 640, "padding": "beyond"}, [(672, 672)]),
        (
            {"max_size": 1000, "padding": "beyond"},
            [(832, w) for w in (896, 928, 992, 1024)]
            + [(h, 832) for h in (896, 928, 992, 1024)]
            + [(1024, 1024)],
        ),
    ],
)
def test_fixed_shapes(settings, expected):
    assert list(fixed_shapes(DataConfig(**settings))) == expected


def test_fixed_shapes_hold_whatever_is_resized():
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = random.integers(32, 900, random.integers(1, 4)).tolist()
        config = DataConfig(min_sizes=tuple(sizes), max_size=int(random.integers(32, 1400)))
        config = replace(config, padding=str(random.choice(["multiple", "beyond"])))
        shapes = fixed_shapes(config)
        assert len(shapes) <= 9
        image = random.integers(1, 3000, 2).tolist()
        size = resized_size(*image, int(random.choice(sizes)), config.max_size)
        assert padded_size(size, shapes) in shapes


def test_collate():
    samples = [sample(30, 40, 2, 5), sample(20, 70, 0, 6), sample(33, 10, 3, 4)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.counts.tolist() == [2, 0, 3] and batch.counts.dtype == torch.int64
    assert batch.boxes.shape == (3, 3, 4) and batch.boxes.dtype == torch.float32
    assert torch.equal(batch.boxes[2], samples[2].boxes)
    assert torch.equal(batch.boxes[0, :2], samples[0].boxes) and not batch.boxes[0, 2:].any()
    assert batch.labels.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert batch.labels.dtype == torch.int64
    assert batch.image_ids == [5, 6, 4] and len(batch) == 3
    assert batch.image_sizes.tolist() == [[30, 40], [20, 70], [33, 10]]
    assert batch.original_sizes.tolist() == [[60, 80], [40, 140], [66, 20]]


def test_collate_to_fixed_sizes():
    samples = [sample(30, 40, 2, 5), sample(20, 70, 0, 6)]
    batch = collate(samples, [(64, 128)], max_boxes=4)
    assert batch.images.shape == (2, 3, 64, 128)
    assert batch.boxes.shape == (2, 4, 4) and batch.counts.tolist() == [2, 0]
    with pytest.raises(ValueError, match="image 5 must have at most max_boxes = 1 boxes, got 2"):
        collate(samples, max_boxes=1)


def test_collate_without_any_box():
    batch = collate([sample(8, 8, 0), sample(8, 8, 0)])
    assert batch.boxes.shape == (2, 0, 4) and batch.labels.dtype == torch.int64
    assert batch.counts.tolist() == [0, 0]


def test_to_another_format():
    batch = collate([sample(8, 8, 1), sample(8, 9, 2)])
    moved = batch.to("cpu", torch.channels_last)
    assert moved.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.images, batch.images)
    on_meta = batch.to("meta")
    tensors = [value for value in vars(on_meta).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 and all(value.is_meta for value in tensors)


def test_loader_with_few_shapes(training):
    config = replace(CONFIG, group_by_aspect_ratio=False)
    shapes = fixed_shapes(config)
    most = max(len(training.target(i)[0]) for i in range(len(training)))
    assert training.max_boxes == most > 0
    for batch in training_loader(training, config, 4, iterations=6, fixed=True):
        assert tuple(batch.images.shape[2:]) in shapes
        assert batch.boxes.shape == (4, most, 4)
    boxes = {b.boxes.shape[1] for b in training_loader(training, config, 4, iterations=6)}
    assert len(boxes) > 1, "the data set is too uniform to show a difference"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("upright", "wide", "size"), [(30, 71, 8), (8, 93, 8), (3, 98, 8), (0, 5, 8)]
)
def test_every_image_once_an_epoch(upright, wide, size, grouped):
    ratios = np.array([0.7] * upright + [1.0, 1.4] * (wide // 2) + [1.5] * (wide % 2))
    count = len(ratios)
    batches = TrainingBatches(ratios, size, seed=3, group_by_aspect_ratio=grouped)
    needed = 4 * -(-count // size) + 4
    seen = Counter(item for t in range(needed) for item in batches.global_batch(t))
    assert set(seen.values()) == {1}
    for epoch in range(3):
        assert sorted(i.position for i in seen if i.epoch == epoch) == list(range(count))
    # No kind of image falls behind by more than a batch or two.
    first = {i.position for t in range(-(-count // size) + 2) for i in batches.global_batch(t)}
    assert first == set(range(count))


def test_grouping():
    ratios = np.where(np.arange(100) % 3 == 0, 0.7, 1.3)
    grouped = TrainingBatches(ratios, 8)
    kinds = []
    for t in range(100):
        batch = {bool(ratios[item.position] < 1) for item in grouped.global_batch(t)}
        assert len(batch) == 1
        kinds += batch
    assert abs(sum(kinds) - 34) <= 1  # 34 of the 100 images are upright
    mixed = TrainingBatches(ratios, 8, group_by_aspect_ratio=False)
    assert any(len({ratios[i.position] for i in mixed.global_batch(t)}) == 2 for t in range(20))


def test_order_differs_between_epochs_and_seeds():
    def order(seed, epoch):
        batches = TrainingBatches([1.0] * 50, 50, seed=seed)
        return [item.position for item in batches.global_batch(epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), list(range(50))]
    assert len({tuple(value) for value in orders}) == 5
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batches_of_one_process(world_size):
    ratios = [0.5, 2.0] * 20
    whole = list(TrainingBatches(ratios, 6, iterations=20))
    shares = [
        list(TrainingBatches(ratios, 6, iterations=20, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_resume():
    ratios = [0.5, 2.0, 2.0] * 11
    whole = list(TrainingBatches(ratios, 4, iterations=40))
    for start in (0, 1, 7, 39, 40, 41):
        resumed = TrainingBatches(ratios, 4, start_iteration=start, iterations=40)
        assert list(resumed) == whole[start:]
        assert len(resumed) == len(whole[start:])


def test_without_end():
    batches = TrainingBatches([1.0] * 3, 2)
    stream = iter(batches)
    assert [next(stream) for _ in range(50)] == [batches.global_batch(t) for t in range(50)]
    with pytest.raises(TypeError, match="no length"):
        len(batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aspect_ratios": []}, "at least one image"),
        ({"batch_size": 0}, "batch_size must be a positive multiple .* 1 x 1, got 0"),
        ({"batch_size": 6, "world_size": 4}, "batch_size must be .* 4 x 1, got 6"),
        ({"batch_size": 6, "world_size": 2, "accumulation": 2}, "2 x 2, got 6"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size, got 2 and 2"),
        ({"seed": -1}, "must not be negative, got -1 and 0"),
        ({"start_iteration": -1}, "must not be negative, got 0 and -1"),
    ],
)
def test_training_batches_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(**{"aspect_ratios": [1.0, 1.0], "batch_size": 4} | arguments)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def load(dataset, workers, **arguments):
    config = DataConfig(workers=workers)
    return list(training_loader(dataset, config, 4, seed=5, iterations=7, **arguments))


def test_workers_change_nothing(training):
    alone, helped = load(training, 0), load(training, 2)
    assert len(alone) == 7
    assert len({tuple(batch.images.shape) for batch in alone}) > 1  # the sizes are random
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_ranks_and_restarts_change_nothing(training):
    whole = load(training, 0)
    resumed = load(training, 0, start_iteration=5)
    assert all(same(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    left, right = (load(training, 0, rank=rank, world_size=2) for rank in (0, 1))
    for a, b, both in zip(left, right, whole, strict=True):
        assert a.image_ids + b.image_ids == both.image_ids
        assert torch.equal(torch.cat([a.counts, b.counts]), both.counts)
        found, expected = [*a.boxes, *b.boxes], both.boxes
        for i, count in enumerate(both.counts):
            assert torch.equal(found[i][:count], expected[i, :count])
        height, width = both.image_sizes[0].tolist()
        assert torch.equal(a.images[0, :, :height, :width], both.images[0, :, :height, :width])


def test_loaders_leave_the_global_generator_alone(training):
    state = torch.get_rng_state()
    load(training, 0)
    list(eval_loader(training, CONFIG, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_set_smaller_than_a_batch(training):
    batch = next(iter(training_loader(training, CONFIG, 24, iterations=1)))
    assert len(batch) == 24 and len(set(batch.image_ids)) == 11


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_evaluation_sees_each_image_once_in_order(folder, world_size):
    dataset = CocoDataset(folder / "set.json", transforms=eval_transforms(CONFIG))
    ids = [
        number
        for rank in range(world_size)
        for batch in eval_loader(dataset, CONFIG, 4, rank, world_size)
        for number in batch.image_ids
    ]
    assert ids == dataset.image_ids


def test_eval_loader_errors(training):
    with pytest.raises(ValueError, match="rank < world_size, got 1 and 1"):
        eval_loader(training, CONFIG, 4, 1, 1)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        eval_loader(training, CONFIG, 0)


def test_a_bad_picture_is_named_by_a_worker(folder, tmp_path):
    (tmp_path / "set.json").write_text((folder / "set.json").read_text())
    for number in range(11):
        content = (folder / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(content if number != 6 else content[:100])
    dataset = CocoDataset(tmp_path / "set.json", transforms=eval_transforms(CONFIG))
    with pytest.raises(ImageError, match=r"6\.png: cannot be decoded"):
        list(eval_loader(dataset, DataConfig(workers=2), 4))


UNFINISHED = """
import sys
from fcos.config import DataConfig
from fcos.data.batches import eval_loader
from fcos.data.coco import CocoDataset
from fcos.data.transforms import eval_transforms

config = DataConfig(workers=2)
dataset = CocoDataset(sys.argv[1], transforms=eval_transforms(config))
batches = iter(eval_loader(dataset, config, 1))
next(batches)
print("leaving")
"""


def test_python_ends_while_workers_run(folder):
    """They ignore SIGTERM, with which multiprocessing ends its children, waiting for ever."""
    command = [sys.executable, "-c", UNFINISHED, folder / "set.json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, "leaving\n", "")


def test_workers_pad_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sending a batch copies nothing."""
    images = [torch.randn(3, 40, 32), torch.randn(3, 16, 50)]
    padded, _ = pad_images(images)
    assert not padded.is_shared()
    monkeypatch.setattr("fcos.data.padding.get_worker_info", lambda: 0)
    shared, _ = pad_images(images)
    assert shared.is_shared() and torch.equal(shared, padded)
    assert (padded[1, :, 16:] == 0).all() and (padded[:, :, :, 50:] == 0).all()
