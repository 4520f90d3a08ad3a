"""Runs torchvision's methods and ours on the same small inputs, and measures how far they differ.

The inputs have the classes, levels and anchors of the model: its own head runs on random features,
and noise spreads what it gives over all scores, so that there are detections from an untrained head
too. Random numbers are drawn from a generator of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from .report import Figure

#: Relative, in the L2 norm: of sums and gradients in float32, added up in another order.
LIMIT = 1e-4
#: Of what is computed in the same way.
SMALL_LIMIT = 1e-6

IMAGE_SIZES = ((150, 200), (187, 164), (96, 201))
PADDED_SIZE = (192, 224)
BOXES = (9, 0, 30)


def self_check(model: Any, original: type) -> tuple[Figure, ...]:
    """Of a model whose class is the accelerated one already."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with torch.autocast(device.type, enabled=False):
        outputs, anchors, counts = _inputs(model, generator, device)
        targets = _targets(outputs["cls_logits"].shape[-1], generator, device)
        figures = _compare_losses(model, original, outputs, anchors, counts, targets)
        return figures + _compare_detections(model, original, outputs, anchors, counts)


def _inputs(
    model: Any, generator: torch.Generator, device: torch.device
) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """Float32 outputs of the head, anchors of each image, and anchors of each level."""
    sizes: list[tuple[int, int]] = []
    for level, (unit, *_) in enumerate(model.anchor_generator.sizes):
        # Anchors of RetinaNet are larger than the steps from one to the next: 8 pixels at first.
        step = unit if _one_anchor(model) else 8 << level
        height, width = (max(1, -(-side // int(step))) for side in PADDED_SIZE)
        sizes.append((height, width))
    channels, dtype = model.backbone.out_channels, next(model.head.parameters()).dtype
    features = [
        torch.randn(len(IMAGE_SIZES), channels, *size, generator=generator).to(device, dtype)
        for size in sizes
    ]
    outputs = {
        name: _spread(name, output.float(), generator)
        for name, output in _run(model.head, features).items()
    }
    if "bbox_ctrness" not in outputs:
        outputs["cls_logits"] = _told_apart(outputs["cls_logits"])
    images = ImageList(torch.zeros(len(IMAGE_SIZES), 3, *PADDED_SIZE), list(IMAGE_SIZES))
    # It keeps what it made, in this dtype: the model's own is left alone.
    anchors = copy.deepcopy(model.anchor_generator)(images, [level.float() for level in features])
    locations = [height * width for height, width in sizes]
    per_location = len(anchors[0]) // sum(locations)
    return outputs, anchors, [count * per_location for count in locations]


def _one_anchor(model: Any) -> bool:
    return set(model.anchor_generator.num_anchors_per_location()) == {1}


@torch.no_grad()
def _run(head: nn.Module, features: list[Tensor]) -> dict[str, Tensor]:
    """As in evaluation, which leaves statistics of batches and random numbers alone."""
    modes = [(module, module.training) for module in head.modules()]
    head.eval()
    try:
        result: dict[str, Tensor] = head(features)
        return result
    finally:
        for module, training in modes:
            module.training = training


def _spread(name: str, output: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    if name == "cls_logits":
        output = output - output.mean() - 3
        return output + 2 * noise
    if name == "bbox_regression" and bool((output >= 0).all()):  # after a ReLU
        return (output + noise + 1).clamp(min=0)
    return output + 0.3 * noise


def _told_apart(logits: Tensor, most: int = 20_000) -> Tensor:
    """In the same order, but of each image few are high, and none nearly equal to another.

    Scores near 1 are so close to each other that rounding would decide which are the best.
    """
    flat = logits.flatten(1)
    best = flat.topk(min(most, flat.shape[1]), dim=1).indices
    values = torch.linspace(2, -8, best.shape[1], device=logits.device)
    return flat.clamp(max=-8).scatter(1, best, values.expand_as(best)).view_as(logits)


def _targets(
    num_classes: int, generator: torch.Generator, device: torch.device
) -> list[dict[str, Tensor]]:
    targets = []
    for count, (height, width) in zip(BOXES, IMAGE_SIZES, strict=True):
        sides = 8 + torch.rand(count, 2, generator=generator) ** 2 * 120
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
        boxes = torch.cat([corner - sides / 2, corner + sides / 2], dim=1)
        labels = torch.randint(num_classes, (count,), generator=generator)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return targets


def _compare_losses(
    model: Any,
    original: type,
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    counts: list[int],
    targets: list[dict[str, Tensor]],
) -> tuple[Figure, ...]:
    results = []
    for cls in (original, type(model)):
        leaves = {name: output.clone().requires_grad_() for name, output in outputs.items()}
        # A ReLU lets no gradient through at 0, where the two losses need not agree.
        given = {
            name: leaf.relu() if bool((leaf >= 0).all()) else leaf for name, leaf in leaves.items()
        }
        arguments: list[Any] = [targets, given, anchors]
        if "bbox_ctrness" in leaves:  # FCOS
            arguments.append(counts)
        with torch.enable_grad():
            losses = cls.compute_loss(model, *arguments)  # type: ignore[attr-defined]
            # Weights of their own, as a gradient of 1 for each is a case that is treated apart.
            gradients: dict[str, Tensor] = {}
            for kind, weights in (("", (1.0, 1.0, 1.0)), ("weighted ", (0.3, 1.7, 2.5))):
                terms = zip(weights, losses.values(), strict=False)
                total = torch.stack([weight * loss for weight, loss in terms]).sum()
                grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
                names = [f"{kind}gradient of {name}" for name in leaves]
                gradients |= dict(zip(names, grads, strict=True))
        results.append((losses, gradients))
    (their_losses, their_gradients), (losses, gradients) = results
    figures = [
        Figure(f"loss {name}", distance(losses.get(name), theirs), LIMIT)
        for name, theirs in their_losses.items()
    ]
    figures += [
        Figure(name, distance(gradients[name], theirs), LIMIT)
        for name, theirs in their_gradients.items()
    ]
    return tuple(figures)


@torch.no_grad()
def _compare_detections(
    model: Any,
    original: type,
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    counts: list[int],
) -> tuple[Figure, ...]:
    levels = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
    split = [list(of_image.split(counts)) for of_image in anchors]
    theirs, ours = (
        cls.postprocess_detections(model, levels, split, list(IMAGE_SIZES))  # type: ignore[attr-defined]
        for cls in (original, type(model))
    )
    numbers = [
        torch.tensor([len(of_image["scores"]) for of_image in each]) for each in (ours, theirs)
    ]
    figures = [Figure("number of detections", distance(*numbers), 0.0)]
    theirs, ours = (
        [in_fixed_order(of_image, model.detections_per_img) for of_image in each]
        for each in (theirs, ours)
    )
    for name, limit in (("boxes", SMALL_LIMIT), ("scores", SMALL_LIMIT), ("labels", 0.0)):
        difference = distance(_joined(ours, name), _joined(theirs, name))
        figures.append(Figure(f"detected {name}", difference, limit))
    return tuple(figures)


def in_fixed_order(detections: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """Detections of an image whose scores are the same, or nearly so, ordered by label and box.

    The last bits of torchvision's scores differ by where they stood in a tensor, and it sorts
    without regard to the order of equal ones. For the same reason the last ones are left out if
    there are ``most``, the number at which they are cut.
    """
    scores, labels, boxes = (detections[name].cpu() for name in ("scores", "labels", "boxes"))
    gap = scores[:-1] - scores[1:] > 1e-6
    group = torch.cat([gap.new_zeros(min(1, len(scores))), gap]).cumsum(0)
    keys = [group.tolist(), labels.tolist(), boxes.tolist()]
    order = sorted(range(len(scores)), key=lambda i: [key[i] for key in keys])
    if len(order) == most:
        order = [i for i in order if group[i] < group[-1]]
    return {name: tensor[order] for name, tensor in detections.items()}


def _joined(detections: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([of_image[name] for of_image in detections])


def distance(ours: Tensor | None, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, infinite if they cannot be compared."""
    if ours is None or ours.shape != theirs.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - theirs.double()).item()
    if difference == 0:
        return 0.0
    size = torch.linalg.vector_norm(theirs.double()).item()
    return difference / size if size else float("inf")
