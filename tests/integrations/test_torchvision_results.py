"""Accelerated torchvision models against their originals: losses, gradients, detections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fcos_ext.integrations.torchvision import AcceleratedFCOS
from fcos_ext.integrations.torchvision.detect import as_compared
from fcos_ext.integrations.torchvision.fcos import _levels_of
from tests.integrations.torchvision_models import (
    ACCELERATED,
    MODELS,
    Backbone,
    accelerated_copy,
    assert_close,
    assert_same_detections,
    box_tolerance,
    loss_and_gradients,
    make_model,
    make_outputs,
    make_targets,
)

SIZES = {"800x1216": (800, 1216), "352x512": (352, 512), "224x96": (224, 96), "32x32": (32, 32)}


def check_loss(
    model: Any, padded: tuple[int, int], counts: tuple[int, ...], seed: int = 0, **options: Any
) -> None:
    outputs, anchors, per_level = make_outputs(model, padded, len(counts), seed=seed, **options)
    num_classes = outputs["cls_logits"].shape[-1]
    arguments: list[Any] = [
        make_targets([padded] * len(counts), counts, num_classes, seed),
        anchors,
    ]
    if isinstance(model, FCOS):
        arguments.append(per_level)
    original = FCOS if isinstance(model, FCOS) else RetinaNet
    twin = accelerated_copy(model)
    assert_close(
        loss_and_gradients(twin, type(twin), arguments, outputs),
        loss_and_gradients(model, original, arguments, outputs),
    )


@pytest.mark.parametrize("counts", [(20, 3), (0, 9), (0, 0), (1,)], ids=str)
@pytest.mark.parametrize("padded", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("cls", MODELS)
def test_losses_and_gradients(cls: type, padded: tuple[int, int], counts: tuple[int, ...]) -> None:
    if cls is RetinaNet and padded == SIZES["800x1216"]:
        padded = (512, 608)  # nine anchors a location are slow enough
    check_loss(make_model(cls, 3 if cls is RetinaNet else 7), padded, counts)


@pytest.mark.parametrize("seed", range(6))
def test_losses_over_seeds(seed: int) -> None:
    radius = (1.5, 1.3, 0.5, 3.0, 100.0, 1.0)[seed]
    model = make_model(FCOS, 1 + 10 * seed, seed, center_sampling_radius=radius)
    check_loss(model, (160 + 32 * seed, 320 - 32 * seed), (30, 80), seed)


def test_anchors_of_other_sizes() -> None:
    """12 is no power of two, so that reach and centerness are rounded."""
    sizes = ((12,), (20,), (36,), (72,), (130,))
    generator = AnchorGenerator(sizes, ((1.0,),) * 5)
    model = make_model(FCOS, anchor_generator=generator, center_sampling_radius=1.3)
    check_loss(model, (352, 512), (40, 7))


@pytest.mark.parametrize("cls", MODELS)
def test_one_level(cls: type) -> None:
    """As with a backbone that returns a tensor: the range of the only level has no end."""
    model = make_model(cls)
    generator = model.anchor_generator
    model.anchor_generator = type(generator)(generator.sizes[:1], generator.aspect_ratios[:1])
    outputs, anchors, counts = make_outputs(make_model(cls), (96, 128), 2)
    outputs = {name: output[:, : counts[0]] for name, output in outputs.items()}
    anchors = [of_image[: counts[0]] for of_image in anchors]
    arguments: list[Any] = [make_targets([(96, 128)] * 2, (5, 2)), anchors]
    arguments += [counts[:1]] if cls is FCOS else []
    twin = accelerated_copy(model)
    assert_close(
        loss_and_gradients(twin, type(twin), arguments, outputs),
        loss_and_gradients(model, cls, arguments, outputs),
    )


@pytest.mark.parametrize("labels", [[-1, -3, 2], [0, 6, 6]], ids=str)
def test_negative_labels_are_background(labels: list[int]) -> None:
    model = make_model(FCOS)
    outputs, anchors, counts = make_outputs(model, (96, 128), 1)
    (target,) = make_targets([(96, 128)], [3])
    arguments = [[target | {"labels": torch.tensor(labels)}], anchors, counts]
    assert_close(
        loss_and_gradients(accelerated_copy(model), AcceleratedFCOS, arguments, outputs),
        loss_and_gradients(model, FCOS, arguments, outputs),
    )


@pytest.mark.parametrize("cls", MODELS)
def test_labels_out_of_range(cls: type) -> None:
    model = make_model(cls)
    outputs, anchors, counts = make_outputs(model, (96, 128), 1)
    target = {"boxes": torch.tensor([[0.0, 0, 90, 90]]), "labels": torch.tensor([7])}
    for kind in (cls, ACCELERATED[cls]):
        twin = model if kind is cls else accelerated_copy(model)
        with pytest.raises(IndexError):
            twin.compute_loss([target], outputs, anchors, *([counts] if cls is FCOS else []))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchvision_runs_where_anchors_are_not_float32(dtype: torch.dtype) -> None:
    """float64; and bfloat16, in which anchors beyond 256 are rounded."""
    model = make_model(FCOS)
    outputs, anchors, counts = make_outputs(model, (320, 320), 1, dtype=dtype)
    assert _levels_of(anchors[0], counts, 1.5) is None
    arguments = [make_targets([(320, 320)], [5]), anchors, counts]
    ours = loss_and_gradients(accelerated_copy(model), AcceleratedFCOS, arguments, outputs)
    theirs = loss_and_gradients(model, FCOS, arguments, outputs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_float16_has_the_same_matches_and_a_better_loss() -> None:
    """torchvision decodes boxes in float16; the truth is the loss of the same in float32."""
    model = make_model(FCOS)
    outputs, anchors, counts = make_outputs(model, (352, 512), 2, dtype=torch.float16)
    assert anchors[0].dtype == torch.float16
    targets = make_targets([(352, 512)] * 2, (9, 4))
    twin = accelerated_copy(model)
    ours = twin.compute_loss(targets, outputs, anchors, counts)
    exact_outputs = {name: output.float() for name, output in outputs.items()}
    exact_anchors = [of_image.float() for of_image in anchors]
    truth = FCOS.compute_loss(model, targets, exact_outputs, exact_anchors, counts)
    assert_close(ours, truth)


# ---- detections ---------------------------------------------------------------------------------


def detections(
    model: Any,
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    counts: list[int],
    shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    levels = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
    split = [list(of_image.split(counts)) for of_image in anchors]
    found: list[dict[str, Tensor]] = model.postprocess_detections(levels, split, shapes)
    return found


def both(model: Any, *arguments: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Our detections, and torchvision's."""
    return detections(accelerated_copy(model), *arguments), detections(model, *arguments)


def told_apart(logits: Tensor) -> Tensor:
    """In the same order, but in each image so far from each other that their scores differ by more
    than rounding, which is not sure of many that are near 1."""
    flat = logits.flatten(1)
    low, high = max(flat.min().item(), -12.0), min(flat.max().item(), 4.0)
    values = torch.linspace(low, high, flat.shape[1], dtype=logits.dtype)
    return values[flat.argsort(dim=1).argsort(dim=1)].view_as(logits)


def check_detections(
    model: Any, padded: tuple[int, int], images: int, expected: int = 1, **options: Any
) -> None:
    outputs, anchors, counts = make_outputs(model, padded, images, **options)
    if isinstance(model, RetinaNet):
        outputs["cls_logits"] = told_apart(outputs["cls_logits"])
    shapes = [(padded[0] - 7 * i, padded[1] - 11 * i) for i in range(images)]
    actual, truth = both(model, outputs, anchors, counts, shapes)
    assert_same_detections(actual, truth, model.detections_per_img, box_tolerance(model))
    assert sum(len(of_image["scores"]) for of_image in truth) >= expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [-9.0, -6.0, -3.0, 0.0])
@pytest.mark.parametrize("cls", MODELS)
def test_detections(cls: type, mean: float, seed: int) -> None:
    """From next to none to nearly all above the threshold, in images of different sizes."""
    model = make_model(cls, 5)
    expected = 0 if mean == -9 else 20
    check_detections(model, (160, 224), 3, expected, mean=mean, seed=seed)


@pytest.mark.parametrize("padded", [(352, 512), (800, 1344)], ids=str)
def test_detections_of_large_images(padded: tuple[int, int]) -> None:
    check_detections(make_model(FCOS, 20), padded, 2, 200, mean=-4.5)


@pytest.mark.parametrize(
    "options",
    [
        {"score_thresh": 0.0},
        {"score_thresh": -1.0},
        {"score_thresh": 0.9},
        {"score_thresh": 1e-6},
        {"score_thresh": 1.0},
        {"nms_thresh": 0.0},
        {"nms_thresh": 0.3},
        {"nms_thresh": 1.0},
        {"detections_per_img": 1},
        {"detections_per_img": 5000},
        {"detections_per_img": 0},
        {"topk_candidates": 3},
        {"topk_candidates": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", MODELS)
def test_detection_options(cls: type, options: dict[str, Any]) -> None:
    model = make_model(cls, 4, **options)
    nothing = {"score_thresh": 1.0}, {"detections_per_img": 0}, {"topk_candidates": 0}
    check_detections(model, (96, 160), 2, 0 if options in nothing else 1, mean=-1.0, std=4.0)


@pytest.mark.parametrize("cls", MODELS)
def test_ties_and_odd_values(cls: type) -> None:
    """Equal scores, infinite logits and NaN. Nothing is cut or suppressed: torchvision leaves open
    which of equal scores that would be."""
    everything = {"nms_thresh": 1.0, "topk_candidates": 10**6, "detections_per_img": 10**5}
    model = make_model(cls, 7, **everything)
    outputs, anchors, counts = make_outputs(model, (96, 160), 2, mean=-3.0)
    generator = torch.Generator().manual_seed(0)
    for name in ("cls_logits", "bbox_ctrness"):
        if name in outputs:
            outputs[name] = outputs[name].mul(2).round()
            for value in (float("nan"), float("inf"), float("-inf")):
                hit = torch.rand(outputs[name].shape, generator=generator) < 5e-4
                outputs[name][hit] = value
    ours, theirs = both(model, outputs, anchors, counts, [(96, 160)] * 2)
    assert min(len(of_image["scores"]) for of_image in theirs) > 100
    assert min(of_image["scores"].diff().eq(0).sum() for of_image in theirs) > 50
    assert_same_detections(ours, theirs, 10**5, box_tolerance(model))


def test_boxes_without_area() -> None:
    """Distances of 0, and boxes outside the image: torchvision keeps them."""
    model = make_model(FCOS, 3, nms_thresh=0.0)
    outputs, anchors, counts = make_outputs(model, (96, 160), 2, mean=-1.0)
    outputs["bbox_regression"][:, ::3, ::2] = 0
    outputs["bbox_regression"][:, 1::5] -= 9
    ours, theirs = both(model, outputs, anchors, counts, [(50, 80)] * 2)
    boxes = torch.cat([of_image["boxes"] for of_image in theirs])
    assert ((boxes[:, 2:] - boxes[:, :2]).amin(dim=1) <= 0).sum() > 20
    assert_same_detections(ours, theirs, model.detections_per_img)


def test_boxes_that_are_not_finite_are_left_out() -> None:
    model = make_model(FCOS, 3)
    outputs, anchors, counts = make_outputs(model, (96, 160), 1, mean=-20.0)
    outputs["cls_logits"][0, :4, 0] = torch.tensor([3.0, 2.0, 1.0, 0.5])
    outputs["bbox_regression"][0, :4] = 0.25
    outputs["bbox_regression"][0, 0, 1], outputs["bbox_regression"][0, 2, 2] = torch.nan, torch.inf
    outputs["bbox_ctrness"][0, :4] = 1.0
    ours = detections(accelerated_copy(model), outputs, anchors, counts, [(96, 160)])
    assert ours[0]["boxes"].tolist() == [[6.0, 0.0, 10.0, 2.0], [22.0, 0.0, 26.0, 2.0]]


@pytest.mark.parametrize("most", [1000, 5000], ids=["moved apart", "class by class"])
def test_overlaps_at_the_threshold(most: int) -> None:
    """Pairs whose overlap is the threshold up to rounding. In fact torchvision's answer hangs on
    the class and on the largest coordinate, by which it moves boxes, unless they are too many."""
    model = make_model(FCOS, 60, detections_per_img=most, nms_thresh=0.6, topk_candidates=most)
    outputs, anchors, counts = make_outputs(model, (256, 512), 1, mean=-20.0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(0, counts[0], 2)[: most // 5]
    pairs = torch.stack([rows, rows + 1], dim=1)  # neighbours, 8 pixels apart
    label = torch.randint(60, (len(rows), 1), generator=generator).expand(-1, 2)
    # Of width w both, shifted by 8: IoU (w - 8) / (w + 8) = 0.6 for w = 32.
    sides = 2 + 4e-6 * torch.randn(len(rows), 2, generator=generator)
    outputs["cls_logits"][0, pairs, label] = torch.linspace(-1, 3, 2 * len(rows)).view(-1, 2)
    outputs["bbox_ctrness"][0, :] = 1.0
    outputs["bbox_regression"][0, pairs] = sides.unsqueeze(-1)
    ours, theirs = both(model, outputs, anchors, counts, [(256, 512)])
    assert 0.2 < len(theirs[0]["scores"]) / (2 * len(rows)) < 0.95
    assert_same_detections(ours, theirs, most)


@pytest.mark.parametrize("threshold", [0.6, 0.5, 0.3, 0.7, 0.0, 1.0])
def test_threshold_as_torchvision_compares_it(threshold: float) -> None:
    limit = torch.tensor(as_compared(threshold, torch.device("cpu")))
    for overlap in (torch.tensor(threshold), limit):
        for near in (overlap.nextafter(torch.tensor(-1.0)), overlap, overlap.nextafter(limit + 1)):
            assert bool(near > limit) == (near.item() > threshold)


@pytest.mark.parametrize("cls", MODELS)
def test_float64_is_left_to_torchvision(cls: type) -> None:
    check_detections(make_model(cls, 4), (96, 160), 1, mean=-1.0, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", MODELS)
def test_half_precision_is_that_of_float32_rounded(cls: type, dtype: torch.dtype) -> None:
    """torchvision would compute scores and boxes in it."""
    model = make_model(cls, 5)
    outputs, anchors, counts = make_outputs(model, (160, 224), 2, mean=-6.0, dtype=dtype)
    ours = detections(accelerated_copy(model), outputs, anchors, counts, [(160, 224)] * 2)
    exact_outputs = {name: output.float() for name, output in outputs.items()}
    exact_anchors = [of_image.float() for of_image in anchors]
    twin = accelerated_copy(model)
    theirs = detections(twin, exact_outputs, exact_anchors, counts, [(160, 224)] * 2)
    for actual, exact in zip(ours, theirs, strict=True):
        assert len(exact["scores"]) > 30
        for name, values in exact.items():
            expected = values if name == "labels" else values.to(dtype)
            assert torch.equal(actual[name], expected)


# ---- the whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [((333, 500),), ((200, 300), (310, 190))], ids=str)
@pytest.mark.parametrize("cls", MODELS)
def test_training_step(cls: type, sizes: tuple[tuple[int, int], ...]) -> None:
    model = make_model(cls, min_size=256, max_size=400)
    twin = accelerated_copy(model)
    images = [torch.rand(3, *size) for size in sizes]
    targets = make_targets(sizes, [12, 0][: len(sizes)])
    results = []
    for each in (twin, model):
        losses = each.train()(images, targets)
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in each.named_parameters()}
        results.append(losses | gradients)
    assert_close(*results, limit=2e-5)


@pytest.mark.parametrize("size, options", [((333, 500), {"min_size": 256}), ((800, 1333), {})])
@pytest.mark.parametrize("cls", MODELS)
def test_evaluation(cls: type, size: tuple[int, int], options: dict[str, Any]) -> None:
    if cls is RetinaNet:
        options = {"min_size": 256}
    model = make_model(cls, 5, **options).eval()
    twin = accelerated_copy(model)
    images = [torch.rand(3, *size), torch.rand(3, 200, 260)]
    with torch.no_grad():
        truth = model(images)
        tolerance = box_tolerance(model)
        assert_same_detections(twin(images), truth, model.detections_per_img, tolerance)
    assert min(len(of_image["scores"]) for of_image in truth) > 10


@pytest.mark.parametrize("cls", MODELS)
def test_autocast(cls: type) -> None:
    """In bfloat16: losses as near as that allows."""
    model = make_model(cls, 4, min_size=160, max_size=256)
    twin = accelerated_copy(model)
    images = [torch.rand(3, 120, 160) for _ in range(2)]
    targets = make_targets([(120, 160)] * 2, (5, 0), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truth, ours = model.train()(images, targets), twin.train()(images, targets)
        assert_close(ours, truth, limit=2e-3)
        sum(ours.values()).backward()
        assert all(p.grad.isfinite().all() for p in twin.parameters())
        with torch.no_grad():
            detections = zip(twin.eval()(images), model.eval()(images), strict=True)
    for actual, expected in detections:
        assert all(actual[name].dtype == expected[name].dtype for name in expected)
        assert len(actual["scores"]) > 10


def test_a_class_to_build_with() -> None:
    """The subclass can be used as torchvision's, without accelerate()."""
    model = AcceleratedFCOS(Backbone(), 3).eval()
    assert len(model([torch.rand(3, 64, 64)])) == 1
