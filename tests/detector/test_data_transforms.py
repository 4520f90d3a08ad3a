"""Boxes must follow the pixels, and prediction must see what evaluation sees."""

import math

import pytest
import torch
from torchvision import tv_tensors

from fcos.config import DataConfig
from fcos.data.transforms import eval_transforms, prepare_image, resized_size, train_transforms

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "flip_probability": 0.0}


def rectangle(height, width, box):
    """A white rectangle on black, and its box as a target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([box], dtype=torch.float32), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([4])}


def extent(image):
    """xyxy of the white rectangle, to a fraction of a pixel: its mass and its centre."""
    result = []
    for dim in (1, 0):  # columns, then rows
        profile = image[0].amax(dim - 1).double()
        mass = profile.sum().item()
        places = torch.arange(len(profile)) + 0.5
        centre = (profile * places).sum().item() / mass
        result.append((centre - mass / 2, centre + mass / 2))
    (x1, x2), (y1, y2) = result
    return [x1, y1, x2, y2]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("shorter", [37, 90, 101, 256])
@pytest.mark.parametrize("size", [(101, 173), (173, 101), (90, 90)])
@pytest.mark.parametrize("rule", ["round", "truncate", "torchvision", "opencv"])
def test_boxes_follow_the_pixels(rule, size, shorter, flip):
    changes = {"flip_probability": flip, "resize": rule}
    config = DataConfig(**PLAIN | changes, min_sizes=(shorter,), max_size=300)
    image, target = rectangle(*size, (21, 30, 66, 70))
    image, target = train_transforms(config)(image, target)
    assert tuple(image.shape[1:]) == resized_size(*size, shorter, 300, rule)
    # what is not antialiased loses up to half a pixel when it shrinks
    tolerance = 0.5 if rule in ("torchvision", "opencv") and shorter < min(size) else 0.1
    assert target["boxes"][0].tolist() == pytest.approx(extent(image), abs=tolerance)
    assert target["labels"].tolist() == [4]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["truncate", "opencv"])
def test_boxes_that_end_at_pixels(rule, flip):
    """The last pixel is scaled, and mirrored at the last column of the picture."""
    config = DataConfig(**PLAIN | {"flip_probability": flip, "resize": rule}, min_sizes=(202,))
    image, target = rectangle(101, 173, (21, 30, 66, 70))
    image, target = train_transforms(config, "pixels")(image, target)
    height, width = image.shape[1:]
    ratio = width / 173
    x0, y0, x1, y1 = 21 * ratio, 30 * height / 101, 65 * ratio, 69 * height / 101
    if flip:
        x0, x1 = width - x1 - 1, width - x0 - 1
    assert target["boxes"][0].tolist() == pytest.approx([x0, y0, x1 + 1, y1 + 1], abs=1e-4)


def test_boxes_scale_by_the_true_ratio():
    image, target = rectangle(101, 173, (0, 0, 173, 101))
    image, target = eval_transforms(DataConfig(min_sizes=(60,), max_size=300))(image, target)
    assert target["boxes"].tolist() == [[0, 0, image.shape[2], image.shape[1]]]


@pytest.mark.parametrize(
    ("size", "shorter", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 900), 800, 1333, (444, 1333)),  # 444.33: the longer side decides
        ((500, 500), 500, 1333, (500, 500)),
        ((1, 5000), 800, 1333, (1, 1333)),  # never empty
    ],
)
def test_resized_size(size, shorter, longest, expected):
    assert resized_size(*size, shorter, longest) == expected


@pytest.mark.parametrize(
    ("size", "rule", "expected"),
    [
        ((480, 640), "truncate", (800, 1066)),  # 1066.67
        ((640, 480), "truncate", (1066, 800)),
        ((300, 900), "truncate", (444, 1332)),  # 444.33 is rounded, and 1332 follows
        ((301, 900), "truncate", (446, 1333)),  # 445.81, and 1333.55
        ((800, 1000), "truncate", (800, 1000)),
        ((1, 5000), "truncate", (1, 5000)),
        ((480, 640), "torchvision", (800, 1066)),
        ((300, 900), "torchvision", (444, 1333)),
        ((301, 900), "torchvision", (445, 1333)),
        ((1, 5000), "torchvision", (1, 1333)),
    ],
)
def test_other_rules_of_size(size, rule, expected):
    assert resized_size(*size, 800, 1333, rule) == expected


def test_torchvision_resizes_after_normalisation_without_antialiasing():
    image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8)
    config = DataConfig(min_sizes=(30,), max_size=100, resize="torchvision")
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))
    expected = torch.nn.functional.interpolate(
        ((image.float() / 255 - mean) / std)[None], size=(30, 40), mode="bilinear"
    )
    assert torch.equal(prepare_image(image, config), expected[0])


def test_resized_size_keeps_its_promise():
    for height in range(1, 700, 13):
        for width in range(1, 700, 17):
            new = resized_size(height, width, 320, 533)
            assert max(new) <= 533
            assert min(new) == 320 or max(new) == 533
            scale = min(320 / min(height, width), 533 / max(height, width))
            for side, before in zip(new, (height, width), strict=True):
                assert abs(side - before * scale) <= 0.5 + 1e-9 or side == 1


def test_training_draws_every_size_and_evaluation_uses_the_last():
    config = DataConfig(min_sizes=(32, 48, 40), max_size=1000)
    image, target = rectangle(50, 80, (1, 1, 5, 5))
    seen = {min(train_transforms(config)(image, target)[0].shape[1:]) for _ in range(50)}
    assert seen == {32, 48, 40}
    assert eval_transforms(config)(image, target)[0].shape == (3, 40, 64)


def test_flip_probability():
    image, target = rectangle(20, 20, (0, 0, 5, 5))
    transform = train_transforms(DataConfig(min_sizes=(20,), flip_probability=0.3))
    torch.manual_seed(0)
    flips = sum(transform(image, target)[1]["boxes"][0, 0].item() == 15 for _ in range(400))
    assert abs(flips / 400 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)


def test_photometric_changes_colours_only():
    config = DataConfig(**PLAIN, min_sizes=(30,), photometric=True)
    image, target = rectangle(30, 40, (3, 4, 20, 21))
    image[:] = image // 2 + torch.tensor([10, 60, 110], dtype=torch.uint8)[:, None, None]
    changed, after = train_transforms(config)(image, target)
    assert torch.equal(after["boxes"], target["boxes"])
    assert (changed - image / 255).abs().max() > 0.01
    assert changed.min() >= 0 and changed.max() <= 1


def test_normalisation():
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    config = DataConfig(min_sizes=(24,), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    expected = (image / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(prepare_image(image, config), expected, atol=1e-6)


def test_prediction_sees_what_evaluation_sees():
    image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8)
    config = DataConfig(min_sizes=(32, 50), max_size=66)
    _, target = rectangle(61, 83, (0, 0, 5, 5))
    evaluated, _ = eval_transforms(config)(tv_tensors.Image(image), target)
    prepared = prepare_image(image, config)
    assert type(prepared) is torch.Tensor and prepared.dtype == torch.float32
    assert torch.equal(prepared, evaluated)


def test_images_without_boxes():
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(30, 40))
    config = DataConfig(min_sizes=(60,), flip_probability=1.0, photometric=True)
    target = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64)}
    image = tv_tensors.Image(torch.zeros(3, 30, 40, dtype=torch.uint8))
    image, target = train_transforms(config)(image, target)
    assert image.shape == (3, 60, 80)
    assert target["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4, 5),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 5, dtype=torch.uint8),
        torch.zeros(3, 0, 5, dtype=torch.uint8),
    ],
)
def test_prepare_image_errors(image):
    with pytest.raises(ValueError, match=r"image must be uint8 \[3, H, W\], got"):
        prepare_image(image, DataConfig())
