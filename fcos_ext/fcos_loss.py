"""The whole training loss of FCOS, from the outputs of the head and the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ._levels import check_levels, check_normalizers, check_parts
from .assign_targets import AssignedTargets, assign_targets, assign_targets_ref
from .box_and_centerness_loss import box_and_centerness_loss, box_and_centerness_loss_ref
from .fcos_loss_options import BoxWeights, FCOSLossOptions, GroundTruth
from .fcos_normalizers import fcos_normalizers_and_labels, fcos_normalizers_ref
from .sigmoid_focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref

_OP = "fcos_loss"

_BOX_WEIGHTS = get_args(BoxWeights)
Reduce = Callable[[Tensor], Tensor]
Levels = Sequence[Tensor]


class FCOSLoss(NamedTuple):
    """The terms, each a 0-d tensor to be added up."""

    cls: Tensor
    """Focal loss of all logits over the number of positives. Differentiable in the logits."""
    box: Tensor
    """Overlap losses of the positives, times their weights, over the sum of the weights.
    Differentiable in the distances."""
    centerness: Tensor
    """Cross-entropies of the positives over their number. Differentiable in the centerness."""
    num_pos: Tensor
    """int64: positive locations of these predictions, before ``reduce``."""
    num_ignored: Tensor
    """int64: locations whose label names no class of the head, nor is -1. They take no part. Unless
    it was meant, anything but 0 means that the labels of the ground truth and the head do not fit;
    ``FCOSLossOptions(debug=True)`` then stops at the first such batch."""


def fcos_loss(
    predictions: tuple[Levels, Levels, Levels],
    ground_truth: GroundTruth | AssignedTargets,
    options: FCOSLossOptions,
    *,
    reduce: Reduce | None = None,
    normalizers: Tensor | None = None,
) -> FCOSLoss:
    """Classification, box and centerness loss of FCOS, arXiv 1904.01355 section 3, as one call.

    With C classes, n the number of positives and s the sum of their centerness targets::

        cls         sum of sigmoid_focal_loss(logits, labels)                / max(n, 1)
        box         sum of centerness target * iou_loss(ltrb, target)        / max(s, 1e-6)
        centerness  sum of BCE(centerness, centerness target)                / max(n, 1)

    without weights, ``box`` is the sum of the overlap losses over max(n, 1).

    The levels are taken as they are, contiguous or channels_last, which may change from level to
    level; nothing is permuted, joined or copied, and each gradient has the memory format of its
    level. The forward pass makes the gradients along with the losses, where one is asked for and
    it is not traced by ``torch.compile``: a backward pass whose incoming gradient is exactly 1 then
    has nothing left to do, any other recomputes. On CUDA that is six launches in all: the targets,
    the two sums, two losses with their gradients, and in the backward pass two that look at the
    incoming gradient. The host waits for nothing, and with padded boxes a CUDA graph can hold it
    all. Of memory, the gradients and 20 bytes a location are needed.

    A location whose label is not below C, or below -1, takes no part, gets zero gradient and is
    counted. Non-finite predictions show up in their own term, or, as distances or centerness of the
    background, not at all. Results are the same to the bit in every run, on any number of threads.

    Args:
        predictions: (logits, ltrb, centerness), of each a sequence over 1 to 8 levels:
            Tensor[N, C, H_l, W_l] raw class scores, Tensor[N, 4, H_l, W_l] distances to the sides
            of the box, in strides or pixels, and Tensor[N, 1, H_l, W_l] raw scores. Each of the
            three has a floating dtype of its own; the math is float32 (float64 for float64).
        ground_truth: boxes and labels, packed or padded; or targets that :func:`assign_targets`
            has made from them, of whose options those given here then have no effect.
        options: what is computed.
        reduce: called once, between the assignment and the losses, with float32 Tensor[2] (n, s)
            on the device. It returns what to divide by instead, such as the average over
            processes. It may change its argument.
        normalizers (Tensor[2], optional): n and s, if they are known already. Excludes ``reduce``.

    Returns:
        FCOSLoss: 0-d tensors, float32 (float64 for float64 predictions), and int64 counts. Nothing
        is differentiable twice.

    Raises:
        TypeError: a tensor has the wrong kind of dtype, or ``reduce`` returns no tensor.
        ValueError: shapes, devices or numbers of levels do not agree, or an option is out of its
            range; and what :func:`assign_targets` raises: on the CPU, too, that an image has more
            boxes than there is room for.
        RuntimeError: with ``debug``, a value is out of its range.
    """
    _check(predictions, options, reduce, normalizers)
    logits, ltrb, centerness = predictions
    num_classes = logits[0].shape[1]
    targets = _targets(predictions, ground_truth, options, assign_targets)
    labels, true_ltrb = targets.labels, targets.ltrb
    if normalizers is None:
        normalizers, labels = fcos_normalizers_and_labels(labels, targets.centerness, num_classes)
        if reduce is not None:
            normalizers = _reduced(reduce, normalizers)
    true_centerness = _own_centerness(ground_truth)
    del targets, ground_truth  # before the gradients need memory
    cls = sigmoid_focal_loss(
        logits,
        labels,
        options.alpha,
        options.gamma,
        normalizer=normalizers[0],
        fused_gradient=True,
    )
    sums = box_and_centerness_loss(
        ltrb,
        centerness,
        true_ltrb,
        labels,
        centerness_target=true_centerness,
        weighted=options.box_weights == "centerness",
        quality=options.quality,
        kind=options.box_loss,
        smooth=options.iou_smooth,
        num_classes=num_classes,
        normalizers=normalizers,
        fused_gradient=True,
    )
    return FCOSLoss(cls, sums.box, sums.centerness, sums.num_pos, sums.num_ignored)


def fcos_loss_ref(
    predictions: tuple[Levels, Levels, Levels],
    ground_truth: GroundTruth | AssignedTargets,
    options: FCOSLossOptions,
    *,
    reduce: Reduce | None = None,
    normalizers: Tensor | None = None,
) -> FCOSLoss:
    """Same contract as :func:`fcos_loss`, in plain PyTorch, differentiable twice."""
    _check(predictions, options, reduce, normalizers)
    logits, ltrb, centerness = predictions
    num_classes = logits[0].shape[1]
    targets = _targets(predictions, ground_truth, options, assign_targets_ref)
    if normalizers is None:
        normalizers = fcos_normalizers_ref(targets.labels, targets.centerness, num_classes)
        if reduce is not None:
            normalizers = _reduced(reduce, normalizers)
    cls = sigmoid_focal_loss_ref(
        logits, targets.labels, options.alpha, options.gamma, normalizer=normalizers[0]
    )
    sums = box_and_centerness_loss_ref(
        ltrb,
        centerness,
        targets.ltrb,
        targets.labels,
        centerness_target=_own_centerness(ground_truth),
        weighted=options.box_weights == "centerness",
        quality=options.quality,
        kind=options.box_loss,
        smooth=options.iou_smooth,
        num_classes=num_classes,
        normalizers=normalizers,
    )
    return FCOSLoss(cls, sums.box, sums.centerness, sums.num_pos, sums.num_ignored)


def _targets(
    predictions: tuple[Levels, Levels, Levels],
    ground_truth: GroundTruth | AssignedTargets,
    options: FCOSLossOptions,
    assign: Callable[..., AssignedTargets],
) -> AssignedTargets:
    logits = predictions[0]
    if isinstance(ground_truth, AssignedTargets):
        targets = ground_truth
    else:
        boxes, labels, offsets, counts = ground_truth
        if boxes.device != logits[0].device:
            raise ValueError(
                f"{_OP}: boxes must be on the device of the logits, {logits[0].device}, got "
                f"{boxes.device}"
            )
        if len(options.strides) != len(logits):
            raise ValueError(
                f"{_OP}: predictions must have a level for each of the {len(options.strides)} "
                f"strides, got {len(logits)}"
            )
        targets = assign(
            boxes,
            labels,
            offsets,
            counts=counts,
            feature_sizes=[(level.shape[2], level.shape[3]) for level in logits],
            strides=options.strides,
            size_ranges=options.size_ranges,
            center_sampling_radius=options.center_sampling_radius,
            boundary=options.boundary,
            normalize=options.normalize_ltrb,
        )
    expected = (logits[0].shape[0], sum(level.shape[2] * level.shape[3] for level in logits))
    if tuple(targets.labels.shape) != expected:
        raise ValueError(
            f"{_OP}: ground_truth must be of the predictions' N images and L locations, "
            f"{expected}, got {tuple(targets.labels.shape)}"
        )
    if targets.labels.device != logits[0].device:
        raise ValueError(
            f"{_OP}: ground_truth must be on the device of the logits, {logits[0].device}, got "
            f"{targets.labels.device}"
        )
    if options.debug:
        _check_values(ground_truth, targets, logits[0].shape[1])
    return targets


def _check_values(
    ground_truth: GroundTruth | AssignedTargets, targets: AssignedTargets, num_classes: int
) -> None:
    """Raise, or on a GPU stop the device, unless all labels, counts and offsets are in range."""
    labels = targets.labels
    if isinstance(ground_truth, AssignedTargets):
        known = (labels >= -2) & (labels < num_classes)
        rule = "must lie in -2..C-1"
    else:
        _, _, offsets, counts = ground_truth
        room, count = ground_truth.boxes.shape[-2], counts
        if offsets is not None:
            first, last = offsets[:1] == 0, offsets[-1:] == room
            _assert("offsets must start at 0 and end at K", torch.cat((first, last)))
            count = offsets.diff()
        if count is not None:
            _assert("an image must have 0..M boxes", (count >= 0) & (count <= room))
        of_box = targets.matched >= 0
        known = ~of_box | ((labels >= 0) & (labels < num_classes))
        rule = "of boxes must lie in 0..C-1"
    _assert(f"labels {rule}, C = {num_classes}", known)


def _assert(rule: str, holds: Tensor) -> None:
    torch._assert_async(holds.all(), f"{_OP}: {rule}")


def _own_centerness(ground_truth: GroundTruth | AssignedTargets) -> Tensor | None:
    """The targets that the caller has made; None: those that follow from the distances."""
    return ground_truth.centerness if isinstance(ground_truth, AssignedTargets) else None


def _reduced(reduce: Reduce, sums: Tensor) -> Tensor:
    result = reduce(sums)
    if not isinstance(result, Tensor):
        raise TypeError(f"{_OP}: reduce must return a tensor, got {type(result).__name__}")
    check_normalizers(_OP, "what reduce returns", result)
    return result


def _check(
    predictions: tuple[Levels, Levels, Levels],
    options: FCOSLossOptions,
    reduce: Reduce | None,
    normalizers: Tensor | None,
) -> None:
    if len(predictions) != 3:
        raise ValueError(
            f"{_OP}: predictions must be (logits, ltrb, centerness), got {len(predictions)} parts"
        )
    parts = dict(zip(("logits", "ltrb", "centerness"), predictions, strict=True))
    for (name, levels), channels in zip(parts.items(), (None, 4, 1), strict=True):
        check_levels(_OP, name, levels, channels)
    check_parts(_OP, parts)
    if options.box_weights not in _BOX_WEIGHTS:
        raise ValueError(
            f"{_OP}: box_weights must be one of {_BOX_WEIGHTS}, got {options.box_weights!r}"
        )
    if normalizers is None:
        return
    if reduce is not None:
        raise ValueError(f"{_OP}: either reduce or normalizers can be given, got both")
    check_normalizers(_OP, "normalizers", normalizers)
    if normalizers.device != (device := predictions[0][0].device):
        raise ValueError(
            f"{_OP}: normalizers must be on the device of the logits, {device}, got "
            f"{normalizers.device}"
        )
