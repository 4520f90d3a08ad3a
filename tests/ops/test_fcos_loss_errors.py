"""fcos_loss: what is wrong is said."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import (
    AssignedTargets,
    FCOSLossOptions,
    GroundTruth,
    fcos_loss,
    fcos_loss_ref,
)
from fcos_ext.fcos_loss import _check_values
from tests.ops.pyramids import SIZES, make_options, make_pyramid, make_truth

FUNCTIONS = pytest.mark.parametrize("function", [fcos_loss, fcos_loss_ref])
LOCATIONS = sum(height * width for height, width in SIZES)


def arguments(**changes: Any) -> dict[str, Any]:
    standard = {
        "predictions": tuple(make_pyramid()),
        "ground_truth": make_truth(),
        "options": make_options(),
    }
    return standard | changes


def changed(part: int, number: int, level: Tensor | None) -> tuple[list[Tensor], ...]:
    """Predictions with another level, or with one less."""
    predictions = tuple(list(levels) for levels in make_pyramid())
    predictions[part][number : number + 1] = [] if level is None else [level]
    return predictions


@FUNCTIONS
@pytest.mark.parametrize(
    "part, number, level, error, message",
    [
        (
            0,
            0,
            torch.ones(2, 3, 9),
            ValueError,
            "levels must be .* of the same N and C, got logits",
        ),
        (0, 1, torch.ones(2, 4, 5, 7), ValueError, "levels must be .* of the same N and C"),
        (0, 0, torch.ones(2, 3, 9, 13), TypeError, "all levels must have the same dtype"),
        (0, 3, None, ValueError, "ltrb must agree with logits in N, H_l and W_l of every level"),
        (1, 3, None, ValueError, "ltrb must agree with logits in N, H_l and W_l of every level"),
        (2, 0, torch.ones(2, 1, 9, 12).double(), ValueError, "centerness must agree with logits"),
        (1, 0, torch.ones(3, 4, 9, 13).double(), ValueError, "levels must be .* of the same N"),
    ],
)
def test_predictions(
    function: Any, part: int, number: int, level: Tensor | None, error: Any, message: str
) -> None:
    with pytest.raises(error, match=f"^fcos_loss: {message}"):
        function(**arguments(predictions=changed(part, number, level)))


@FUNCTIONS
def test_predictions_as_a_whole(function: Any) -> None:
    logits, ltrb, centerness = make_pyramid()
    for predictions, error, message in (
        (([], [], []), ValueError, "logits must have 1 to 8 levels, got 0"),
        (([logits[3]] * 9,) * 3, ValueError, "logits must have 1 to 8 levels, got 9"),
        ((logits, ltrb), ValueError, r"predictions must be \(logits, ltrb, centerness\), got 2"),
        ((logits, centerness, ltrb), ValueError, "levels of ltrb must have C = 4, got 1"),
        ((logits, ltrb, ltrb), ValueError, "levels of centerness must have C = 1, got 4"),
        (([x.int() for x in logits], ltrb, centerness), TypeError, "logits must be floating point"),
        (
            (logits, [x.detach().to("meta") for x in ltrb], centerness),
            ValueError,
            "ltrb must be on the device of the first level, cpu, got meta",
        ),
    ):
        with pytest.raises(error, match=f"^fcos_loss: {message}"):
            function(**arguments(predictions=predictions))


@FUNCTIONS
def test_ground_truth(function: Any) -> None:
    packed, padded = make_truth(), make_truth(padded=True)
    labels = torch.full((2, LOCATIONS + 1), -1)
    ltrb, centerness = torch.zeros(2, LOCATIONS + 1, 4), torch.zeros(2, LOCATIONS + 1)
    longer = AssignedTargets(labels, ltrb, centerness, labels, torch.zeros(2).long())
    elsewhere = AssignedTargets(*(x[:, :LOCATIONS].to("meta") for x in longer[:4]), longer[4])
    for truth, message in (
        (make_truth(images=3), r"fcos_loss: ground_truth must be .* images and L .*, got \(3, "),
        (longer, r"fcos_loss: ground_truth must be of .*, \(2, 165\), got \(2, 166\)"),
        (elsewhere, "fcos_loss: ground_truth must be on the device of the logits, cpu, got meta"),
        (
            GroundTruth(*(x.to("meta") for x in packed[:2]), packed.offsets.to("meta")),
            "fcos_loss: boxes must be on the device of the logits, cpu, got meta",
        ),
        (packed._replace(offsets=None), "assign_targets: offsets or counts must be given"),
        (packed._replace(labels=packed.labels[1:]), "assign_targets: labels must have the shape"),
        (padded._replace(counts=padded.counts + 5), r"assign_targets: counts must lie in 0\.\.M"),
        (packed._replace(offsets=packed.offsets + 1), "assign_targets: offsets must start at 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(**arguments(ground_truth=truth))
    with pytest.raises(TypeError, match="^assign_targets: labels must be int64 or int32"):
        function(**arguments(ground_truth=packed._replace(labels=packed.labels.float())))


@FUNCTIONS
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strides": (8, 16, 32)}, "fcos_loss: predictions must have a level for each of the 3"),
        ({"size_ranges": ((0, 64),)}, "assign_targets: feature_sizes, strides and size_ranges"),
        ({"center_sampling_radius": -1}, "assign_targets: center_sampling_radius must be >= 0"),
        ({"boundary": "open"}, "assign_targets: boundary must be one of"),
        ({"alpha": 1.5}, "sigmoid_focal_loss: alpha must lie in 0..1"),
        ({"gamma": -1.0}, "sigmoid_focal_loss: gamma must be finite and >= 0"),
        ({"box_loss": "eiou"}, "box_and_centerness_loss: kind must be one of"),
        ({"box_weights": "iou"}, "fcos_loss: box_weights must be one of .*'none'.*, got 'iou'"),
        ({"quality": "giou"}, "box_and_centerness_loss: quality must be one of"),
    ],
)
def test_options(function: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**arguments(options=replace(make_options(), **changes)))


@FUNCTIONS
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"normalizers": torch.ones(3)}, ValueError, r"normalizers must have shape \[2\], got \[3"),
        ({"normalizers": torch.ones(2).int()}, TypeError, "normalizers must be floating point"),
        ({"normalizers": torch.ones(2, device="meta")}, ValueError, "normalizers must be on the"),
        ({"reduce": lambda sums: None}, TypeError, "reduce must return a tensor, got NoneType"),
        ({"reduce": lambda sums: sums[:1]}, ValueError, r"what reduce returns must have shape \[2"),
        (
            {"reduce": lambda sums: sums, "normalizers": torch.ones(2)},
            ValueError,
            "either reduce or normalizers can be given, got both",
        ),
    ],
)
def test_normalizers(function: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^fcos_loss: {message}"):
        function(**arguments(**changes))


def test_reference_has_the_same_signature() -> None:
    public, reference = (inspect.signature(function) for function in (fcos_loss, fcos_loss_ref))
    assert public == reference


@FUNCTIONS
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_labels_out_of_range(device: str, function: Any, padded: bool) -> None:
    """The locations of such boxes take no part, and are counted; with ``debug`` they raise."""
    pyramid, options = make_pyramid(device=device), make_options()
    truth = make_truth(device=device, padded=padded)
    whole = function(tuple(pyramid), truth, options)
    assert whole.num_ignored.item() == 0 and whole.num_pos.item() > 2
    for label in (3, 2**40, -2, -(2**63)):
        wrong = truth._replace(labels=torch.full_like(truth.labels, label))
        loss = function(tuple(pyramid), wrong, options)
        assert loss.num_pos.item() == 0 and loss.num_ignored == whole.num_pos
        assert loss.box.item() == 0 and loss.centerness.item() == 0 and loss.cls.isfinite()
        if device == "cpu":  # on a GPU it would end the program
            with pytest.raises(RuntimeError, match="fcos_loss: labels of boxes .* 0..C-1, C = 3"):
                function(tuple(pyramid), wrong, replace(options, debug=True))


@FUNCTIONS
def test_debug_mode(device: str, function: Any) -> None:
    """It changes no result, and is silent about what padding holds, -1 and -2 of locations."""
    pyramid, options = make_pyramid(device=device), make_options()
    debugged = replace(options, debug=True)
    for padded in (False, True):
        truth = make_truth(device=device, padded=padded)
        if truth.counts is not None:
            unused = torch.arange(5, device=device) >= truth.counts[:, None]
            truth = truth._replace(labels=truth.labels.masked_fill(unused, 99))
        results = [function(tuple(pyramid), truth, o) for o in (options, debugged)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    targets = AssignedTargets(
        torch.randint(-2, 3, (2, LOCATIONS), device=device),
        torch.rand(2, LOCATIONS, 4, device=device),
        torch.rand(2, LOCATIONS, device=device),
        torch.zeros(2, LOCATIONS, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    assert function(tuple(pyramid), targets, debugged).num_ignored.item() > 0
    if device == "cpu":
        for label in (3, -3):
            wrong = targets._replace(labels=targets.labels.masked_fill(targets.labels == 1, label))
            with pytest.raises(RuntimeError, match="fcos_loss: labels must lie in -2..C-1, C = 3"):
                function(tuple(pyramid), wrong, debugged)


@FUNCTIONS
def test_more_boxes_than_the_padded_capacity(function: Any) -> None:
    """Said before anything is computed; values that a GPU holds are clamped instead."""
    pyramid, padded = tuple(make_pyramid()), make_truth(padded=True)
    assert padded.counts is not None
    for counts in (torch.tensor([6, 0]), torch.tensor([0, -1])):
        wrong = padded._replace(counts=counts)
        with pytest.raises(ValueError, match=r"^assign_targets: counts must lie in 0\.\.M"):
            function(pyramid, wrong, make_options())
        with pytest.raises(RuntimeError, match=r"^fcos_loss: an image must have 0\.\.M boxes"):
            _check_values(wrong, assigned_nothing(), 3)
    packed = make_truth()
    assert packed.offsets is not None
    for offsets in (packed.offsets + 1, packed.offsets - 1):
        with pytest.raises(RuntimeError, match="^fcos_loss: offsets must start at 0 and end at K"):
            _check_values(packed._replace(offsets=offsets), assigned_nothing(), 3)


def assigned_nothing() -> AssignedTargets:
    labels = torch.full((2, LOCATIONS), -1)
    ltrb, centerness = torch.zeros(2, LOCATIONS, 4), torch.zeros(2, LOCATIONS)
    return AssignedTargets(labels, ltrb, centerness, labels, torch.zeros(2).long())


@FUNCTIONS
@pytest.mark.parametrize("part", range(3))
def test_mixed_devices(function: Any, part: int) -> None:
    """Levels, parts, boxes, labels, counts and normalizers, each elsewhere than the rest."""
    pyramid = make_pyramid()
    level = changed(part, 1, pyramid[part][1].detach().to("meta"))
    with pytest.raises(ValueError, match="^fcos_loss: .* must be on the device of the first level"):
        function(**arguments(predictions=level))
    padded = make_truth(padded=True)
    for name in ("boxes", "labels", "counts"):
        moved = {name: getattr(padded, name).to("meta")}
        with pytest.raises(ValueError, match=f": {name} must be on the device of|: all tensors"):
            function(**arguments(ground_truth=padded._replace(**moved)))


@FUNCTIONS
@pytest.mark.parametrize("part", range(3))
def test_mixed_dtypes(function: Any, part: int) -> None:
    """Each part has a dtype of its own, which its levels share; boxes have any."""
    predictions = [list(levels) for levels in make_pyramid()]
    predictions[part] = [x.detach().bfloat16().requires_grad_() for x in predictions[part]]
    truth = make_truth()
    truth = truth._replace(boxes=truth.boxes.half(), labels=truth.labels.int())
    assert function(tuple(predictions), truth, make_options()).num_pos > 0
    predictions[part][1] = predictions[part][1].float()
    with pytest.raises(TypeError, match="^fcos_loss: all levels must have the same dtype"):
        function(tuple(predictions), truth, make_options())


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        FCOSLossOptions().gamma = 1.0  # type: ignore[misc]
    assert hash(FCOSLossOptions()) == hash(FCOSLossOptions())
