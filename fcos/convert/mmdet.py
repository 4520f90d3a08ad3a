"""open-mmlab/mmdetection, versions 1 to 3: ResNets in both styles, deformable convolutions, HRNets.

Towers without a bias are those of the plain detector, with a bias of the one with "tricks".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from fcos import dialects
from fcos.config import Config

from .hints import pytorch_colors
from .infer import infer
from .names import Names, TowerNames
from .timm_names import HRNETS
from .translate import to_ours as translate

NAME = "mmdet"
NAMES = Names(
    stem_conv="backbone.conv1",
    stem_norm="backbone.bn1",
    conv="backbone.layer{stage}.{block}.conv{i}",
    norm="backbone.layer{stage}.{block}.bn{i}",
    shortcut_conv="backbone.layer{stage}.{block}.downsample.0",
    shortcut_norm="backbone.layer{stage}.{block}.downsample.1",
    deformable_conv="backbone.layer{stage}.{block}.conv2",
    deformable_offset="backbone.layer{stage}.{block}.conv2.conv_offset",
    laterals=(
        "neck.lateral_convs.0.conv",
        "neck.lateral_convs.1.conv",
        "neck.lateral_convs.2.conv",
    ),
    outputs=("neck.fpn_convs.0.conv", "neck.fpn_convs.1.conv", "neck.fpn_convs.2.conv"),
    extras=("neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv"),
    cls_tower=TowerNames(
        conv="bbox_head.cls_convs.{i}.conv",
        norm="bbox_head.cls_convs.{i}.{kind}",
        deformable_conv="bbox_head.cls_convs.{i}.conv",
        deformable_offset="bbox_head.cls_convs.{i}.conv.conv_offset",
    ),
    box_tower=TowerNames(
        conv="bbox_head.reg_convs.{i}.conv",
        norm="bbox_head.reg_convs.{i}.{kind}",
        deformable_conv="bbox_head.reg_convs.{i}.conv",
        deformable_offset="bbox_head.reg_convs.{i}.conv.conv_offset",
    ),
    cls_logits="bbox_head.conv_cls",
    ltrb="bbox_head.conv_reg",
    centerness="bbox_head.conv_centerness",
    scale="bbox_head.scales.{level}",
    trunk="backbone",
)
# Names of older versions, beside those above that they replace.
_OLD_HEAD = {
    "cls_logits": "bbox_head.fcos_cls",
    "ltrb": "bbox_head.fcos_reg",
    "centerness": "bbox_head.fcos_centerness",
}
_OLD_OFFSET = "backbone.layer{stage}.{block}.conv2_offset"
_OLD_TOWER_OFFSETS = ("bbox_head.cls_convs.{i}.conv_offset", "bbox_head.reg_convs.{i}.conv_offset")


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys."""
    return "bbox_head.conv_centerness.weight" in keys or "bbox_head.fcos_centerness.weight" in keys


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights."""
    names = _names(state)
    biased = infer(state, names, dialects.mmdet().model).tower_bias
    preset = dialects.mmdet_tricks() if biased else dialects.mmdet()
    model, data = infer(state, names, preset.model), preset.data
    if model.backbone in HRNETS:
        model = replace(model, frozen_stages=0)
        data = replace(data, mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395))
    elif model.backbone not in ("resnet50", "resnet101"):
        data = pytorch_colors(data)  # those it has from PyTorch, not from Caffe
    return replace(preset, model=model, data=data)


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return translate(state, _names(state), config(state).model, ())


def _names(state: Collection[str]) -> Names:
    names = NAMES
    if f"{_OLD_HEAD['cls_logits']}.weight" in state:
        names = replace(names, **_OLD_HEAD)  # type: ignore[arg-type]
    if any(".conv2_offset." in key for key in state):
        names = replace(names, deformable_offset=_OLD_OFFSET)
    if any("_convs.3.conv_offset." in key for key in state):
        cls_offset, box_offset = _OLD_TOWER_OFFSETS
        names = replace(
            names,
            cls_tower=replace(names.cls_tower, deformable_offset=cls_offset),
            box_tower=replace(names.box_tower, deformable_offset=box_offset),
        )
    return names
