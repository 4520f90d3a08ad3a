"""Small torchvision detectors, and what their methods take."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from fcos_ext.integrations.torchvision import AcceleratedFCOS, AcceleratedRetinaNet
from fcos_ext.integrations.torchvision.self_check import in_fixed_order

ACCELERATED: dict[type, type] = {FCOS: AcceleratedFCOS, RetinaNet: AcceleratedRetinaNet}
MODELS = [FCOS, RetinaNet]


class Backbone(nn.Module):
    """Five levels of 32 channels, at strides of 8 to 128."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.down = nn.ModuleList(nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(4))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        levels = [self.stem(images)]
        for layer in self.down:
            levels.append(layer(levels[-1].relu()))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def make_model(cls: type, num_classes: int = 7, seed: int = 0, **options: Any) -> Any:
    """With weights so large that scores differ."""
    torch.manual_seed(seed)
    model = cls(Backbone(), num_classes, **options)
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "backbone")) and parameter.dim() == 4:
            gain = 2 if "cls_logits" in name or "bbox" in name else 1
            nn.init.normal_(parameter, std=gain * (2 / parameter[0].numel()) ** 0.5)
    return model


def accelerated_copy(model: Any) -> Any:
    """Without the self-check, so that the tests see what it would hide."""
    twin = copy.deepcopy(model)
    twin.__class__ = ACCELERATED[type(model)]
    return twin


def make_targets(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], num_classes: int = 7, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Boxes of all sizes within images (height, width), some of them twice or nearly so."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for (height, width), count in zip(sizes, counts, strict=True):
        limit = torch.tensor([width, height])
        sides = (8 + torch.rand(count, 2, generator=generator) ** 3 * 600).minimum(limit)
        corner = torch.rand(count, 2, generator=generator) * (limit - sides)
        boxes = torch.cat([corner, corner + sides], dim=1)
        again = count // 4
        nudge = torch.rand(again, 4, generator=generator) * torch.tensor([0, 0, 0.05, 0.05])
        boxes[:again] = boxes[count - again :] + nudge
        labels = torch.randint(num_classes, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels})
    return targets


def make_outputs(
    model: Any,
    padded: tuple[int, int],
    images: int,
    *,
    mean: float = -4.0,
    std: float = 1.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """Random head outputs, anchors of each image, and anchors of each level."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [tuple(-(-side // stride) for side in padded) for stride in (8, 16, 32, 64, 128)]
    features = [torch.zeros(images, 1, *size, dtype=dtype) for size in sizes]
    anchors = model.anchor_generator(ImageList(torch.zeros(images, 3, *padded), [padded]), features)
    per_location = model.anchor_generator.num_anchors_per_location()[0]
    counts = [height * width * per_location for height, width in sizes]
    num_classes = model.head.classification_head.num_classes
    shape = (images, sum(counts))
    outputs = {
        "cls_logits": torch.randn(*shape, num_classes, generator=generator) * std + mean,
        "bbox_regression": torch.randn(*shape, 4, generator=generator) * 0.3,
    }
    if isinstance(model, FCOS):
        outputs["bbox_regression"] = (outputs["bbox_regression"] * 10 + 2).relu()
        outputs["bbox_ctrness"] = torch.randn(*shape, 1, generator=generator)
    outputs = {name: output.to(dtype) for name, output in outputs.items()}
    return outputs, anchors * images, counts


def loss_and_gradients(
    model: Any, cls: type, arguments: Sequence[Any], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By the method of a class; of the sum of terms with different weights."""
    leaves = {name: output.detach().clone().requires_grad_() for name, output in outputs.items()}
    # A ReLU lets no gradient through at 0.
    given = {name: leaf.relu() if (leaf >= 0).all() else leaf for name, leaf in leaves.items()}
    targets, anchors, *counts = arguments
    losses = cls.compute_loss(model, targets, given, anchors, *counts)  # type: ignore[attr-defined]
    sum(
        weight * loss for weight, loss in zip((1, 0.5, 3), losses.values(), strict=False)
    ).backward()
    return {**losses, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 2e-6) -> None:
    """Relative, in the L2 norm of each."""
    assert list(ours) == list(theirs)
    for name, truth in theirs.items():
        assert ours[name].dtype == truth.dtype, name
        difference = torch.linalg.vector_norm((ours[name] - truth).double())
        # The gradient of a bias before a normalisation is 0 but for rounding.
        assert difference <= limit * torch.linalg.vector_norm(truth.double()) + limit, name


def box_tolerance(model: Any) -> float:
    """In pixels: an exponential is rounded to the nearest number, or nearly so."""
    return 0.0 if isinstance(model, FCOS) else 5e-4


def assert_same_detections(
    ours: Sequence[dict[str, Tensor]],
    theirs: Sequence[dict[str, Tensor]],
    most: int,
    box_tolerance: float = 0.0,
) -> None:
    """Boxes and labels to the bit, scores to the last one, and in the same order.

    ``most`` is the number of detections at which they are cut. Boxes may differ by
    ``box_tolerance`` pixels.
    """
    assert len(ours) == len(theirs)
    for actual, truth in zip(ours, theirs, strict=True):
        assert list(actual) == list(truth)
        assert all(actual[name].dtype == truth[name].dtype for name in truth)
        assert torch.equal(actual["scores"], actual["scores"].sort(descending=True).values)
        torch.testing.assert_close(actual["scores"], truth["scores"], rtol=5e-7, atol=0)
        actual, truth = in_fixed_order(actual, most), in_fixed_order(truth, most)
        assert torch.equal(actual["labels"], truth["labels"])
        torch.testing.assert_close(actual["boxes"], truth["boxes"], rtol=0, atol=box_tolerance)
