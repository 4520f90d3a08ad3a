"""rosinality/fcos-pytorch: VoVNets, the pyramid and the head in names of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from fcos import dialects
from fcos.config import Config

from .infer import infer
from .names import Names, TowerNames
from .translate import to_ours as translate

NAME = "rosinality"
NAMES = Names(
    # it has no ResNet
    stem_conv="",
    stem_norm="",
    conv="",
    norm="",
    shortcut_conv="",
    shortcut_norm="",
    deformable_conv="",
    deformable_offset="",
    trunk="backbone",
    laterals=("fpn.inner_convs.2", "fpn.inner_convs.3", "fpn.inner_convs.4"),
    outputs=("fpn.out_convs.2", "fpn.out_convs.3", "fpn.out_convs.4"),
    extras=("fpn.top_blocks.p6", "fpn.top_blocks.p7"),
    cls_tower=TowerNames("head.cls_tower.{conv}", "head.cls_tower.{norm}", "", ""),
    box_tower=TowerNames("head.bbox_tower.{conv}", "head.bbox_tower.{norm}", "", ""),
    cls_logits="head.cls_pred",
    ltrb="head.bbox_pred",
    centerness="head.center_pred",
    scale="head.scales.{level}",
)


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys."""
    return {"head.center_pred.weight", "head.cls_pred.weight"} <= set(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights."""
    preset = dialects.rosinality()
    return replace(preset, model=infer(state, NAMES, preset.model))


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return translate(state, NAMES, config(state).model, ())
