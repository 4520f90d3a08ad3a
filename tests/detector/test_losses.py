"""The training loss: by hand, in scalars, in edge cases, and as something that learns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from fcos.config import LossConfig, ModelConfig, PostprocessConfig
from fcos.data.batches import Batch, Sample, collate
from fcos.data.coco import CocoDataset
from fcos.data.shapes import generate_shapes
from fcos.data.transforms import eval_transforms
from fcos.losses import Normalizers, assign, fcos_losses, start_of_moving, step_normalizers
from fcos.model import FCOS, Predictions
from fcos.postprocess import postprocess
from fcos.presets import improved, tiny
from fcos_ext import AssignedTargets

pytestmark = pytest.mark.usefixtures("one_thread")

# Not the preset, which may be tuned: the pinned numbers below hold for this network.
SMALL = ModelConfig(
    num_classes=3,
    backbone="resnet10_half",
    backbone_weights="none",
    frozen_batch_norm=True,
    frozen_stages=0,
    strides=(8, 16, 32),
    size_ranges=((0, 32), (32, 64), (64, math.inf)),
    fpn_channels=64,
    tower_convs=1,
)
NONE: tuple[list[list[float]], list[int]] = ([], [])


def sample(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], size: int = 64, image_id: int = 1
) -> Sample:
    return Sample(
        torch.randn(3, size, size),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        image_id,
        (size, size),
    )


def assign_batch(batch: Batch, config: ModelConfig) -> AssignedTargets:
    height, width = batch.images.shape[2:]
    return assign((height, width), config, batch.boxes, batch.labels, batch.counts)


def losses_of(
    network: FCOS, batch: Batch, normalizers: Normalizers | None = None
) -> dict[str, Tensor]:
    targets = assign_batch(batch, network.config)
    normalizers = normalizers or step_normalizers([targets])
    return fcos_losses(network(batch.images), targets, normalizers, LossConfig())


def test_by_hand() -> None:
    """One box of 16 px, whose only locations are the four of stride 8 around its centre."""
    config = replace(SMALL, num_classes=1, size_ranges=((0, 64), (64, 128), (128, math.inf)))
    batch = collate([sample([[0, 0, 16, 16]], [0], size=32)])
    sides = (4, 2, 1)  # 21 locations
    predictions = Predictions(
        [torch.zeros(1, 1, s, s) for s in sides],
        [torch.ones(1, 4, s, s) for s in sides],  # 1 stride: a square of 16 px around each
        [torch.zeros(1, 1, s, s) for s in sides],
    )
    targets = assign_batch(batch, config)
    normalizers = step_normalizers([targets])
    # at (4, 4): l = t = 4, r = b = 12, centerness sqrt(4/12 * 4/12); the others by symmetry
    assert normalizers.num_pos.item() == 4
    assert normalizers.centerness.item() == pytest.approx(4 / 3)
    losses = fcos_losses(predictions, targets, normalizers, LossConfig())
    # p = 1/2: (1 - p)^2 log 2 is ln2 / 4, with 1/4 for a positive and 3/4 for 17 negatives
    cls = (4 * 0.25 + 17 * 0.75) * 0.25 * math.log(2) / 4
    # 12 x 12 of two squares of 16 x 16 overlap, and 20 x 20 encloses both
    union = 2 * 16**2 - 12**2
    giou = 12**2 / union - (20**2 - union) / 20**2
    assert losses["cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["box"].item() == pytest.approx(1 - giou, rel=1e-5)
    assert losses["centerness"].item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "kind, normalize, box_weights, quality",
    [
        ("iou", True, "centerness", "centerness"),
        ("iou", False, "none", "centerness"),
        ("giou", True, "centerness", "iou"),
        ("giou", False, "none", "iou"),
    ],
)
def test_in_scalars(kind: Any, normalize: bool, box_weights: Any, quality: Any) -> None:
    """Two images, several boxes and classes, against loops over locations."""
    torch.manual_seed(0)
    config = replace(SMALL, normalize_ltrb=normalize, center_sampling_radius=0.0)
    boxes = ([[3, 5, 40, 30], [20, 8, 60, 62], [10, 10, 30, 26]], [[0, 0, 63, 63]])
    labels = ([0, 2, 1], [1])
    batch = collate([sample(b, c) for b, c in zip(boxes, labels, strict=True)])
    levels = [(8, 8), (4, 16), (2, 32)]
    unit = [s if normalize else 1 for _, s in levels]
    predictions = Predictions(
        [torch.randn(2, 3, n, n) for n, _ in levels],
        [torch.rand(2, 4, n, n) * 40 / u for (n, _), u in zip(levels, unit, strict=True)],
        [torch.randn(2, 1, n, n) for n, _ in levels],
    )
    loss = LossConfig(
        box_loss=kind, focal_alpha=0.3, focal_gamma=1.5, box_weights=box_weights, quality=quality
    )
    targets = assign_batch(batch, config)
    result = fcos_losses(predictions, targets, step_normalizers([targets]), loss)

    cls = box = bce = weights = 0.0
    positives = 0
    for image in range(2):
        for level, (n, stride) in enumerate(levels):
            low, high = config.size_ranges[level]
            for y in range(n):
                for x in range(n):
                    px, py = x * stride + stride // 2, y * stride + stride // 2
                    found = None
                    for b, c in zip(boxes[image], labels[image], strict=True):
                        ltrb = (px - b[0], py - b[1], b[2] - px, b[3] - py)
                        area = (b[2] - b[0]) * (b[3] - b[1])
                        inside = min(ltrb) > 0 and low <= max(ltrb) <= high
                        if inside and (found is None or area < found[0]):
                            found = (area, c, ltrb)
                    logits = predictions.logits[level][image, :, y, x].double().tolist()
                    for c, z in enumerate(logits):
                        hit = found is not None and found[1] == c
                        p = 1 / (1 + math.exp(-z if hit else z))
                        cls -= (0.3 if hit else 0.7) * (1 - p) ** 1.5 * math.log(p)
                    if found is None:
                        continue
                    le, t, r, b_ = found[2]
                    w = math.sqrt(min(le, r) / max(le, r) * min(t, b_) / max(t, b_))
                    d = (predictions.ltrb[level][image, :, y, x] * unit[level]).tolist()
                    iw, ih = min(d[0], le) + min(d[2], r), min(d[1], t) + min(d[3], b_)
                    ew, eh = max(d[0], le) + max(d[2], r), max(d[1], t) + max(d[3], b_)
                    union = (d[0] + d[2]) * (d[1] + d[3]) + (le + r) * (t + b_) - iw * ih
                    iou = iw * ih / union
                    giou = 1 - iou + (ew * eh - union) / (ew * eh)
                    target = iou if quality == "iou" else w
                    z = predictions.centerness[level][image, 0, y, x].item()
                    p = 1 / (1 + math.exp(-z))
                    bce -= target * math.log(p) + (1 - target) * math.log(1 - p)
                    weight = w if box_weights == "centerness" else 1
                    positives, weights = positives + 1, weights + weight
                    box += weight * (-math.log(iou) if kind == "iou" else giou)
    assert positives > 20
    assert result["cls"].item() == pytest.approx(cls / positives, rel=1e-4)
    assert result["box"].item() == pytest.approx(box / weights, rel=1e-4)
    assert result["centerness"].item() == pytest.approx(bce / positives, rel=1e-4)


@pytest.mark.parametrize("frozen_batch_norm", [True, False])
@pytest.mark.parametrize(
    "truths",
    [
        (NONE, NONE),
        (([[4, 4, 40, 40]], [2]), NONE),
        (NONE, ([[4, 4, 40, 40]], [2])),
        (([[4, 4, 40, 40], [8, 8, 60, 50]], [0, 1]), ([[1, 1, 60, 60]], [2])),
    ],
)
def test_images_without_boxes(truths: tuple[Any, Any], frozen_batch_norm: bool) -> None:
    torch.manual_seed(0)
    network = FCOS(replace(SMALL, frozen_batch_norm=frozen_batch_norm)).train()
    batch = collate([sample(*truth) for truth in truths])
    losses = losses_of(network, batch)
    sum(losses.values()).backward()
    assert all(v.dtype == torch.float32 and v.shape == () for v in losses.values())
    assert all(math.isfinite(v.item()) for v in losses.values())
    empty = not batch.counts.any()
    assert (losses["box"].item() == 0) == empty and (losses["centerness"].item() == 0) == empty
    assert losses["cls"].item() > 0
    for name, parameter in network.named_parameters():
        # a gradient for each, zero or not: several processes must exchange the same ones
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert network.head.cls_logits.weight.grad.abs().sum() > 0
    assert (network.head.ltrb.weight.grad.abs().sum() > 0) == (not empty)


def test_background_does_not_spread_nan() -> None:
    """Only the positives' distances and centerness count, whatever the others are."""
    batch = collate([sample([[0, 0, 16, 16]], [0], size=32)])
    config = replace(SMALL, size_ranges=((0, 64), (64, 128), (128, math.inf)))
    predictions = Predictions(
        [torch.zeros(1, 3, s, s) for s in (4, 2, 1)],
        [torch.ones(1, 4, s, s) for s in (4, 2, 1)],
        [torch.zeros(1, 1, s, s, requires_grad=True) for s in (4, 2, 1)],
    )
    with torch.no_grad():
        predictions.centerness[1].fill_(math.nan)
        predictions.ltrb[2].fill_(math.inf)
    targets = assign_batch(batch, config)
    losses = fcos_losses(predictions, targets, step_normalizers([targets]), LossConfig())
    assert losses["centerness"].item() == pytest.approx(math.log(2))
    assert math.isfinite(losses["box"].item())


def test_float32_under_autocast() -> None:
    torch.manual_seed(0)
    network = FCOS(SMALL)
    batch = collate([sample([[4, 4, 40, 40]], [1])])
    exact = losses_of(network, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(network, batch)
    assert {v.dtype for v in losses.values()} == {torch.float32}
    for name, value in losses.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.03), name
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_accumulation_equals_one_pass() -> None:
    """Four images of unequal numbers of positives in two passes, one of them without any."""
    torch.manual_seed(0)
    network = FCOS(SMALL)
    truths = [NONE, NONE, ([[4, 4, 40, 40]], [1]), ([[2, 2, 60, 60], [8, 8, 30, 30]], [0, 2])]
    samples = [sample(*truth) for truth in truths]
    whole = losses_of(network, collate(samples))
    sum(whole.values()).backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()

    parts = [collate(samples[:2]), collate(samples[2:])]
    normalizers = step_normalizers([assign_batch(part, SMALL) for part in parts])
    passes = [losses_of(network, part, normalizers) for part in parts]
    for losses in passes:
        sum(losses.values()).backward()
    for name, value in whole.items():
        assert sum(p[name].item() for p in passes) == pytest.approx(value.item(), rel=1e-5)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_step_compiles_whole() -> None:
    """Network, assignment and losses as one graph without a break, and its gradients."""

    def loss(network: FCOS, images: Tensor, *truth: Tensor) -> Tensor:
        targets = assign((64, 64), SMALL, *truth)
        normalizers = step_normalizers([targets])
        terms = fcos_losses(network(images), targets, normalizers, LossConfig())
        return torch.stack(list(terms.values()))

    torch._dynamo.reset()
    torch.manual_seed(0)
    network = FCOS(SMALL)
    parameters = list(network.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for truths in ([NONE, ([[4, 4, 40, 40]], [1])], [NONE, NONE]):
        batch = collate([sample(*truth) for truth in truths])
        arguments = (batch.images, batch.boxes, batch.labels, batch.counts)
        expected, found = loss(network, *arguments), compiled(network, *arguments)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found.sum(), parameters)
        for a, b in zip(gradients, torch.autograd.grad(expected.sum(), parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def toy_batch() -> Batch:
    """Two images of one rectangle each, of the class's colour."""
    samples = []
    for i, (box, label) in enumerate((([8, 12, 40, 44], 0), ([20, 4, 60, 36], 2))):
        image = torch.zeros(3, 64, 64)
        image[label, box[1] : box[3], box[0] : box[2]] = 2.0
        samples.append(sample([box], [label], image_id=i)._replace(image=image))
    return collate(samples)


def descend(network: FCOS, batch: Batch, steps: int, rate: float) -> Iterator[float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        loss = sum(losses_of(network, batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        yield loss.item()


def test_pinned_loss_curve() -> None:
    """A change of these numbers is a change of the method; say so in the changelog."""
    torch.manual_seed(0)
    network = FCOS(replace(SMALL, frozen_batch_norm=False)).train()
    curve = list(descend(network, toy_batch(), steps=5, rate=0.01))
    assert curve == pytest.approx([2.86089, 2.70195, 2.43781, 2.05478, 1.74467], rel=1e-3)


def test_overfits_a_few_images(tmp_path: Path) -> None:
    generate_shapes(tmp_path, images=4, seed=3, size=(128, 128))
    config = tiny()
    data = replace(config.data, min_sizes=(128,), max_size=128)
    dataset = CocoDataset(tmp_path / "train.json", transforms=eval_transforms(data))
    batch = collate([dataset[i] for i in range(4)])
    assert batch.counts.sum() >= 6
    torch.manual_seed(0)
    model = replace(config.model, num_classes=6)
    network = FCOS(model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    curve = []
    for step in range(45):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10)
        losses = losses_of(network, batch)
        curve.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    assert curve[-1]["cls"] < curve[0]["cls"] / 10
    assert curve[-1]["box"] < curve[0]["box"] / 4

    # in training mode, as 45 steps are few for running statistics
    with torch.no_grad():
        outputs = network(batch.images)
    found = postprocess(outputs, batch.image_sizes, batch.image_sizes, model, PostprocessConfig())
    for i, count in enumerate(batch.counts):
        for box, label in zip(batch.boxes[i, :count], batch.labels[i, :count], strict=True):
            same = (found.labels[i] == label) & (found.scores[i] > 0.3)
            overlap = box_iou(box[None], found.boxes[i][same])
            assert overlap.numel() and overlap.max() > 0.5, (i, box, label)


@pytest.mark.parametrize("amp", [False, True])
def test_step_of_the_default_network_at_full_size(amp: bool) -> None:
    """ResNet-50, 80 classes, 800 x 1344: every loss and every gradient is finite."""
    torch.manual_seed(0)
    config = improved()
    network = FCOS(replace(config.model, num_classes=80), pretrained_backbone=False).train()
    network.to(memory_format=torch.channels_last)  # half the time on a CPU
    # frozen random norms of 50 layers would let the activations grow beyond reason
    for name, buffer in network.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)
    truth = sample([[50, 60, 130, 170], [300, 100, 1200, 700]], [17, 3])
    batch = collate([truth._replace(image=torch.randn(3, 800, 1333))])
    batch = batch.to("cpu", torch.channels_last)
    assert batch.images.shape == (1, 3, 800, 1344)
    targets = assign_batch(batch, network.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        predictions = network(batch.images)
    losses = fcos_losses(predictions, targets, step_normalizers([targets]), config.loss)
    sum(losses.values()).backward()
    assert sum(level.shape[-2] * level.shape[-1] for level in predictions.logits) == 22_400
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert 0.5 < losses["cls"].item() < 5 and 0 < losses["box"].item() < 2
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_moving_normalizer() -> None:
    """0.9 of what it was and a tenth of the positives, or of 1 where there is none."""
    config = LossConfig(normalizer="moving", box_weights="none")
    moving = start_of_moving(torch.device("cpu"))
    assert moving.item() == 300
    expected = 300.0
    for truth in (([[4, 4, 40, 40], [2, 2, 60, 60]], [1, 0]), NONE, ([[0, 0, 16, 16]], [0])):
        targets = assign_batch(collate([sample(*truth)]), SMALL)
        expected = 0.9 * expected + 0.1 * max(1, int(targets.num_pos.sum()))
        normalizers = step_normalizers([targets], config, moving)
        assert moving.item() == pytest.approx(expected, rel=1e-6)
        assert normalizers.num_pos.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="moving must be given for normalizer moving"):
        step_normalizers([targets], config)
