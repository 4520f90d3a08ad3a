"""tianzhi0549/FCOS, a fork of maskrcnn-benchmark; also the base of other FCOS repositories.

The weights of the plain and of the improved detector have the same names and shapes, but differ in
meaning (exp of pixels, relu of strides). Only the name of the file, or the user, can tell; see
``original_imprv.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from fcos import dialects
from fcos.config import Config

from .infer import infer
from .names import Names, TowerNames
from .translate import to_ours as translate

NAME = "original"

NAMES = Names(
    stem_conv="backbone.body.stem.conv1",
    stem_norm="backbone.body.stem.bn1",
    conv="backbone.body.layer{stage}.{block}.conv{i}",
    norm="backbone.body.layer{stage}.{block}.bn{i}",
    shortcut_conv="backbone.body.layer{stage}.{block}.downsample.0",
    shortcut_norm="backbone.body.layer{stage}.{block}.downsample.1",
    deformable_conv="backbone.body.layer{stage}.{block}.conv2.conv",
    deformable_offset="backbone.body.layer{stage}.{block}.conv2.offset",
    laterals=("backbone.fpn.fpn_inner2", "backbone.fpn.fpn_inner3", "backbone.fpn.fpn_inner4"),
    outputs=("backbone.fpn.fpn_layer2", "backbone.fpn.fpn_layer3", "backbone.fpn.fpn_layer4"),
    extras=("backbone.fpn.top_blocks.p6", "backbone.fpn.top_blocks.p7"),
    cls_tower=TowerNames(
        conv="rpn.head.cls_tower.{conv}",
        norm="rpn.head.cls_tower.{norm}",
        deformable_conv="rpn.head.cls_tower.{conv}.conv",
        deformable_offset="rpn.head.cls_tower.{conv}.offset",
    ),
    box_tower=TowerNames(
        conv="rpn.head.bbox_tower.{conv}",
        norm="rpn.head.bbox_tower.{norm}",
        deformable_conv="rpn.head.bbox_tower.{conv}.conv",
        deformable_offset="rpn.head.bbox_tower.{conv}.offset",
    ),
    cls_logits="rpn.head.cls_logits",
    ltrb="rpn.head.bbox_pred",
    centerness="rpn.head.centerness",
    scale="rpn.head.scales.{level}",
    features="backbone.body.features",
)
IGNORED = ("rpn.anchor_generator.",)


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys. Deformable convolutions came with the improvements."""
    return is_layout(keys) and not any(".offset." in key for key in keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights."""
    return with_network(state, dialects.original())


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return translate(state, NAMES, config(state).model, IGNORED)


def with_network(state: Mapping[str, Tensor], preset: Config) -> Config:
    """The preset, with the network of the checkpoint."""
    model = infer(state, NAMES, preset.model)
    if model.backbone == "mobilenet_v2":  # whose batch norms are PyTorch's, and not frozen
        model = replace(model, batch_norm_eps=1e-5, frozen_stages=0)
    return replace(preset, model=model)


def is_layout(keys: Collection[str]) -> bool:
    """Whether the keys are those of this code base, plain or improved."""
    return {"rpn.head.cls_logits.weight", "rpn.head.centerness.weight"} <= set(keys)
