"""Which models are what they seem: torchvision's classes, with the methods that were read."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

#: Of methods that are replaced: the same from torchvision 0.15 on. See `fingerprint`.
FINGERPRINTS: dict[tuple[type, str], str] = {
    (FCOS, "compute_loss"): "6cdeffe969a3a7d3",
    (FCOSHead, "compute_loss"): "e79672d3d1c7ab8e",
    (FCOS, "postprocess_detections"): "477db9c995ee3f47",
    (RetinaNet, "compute_loss"): "a2d7d43a89252037",
    (RetinaNetHead, "compute_loss"): "335d5ec4011a7f35",
    (RetinaNetClassificationHead, "compute_loss"): "e4a327fae1b161a1",
    (RetinaNet, "postprocess_detections"): "dcda5dd6da7878f5",
}


def fingerprint(function: Callable[..., Any]) -> str:
    """Of what a function does: its syntax without name, annotations and documentation."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(repr(_syntax(tree)).encode()).hexdigest()[:16]


#: Fields of the syntax tree that do not count, or that only some versions of Python have.
_IGNORED = frozenset(
    (
        "name",
        "annotation",
        "returns",
        "decorator_list",
        "type_comment",
        "type_params",
        "ctx",
        "kind",
    )
)


def _syntax(node: Any) -> Any:
    """As nested lists, alike on all versions of Python, which ``ast.dump`` is not."""
    if isinstance(node, list):
        return [_syntax(child) for child in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        node = ast.Assign([node.target], node.value or ast.Constant(None))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    fields = [_syntax(child) for name, child in ast.iter_fields(node) if name not in _IGNORED]
    return [type(node).__name__, *fields]


def why_not(model: nn.Module) -> str | None:
    """Why the methods of an FCOS or RetinaNet cannot be replaced; None if they can."""
    parts: list[tuple[str, Any, type, tuple[str, ...]]]
    if isinstance(model, FCOS):
        parts = [
            ("the model", model, FCOS, ("compute_loss", "postprocess_detections")),
            ("its head", model.head, FCOSHead, ("compute_loss",)),
            ("its anchor generator", model.anchor_generator, AnchorGenerator, _ANCHOR_METHODS),
            ("its box coder", model.box_coder, BoxLinearCoder, ("encode", "decode")),
            ("the box coder of its head", model.head.box_coder, BoxLinearCoder, ("decode",)),
        ]
    elif isinstance(model, RetinaNet):
        head = getattr(model.head, "classification_head", None)
        parts = [
            ("the model", model, RetinaNet, ("compute_loss", "postprocess_detections")),
            ("its head", model.head, RetinaNetHead, ("compute_loss",)),
            ("its classification head", head, RetinaNetClassificationHead, ("compute_loss",)),
            ("its anchor generator", model.anchor_generator, AnchorGenerator, _ANCHOR_METHODS),
            ("its box coder", model.box_coder, BoxCoder, ("decode_single",)),
        ]
    else:
        return f"it must be a torchvision FCOS or RetinaNet, got {type(model).__name__}"
    base = parts[0][2]
    if type(model) is not base:
        return (
            f"{type(model).__name__} is a class of its own, whose methods would be lost: derive it "
            f"from fcos_ext.integrations.torchvision.Accelerated{base.__name__} instead of "
            f"{base.__name__}"
        )
    for what, part, known, methods in parts:
        for method in methods:
            if reason := _changed(what, part, known, method):
                return reason
    if isinstance(model, FCOS):
        return _why_not_squares(model)
    return None


_ANCHOR_METHODS = ("forward", "grid_anchors", "set_cell_anchors")


def _changed(what: str, part: Any, known: type, method: str) -> str | None:
    if not isinstance(part, known):
        return f"{what} must be a {known.__name__}, got {type(part).__name__}"
    if method in vars(part):
        return f"{what} has a {method} of its own, set on the instance"
    ours = getattr(known, method)
    if getattr(type(part), method) is not ours:
        return f"{what}, a {type(part).__name__}, overrides {known.__name__}.{method}"
    if ours.__module__ != known.__module__:
        return f"{known.__name__}.{method} has been replaced by one of {ours.__module__}"
    expected = FINGERPRINTS.get((known, method))
    if expected is None:
        return None
    try:
        actual = fingerprint(ours)
    except OSError:  # installed without its source: the numbers have to tell
        return None
    if actual != expected:
        return (
            f"{known.__name__}.{method} of this torchvision is not the one that is known here "
            f"({actual} instead of {expected})"
        )
    return None


def _why_not_squares(model: FCOS) -> str | None:
    generator = model.anchor_generator
    for level, anchors in enumerate(generator.cell_anchors):
        x0, y0, x1, y1 = anchors[0].tolist()
        if len(anchors) != 1 or not x1 - x0 == y1 - y0 > 0:
            return (
                "its anchors must be squares, one for each location, got "
                f"{anchors.tolist()} at level {level}"
            )
    if not (model.box_coder.normalize_by_size and model.head.box_coder.normalize_by_size):
        return "its box coders must normalize by size"
    return None
