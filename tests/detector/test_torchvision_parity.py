"""The preset ``torchvision`` is torchvision's FCOS: the same weights and images, the same numbers.

Both networks run here. What precedes and follows the convolutions agrees as follows:

- Images, features, head outputs, targets, and boxes and labels of detections: to the bit.
- Losses and gradients: to a relative 1e-6 and 5e-6. Both sum the same float32 terms in another
  order, and torchvision decodes boxes to pixels first, where coordinates of 1,000 are 6e-5 apart.
- Scores: to 2e-7, as our sigmoid is rounded once and PyTorch's is not. So detections whose scores
  are closer than that may change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from fcos.convert import torchvision as converter
from fcos.data.padding import pad_images
from fcos.data.transforms import prepare_image, resized_size
from fcos.locations import level_grids
from fcos.losses import assign, fcos_losses, step_normalizers
from fcos.predict import Predictor
from fcos.presets import torchvision
from fcos_ext.grids import Grid
from tests.detector.torchvision_twins import (
    Size,
    Twins,
    as_batch,
    as_floats,
    make_full,
    make_narrow,
    make_twins,
    random_images,
)
from tests.integrations.torchvision_models import make_targets

SMALL = {"min_size": 192, "max_size": 320}
LARGE = {"min_size": 800, "max_size": 1333}
MIXED = [(333, 500), (500, 333), (120, 400)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    yield


def check_training(twins: Twins, sizes: list[Size], counts: list[int], seed: int = 0) -> None:
    """Images, outputs, targets, every loss term, and the gradient of every weight."""
    theirs, ours, config = twins.theirs.train(), twins.ours.train(), twins.config
    images = random_images(sizes, seed)
    targets = make_targets(sizes, counts, config.model.num_classes or 0, seed)
    batch = as_batch(images, targets, config.data)
    seen: dict[str, Any] = {}
    handles = [
        theirs.backbone.register_forward_pre_hook(lambda _, x: seen.update(images=x[0])),
        theirs.head.register_forward_hook(lambda _, __, outputs: seen.update(outputs)),
    ]
    compute_loss = theirs.head.compute_loss

    def recorded(*arguments: Any) -> dict[str, Tensor]:
        seen["matched"] = torch.stack(arguments[3])
        return compute_loss(*arguments)

    theirs.head.compute_loss = recorded  # type: ignore[method-assign]
    losses = theirs(as_floats(images), targets)
    for handle in handles:
        handle.remove()
    theirs.head.compute_loss = compute_loss  # type: ignore[method-assign]

    assert torch.equal(batch.images, seen["images"])
    predictions = ours(batch.images)
    for levels, name in zip(
        predictions, ("cls_logits", "bbox_regression", "bbox_ctrness"), strict=True
    ):
        rows = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        assert torch.equal(rows, seen[name]), name

    size = (batch.images.shape[2], batch.images.shape[3])
    assigned = assign(size, config.model, batch.boxes, batch.labels, batch.counts)
    first = torch.arange(len(sizes))[:, None] * batch.boxes.shape[1]
    matched = torch.where(assigned.matched < 0, -1, assigned.matched - first)
    assert torch.equal(matched, seen["matched"])

    normalizers = step_normalizers([assigned], config.loss)
    terms = fcos_losses(predictions, assigned, normalizers, config.loss)
    for ours_is, theirs_is in zip(terms.items(), losses.items(), strict=True):
        (name, value), (_, truth) = ours_is, theirs_is
        assert value.item() == pytest.approx(truth.item(), rel=1e-6, abs=1e-7), name

    sum(losses.values()).backward()  # type: ignore[union-attr]
    sum(terms.values()).backward()  # type: ignore[union-attr]
    for name, (own, other) in twins.parameters().items():
        if not own.requires_grad:  # the preset freezes the stem and layer1 whatever torchvision has
            assert name.startswith(("backbone.body.conv1", "backbone.body.layer1"))
            continue
        assert own.grad is not None and other.grad is not None, name
        difference, truth = (own.grad - other.grad).norm(), other.grad.norm()
        assert difference <= 5e-6 * truth + 1e-7, (name, difference.item(), truth.item())


def check_detections(twins: Twins, sizes: list[Size], seed: int = 0) -> None:
    theirs, config = twins.theirs.eval(), twins.config
    images = random_images(sizes, seed)
    with torch.no_grad():
        truths = theirs(as_floats(images))
    names = [str(label) for label in range(config.model.num_classes or 0)]
    predictor = Predictor(twins.ours, config, names, device="cpu")
    found = predictor.predict(images, score_threshold=0.0, batch_size=len(images))
    assert isinstance(found, list)
    for detections, truth in zip(found, truths, strict=True):
        assert len(detections) == len(truth["boxes"]) > 0
        scores = torch.as_tensor(detections.scores)
        torch.testing.assert_close(scores, truth["scores"], rtol=0, atol=2e-7)
        own = in_fixed_order(
            torch.as_tensor(detections.boxes), torch.as_tensor(detections.labels), scores
        )
        other = in_fixed_order(truth["boxes"], truth["labels"], truth["scores"])
        assert [row[:5] for row in own] == [row[:5] for row in other]
        for row, true_row in zip(own, other, strict=True):
            assert row[5] == pytest.approx(true_row[5], abs=2e-7)


def in_fixed_order(boxes: Tensor, labels: Tensor, scores: Tensor) -> list[list[float]]:
    """Rows of box, label and score, in an order that does not depend on nearly equal scores."""
    rows: list[list[float]] = torch.column_stack([boxes, labels, scores]).tolist()
    return sorted(rows)


@pytest.mark.parametrize("seed", range(3))
def test_training_of_mixed_sizes(seed: int) -> None:
    """The second image has no boxes."""
    check_training(make_twins(make_narrow(**SMALL), seed), MIXED, [9, 0, 40], seed)


@pytest.mark.parametrize("counts", [[7], [0], [0, 0]], ids=str)
def test_training_of_few_boxes(counts: list[int]) -> None:
    check_training(make_twins(make_narrow(**SMALL)), [(333, 500)] * len(counts), counts)


@pytest.mark.parametrize("seed", range(3))
def test_detections_of_mixed_sizes(seed: int) -> None:
    twins = make_twins(make_narrow(**SMALL), seed)
    check_detections(twins, MIXED, seed)
    check_detections(twins, [(333, 500)], seed)


@pytest.mark.parametrize(
    "options",
    [
        {},  # up to 1,000 candidates a level
        {"topk_candidates": 150},  # so few that torchvision moves the classes apart
        {"score_thresh": 0.5, "nms_thresh": 0.3},
        {"score_thresh": 0.0, "topk_candidates": 20, "nms_thresh": 1.0},
    ],
    ids=str,
)
def test_detections_without_a_limit(options: dict[str, Any]) -> None:
    """All that NMS leaves, not only the best 100."""
    check_detections(make_twins(make_narrow(**SMALL, **options, detections_per_img=5000)), MIXED)


def test_defaults() -> None:
    """The limits that the twins take from torchvision's model are the preset's."""
    assert make_twins(make_narrow()).config.postprocess == torchvision().postprocess
    data = make_twins(make_narrow()).config.data
    assert replace(data, flip_probability=0.5) == torchvision().data


def test_large_images() -> None:
    twins = make_twins(make_narrow(**LARGE))
    check_training(twins, [(800, 1333)], [30])
    check_detections(twins, [(800, 1333)])


def test_resnet50() -> None:
    """The network that is published, but for its weights."""
    twins = make_twins(make_full(**SMALL))
    assert twins.config.model == replace(torchvision().model, num_classes=91)
    check_training(twins, [(333, 500)], [12])
    check_detections(twins, [(333, 500)])


@pytest.mark.parametrize("padded", [(800, 1088), (800, 1344), (1344, 1088), (32, 32), (352, 512)])
def test_locations(padded: Size) -> None:
    model = make_narrow()
    strides = torchvision().model.strides
    features = [torch.zeros(1, 1, -(-padded[0] // s), -(-padded[1] // s)) for s in strides]
    (anchors,) = model.anchor_generator(ImageList(torch.zeros(1, 3, *padded), [padded]), features)
    expected = (anchors[:, :2] + anchors[:, 2:]) / 2
    places = []
    for level, grid in zip(features, level_grids(padded, strides, "torchvision"), strict=True):
        assert isinstance(grid, Grid)
        y, x = (torch.arange(n) * step for n, step in zip(level.shape[2:], grid.step, strict=True))
        places.append(torch.cartesian_prod(y, x).flip(1))
    assert torch.equal(torch.cat(places).float(), expected)


@pytest.mark.parametrize("scale", [800, 600, 320])
def test_image_sizes(scale: int) -> None:
    """480 * (800 / 480) may be a little below 800, and is rounded down."""
    transform = make_narrow(min_size=scale, max_size=scale * 5 // 3).transform.eval()
    for height in (*range(1, 30, 7), *range(200, 900, 17)):
        for width in (5, 333, 480, 500, 640, 1333):
            image = torch.zeros(1, 1, 1).expand(1, height, width)
            if max(height, width) > 20 * min(height, width):
                continue
            theirs = transform.resize(image)[0].shape[1:]
            assert resized_size(height, width, scale, scale * 5 // 3, "torchvision") == theirs


def test_images() -> None:
    images = random_images([(333, 500), (97, 61), (640, 480)])
    model = make_narrow(min_size=256, max_size=400).eval()
    data = make_twins(model).config.data
    prepared, sizes = pad_images([prepare_image(image, data) for image in images])
    truth, _ = model.transform(as_floats(images))
    assert torch.equal(prepared, truth.tensors)
    assert [tuple(size) for size in sizes.tolist()] == truth.image_sizes


def test_round_trip() -> None:
    """What the file of fcos_resnet50_fpn's published weights holds: 319 tensors."""
    model = make_full()
    state = model.state_dict()
    assert len(state) == 319
    assert sum(parameter.numel() for parameter in model.parameters()) == 32_269_600
    twins = make_twins(model, seed=3)
    assert sum(parameter.numel() for parameter in twins.ours.parameters()) == 32_269_600
    back = converter.from_ours(twins.ours.state_dict(), twins.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
