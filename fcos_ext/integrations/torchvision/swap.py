"""Puts the classes in place and back."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet

from ..._library import kernels, why_missing
from .fcos import AcceleratedFCOS
from .known import why_not
from .report import Figure, Replacement, Report, table_of
from .retinanet import AcceleratedRetinaNet
from .self_check import self_check


class Refused(RuntimeError):
    """The model was left as it is; the message says why."""


_ACCELERATED: dict[type, type] = {FCOS: AcceleratedFCOS, RetinaNet: AcceleratedRetinaNet}
_ORIGINAL = {ours: theirs for theirs, ours in _ACCELERATED.items()}

_DETECTION = Replacement("postprocess_detections", "postprocess, all images at once")
_COMMON_KEPT = (
    Replacement("forward, transform", "the network and its inputs are not touched"),
    Replacement("TorchScript", "restore() before torch.jit.script"),
)
_REPLACED: dict[type, tuple[Replacement, ...]] = {
    AcceleratedFCOS: (
        Replacement("compute_loss, matching", "assign_targets(ties='torchvision')"),
        Replacement("compute_loss, classification", "sigmoid_focal_loss of integer labels"),
        Replacement("compute_loss, boxes, centerness", "box_and_centerness_loss"),
        _DETECTION,
    ),
    AcceleratedRetinaNet: (
        Replacement("compute_loss, classification", "sigmoid_focal_loss of integer labels"),
        _DETECTION,
    ),
}
_KEPT: dict[type, tuple[Replacement, ...]] = {
    AcceleratedFCOS: _COMMON_KEPT,
    AcceleratedRetinaNet: (
        Replacement("compute_loss, matching, boxes", "no kernel for them"),
        *_COMMON_KEPT,
    ),
}


def accelerate(model: nn.Module) -> Report:
    """Let a torchvision FCOS or RetinaNet compute loss and detections with our kernels, in place.

    The model gets a subclass of its class: parameters, hooks, ``state_dict``, ``deepcopy``,
    ``torch.save``, DDP, training and evaluation stay what they are. What it computes stays the
    same, too: the same matches, losses and gradients up to the rounding of sums in float32, and
    equal detections, but for scores and decoded deltas in the last bits, and the order of scores
    that are nearly equal. Before this function returns it has compared them, on random inputs of
    the model's shapes, on its device. Under autocast, where torchvision decodes boxes in half
    precision, loss and detections are those of float32.

    A model saved as a whole needs ``fcos_ext`` to be loaded; a ``state_dict`` does not. The second
    time nothing happens.

    Args:
        model: an ``FCOS`` or ``RetinaNet`` of ``torchvision.models.detection``, not a subclass,
            nor what wraps one (of a DDP, its ``module``).

    Returns:
        Report: what was replaced, what was not, and the differences that were measured.

    Raises:
        TypeError: it is neither of the two.
        Refused: methods are not the ones known here, or the results differ; the model is as it was.
    """
    if type(model) in _ORIGINAL:
        return _report(model, type(model), (), "")
    if not isinstance(model, (FCOS, RetinaNet)):
        raise TypeError(
            f"accelerate: model must be a torchvision FCOS or RetinaNet, got {type(model).__name__}"
        )
    reason = why_not(model)
    device = next(model.parameters()).device
    if reason is None and device.type not in kernels("sigmoid_focal_loss"):
        reason = f"there are no kernels for {device.type}: {why_missing(device.type)}"
    if reason is not None:
        raise Refused(f"accelerate: {reason}")

    original = type(model)
    ours = _ACCELERATED[original]
    model.__class__ = ours
    try:
        figures = self_check(model, original)
    except BaseException:
        model.__class__ = original
        raise
    if not all(figure.agrees for figure in figures):
        model.__class__ = original
        raise Refused(
            "accelerate: results differ from torchvision's, the model is as it was\n"
            + "\n".join(table_of(figures))
        )
    return _report(model, ours, figures, str(device))


def _report(model: nn.Module, ours: type, figures: tuple[Figure, ...], device: str) -> Report:
    name = f"torchvision {_ORIGINAL[ours].__name__}, now {ours.__name__}"
    if not figures:
        name = f"{ours.__name__}, as before: nothing was done"
    return Report(name, device, _REPLACED[ours], _KEPT[ours], figures)


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`; of any other model, do nothing."""
    original = _ORIGINAL.get(type(model))
    if original is not None:
        model.__class__ = original
