"""Resizing as OpenCV does it, against what OpenCV itself made."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from fcos.config import DataConfig
from fcos.data.opencv import resize_bilinear
from fcos.data.transforms import prepare_image, resized_size, train_transforms

STORED = json.loads(Path(__file__).with_name("opencv_resized.json").read_text())


def picture(height: int, width: int) -> Tensor:
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return ((31 * y * y + 17 * x * x + 7 * x * y + 13 * x) % 256).to(torch.uint8)


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: f"{case['from']} {case['to']}")
def test_equals_opencv(case: dict) -> None:
    expected = torch.frombuffer(bytearray.fromhex(case["pixels"]), dtype=torch.uint8)
    image = picture(*case["from"])
    assert torch.equal(resize_bilinear(image, case["to"]), expected.view(case["to"]))
    channels = torch.stack([image, 255 - image, image])
    assert torch.equal(resize_bilinear(channels, case["to"])[2], expected.view(case["to"]))
    # channels innermost in memory, as decoders leave them
    inner = channels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(resize_bilinear(inner, case["to"]), resize_bilinear(channels, case["to"]))


def test_transforms_use_it() -> None:
    data = DataConfig(
        min_sizes=(20,),
        max_size=60,
        resize="opencv",
        pixel_range=255,
        std=(1, 1, 1),
        mean=(0, 0, 0),
    )
    image = torch.stack([picture(31, 43)] * 3)
    size = resized_size(31, 43, 20, 60, "opencv")
    assert size == resized_size(31, 43, 20, 60, "round") == (20, 28)
    expected = resize_bilinear(image, size).float()
    assert torch.equal(prepare_image(image, data), expected)
    box = tv_tensors.BoundingBoxes([[4.0, 3, 40, 30]], format="XYXY", canvas_size=(31, 43))
    unflipped = DataConfig(**(vars(data) | {"flip_probability": 0.0}))
    prepared, target = train_transforms(unflipped)(tv_tensors.Image(image), {"boxes": box})
    assert torch.equal(prepared, expected)
    ratio = torch.tensor([28 / 43, 20 / 31]).repeat(2)
    torch.testing.assert_close(torch.as_tensor(target["boxes"]), torch.as_tensor(box) * ratio)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (torch.zeros(3, 4, 4), (2, 2), "image must be uint8 .* got torch.float32"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), (2, 2), r"with pixels, got .* \[3, 0, 4\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), (0, 2), r"size must be .* got \(0, 2\)"),
    ],
)
def test_errors(image: Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^resize_bilinear: .*{message}"):
        resize_bilinear(image, size)
