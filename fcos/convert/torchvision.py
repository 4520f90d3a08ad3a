"""torchvision's FCOS: ``fcos_resnet50_fpn``, and the same on its other ResNets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from ..config import Backbone, Config, ConfigError, ModelConfig
from ..model import FCOS
from ..presets import torchvision
from .errors import ConvertError

NAME = "torchvision"

#: Where each part of the network is: (torchvision, ours). What follows is the same in both.
PARTS = (
    ("backbone.body.", "backbone.body."),
    ("backbone.fpn.inner_blocks.", "backbone.fpn.inner_blocks."),
    ("backbone.fpn.layer_blocks.", "backbone.fpn.layer_blocks."),
    ("backbone.fpn.extra_blocks.", "backbone.fpn.extra_blocks."),
    ("head.classification_head.conv.", "head.cls_tower."),
    ("head.classification_head.cls_logits.", "head.cls_logits."),
    ("head.regression_head.conv.", "head.box_tower."),
    ("head.regression_head.bbox_reg.", "head.ltrb."),
    ("head.regression_head.bbox_ctrness.", "head.centerness."),
)
#: Names that torchvision gave to the pyramid's convolutions before version 0.13, and gives now.
OLD_NAMES = {
    f"backbone.fpn.{blocks}.{i}.{kind}": f"backbone.fpn.{blocks}.{i}.0.{kind}"
    for blocks in ("inner_blocks", "layer_blocks")
    for i in range(3)
    for kind in ("weight", "bias")
}
#: Blocks of each stage, shape of the first block's first convolution, and input channels of a group
#: of its second one.
BACKBONES: dict[tuple[tuple[int, ...], tuple[int, ...], int], Backbone] = {
    ((2, 2, 2, 2), (64, 64, 3, 3), 64): "resnet18",
    ((3, 4, 6, 3), (64, 64, 3, 3), 64): "resnet34",
    ((3, 4, 6, 3), (64, 64, 1, 1), 64): "resnet50",
    ((3, 4, 23, 3), (64, 64, 1, 1), 64): "resnet101",
    ((3, 4, 23, 3), (256, 64, 1, 1), 8): "resnext101_32x8d",
    ((3, 4, 23, 3), (256, 64, 1, 1), 4): "resnext101_64x4d",
}
#: What torchvision's network is, whatever its weights.
_FIXED = (
    ("activation", "relu"),
    ("normalize_ltrb", True),
    ("trainable_scales", False),
    ("centerness_branch", "box"),
    ("locations", "torchvision"),
    ("strides", (8, 16, 32, 64, 128)),
    ("shared_tower_convs", 0),
    ("tower_norm", "group"),
    ("tower_bias", True),
    ("tower_deformable", False),
    ("p6_source", "p5"),
    ("stride_in", "3x3"),
    ("deformable_stages", ()),
    ("batch_norm_eps", 1e-5),
)
_CATEGORIES = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
_NO_CATEGORY = ("__background__", "N/A")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the names in a state dict of torchvision's FCOS, and not its RetinaNet."""
    return {
        "head.classification_head.cls_logits.weight",
        "head.regression_head.bbox_ctrness.weight",
    } <= set(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The preset ``torchvision``, with the backbone, sizes and classes of these weights.

    Raises:
        ConvertError: the backbone is none of torchvision's ResNets that we have.
    """
    settings = torchvision()
    model = settings.model
    if "backbone.body.bn1.num_batches_tracked" in state:  # of one trained from scratch
        model = replace(model, frozen_batch_norm=False, frozen_stages=0, backbone_weights="none")
    model = replace(
        model,
        num_classes=_shape(state, "head.classification_head.cls_logits.weight")[0],
        backbone=_backbone(state),
        fpn_channels=_shape(state, "head.classification_head.cls_logits.weight")[1],
        tower_convs=_count(state, "head.classification_head.conv.{}.weight", step=3),
    )
    return replace(settings, model=model)


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict of the same weights, and the keys that were ignored: none.

    All outputs are kept: of the 91 of COCO, 11 are of no category; see :func:`only_categories`.

    Raises:
        ConvertError: a key is unknown or missing, or has another shape than it should.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        ours = _renamed(OLD_NAMES.get(key, key), PARTS)
        if ours is None:
            unknown.append(key)
        else:
            renamed[ours] = value
    _check(renamed, unknown, config(state).model)
    return renamed, []


def from_ours(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict that torchvision's FCOS loads.

    Args:
        state: of our network.
        config: its settings.

    Raises:
        ConvertError: torchvision has no such network, or the weights are not of these settings.
    """
    for name, value in _FIXED:
        if (ours := getattr(config.model, name)) != value:
            raise ConvertError(f"torchvision's FCOS has model.{name} {value}, got {ours}")
    _check(state, [], config.model)
    back = tuple((ours, theirs) for theirs, ours in PARTS)
    renamed = {_renamed(key, back): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if key is not None}


def categories(num_classes: int) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Names and ids of COCO's 80 categories, if a network has torchvision's 91 outputs.

    Output i is of the category with the id i. The first output is nothing's, and so are ten more
    whose ids COCO does not use.
    """
    if num_classes != len(_CATEGORIES):
        return None
    ids = tuple(i for i, name in enumerate(_CATEGORIES) if name not in _NO_CATEGORY)
    return tuple(_CATEGORIES[i] for i in ids), ids


def only_categories(
    state: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], Config]:
    """Our state dict and settings without the 11 outputs of 91 that stand for no category.

    The scores of the others stay what they are: each is a sigmoid of its own. Training has taught
    the 11 to be near 0 everywhere. With another number of outputs nothing changes.
    """
    known = categories(config.model.num_classes or 0)
    if known is None:
        return dict(state), config
    names, ids = known
    rows = torch.tensor(ids)
    selected = {
        key: value[rows] if key in ("head.cls_logits.weight", "head.cls_logits.bias") else value
        for key, value in state.items()
    }
    return selected, replace(config, model=replace(config.model, num_classes=len(names)))


def _renamed(key: str, parts: tuple[tuple[str, str], ...]) -> str | None:
    for before, after in parts:
        if key.startswith(before):
            return after + key.removeprefix(before)
    return None


def _check(state: Mapping[str, Tensor], unknown: list[str], model: ModelConfig) -> None:
    """Raises ConvertError unless these are exactly the weights of this network of ours."""
    try:
        with torch.device("meta"):
            expected = FCOS(model, pretrained_backbone=False).state_dict()
    except ConfigError as error:
        raise ConvertError(f"torchvision: no network of ours has these weights: {error}") from error
    back = tuple((ours, theirs) for theirs, ours in PARTS)
    wrong = [f"unknown key {key}" for key in unknown]
    wrong += [f"unknown key {_renamed(key, back) or key}" for key in state.keys() - expected.keys()]
    wrong += [f"missing key {_renamed(key, back) or key}" for key in expected.keys() - state.keys()]
    wrong += [
        f"{_renamed(key, back) or key} has shape {tuple(state[key].shape)}, not "
        f"{tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if wrong:
        raise ConvertError("torchvision: the weights do not fit: " + "; ".join(sorted(wrong)))


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Four numbers."""
    if key not in state:
        raise ConvertError(f"torchvision: the weights do not fit: missing key {key}")
    if state[key].dim() != 4:
        raise ConvertError(
            f"torchvision: {key} must be the weight of a convolution, got the shape "
            f"{tuple(state[key].shape)}"
        )
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], key: str, step: int = 1) -> int:
    """How many of the keys are there, without a gap."""
    count = 0
    while key.format(count * step) in state:
        count += 1
    return count


def _backbone(state: Mapping[str, Tensor]) -> Backbone:
    blocks = tuple(
        _count(state, f"backbone.body.layer{stage}.{{}}.conv1.weight") for stage in range(1, 5)
    )
    first = _shape(state, "backbone.body.layer1.0.conv1.weight")
    group = _shape(state, "backbone.body.layer1.0.conv2.weight")[1]
    if (blocks, first, group) not in BACKBONES:
        raise ConvertError(
            f"torchvision: unknown backbone, of {blocks} blocks and a first convolution {first}; "
            f"known are {', '.join(BACKBONES.values())}"
        )
    return BACKBONES[blocks, first, group]
