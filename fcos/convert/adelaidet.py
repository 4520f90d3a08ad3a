"""aim-uofa/AdelaiDet: its FCOS detectors, real-time ones and those with VoVNet included.

A head whose centerness learned the IoU looks, and predicts, like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from fcos import dialects
from fcos.config import Config
from fcos.timm_backbones import NETWORKS

from .detectron2 import NAMES as DETECTRON2
from .detectron2 import pixel_statistics
from .infer import infer
from .names import TowerNames
from .timm_names import DLA_UNUSED
from .translate import to_ours as translate

NAME = "adelaidet"
_HEAD = "proposal_generator.fcos_head"
# The head is its own, all before it detectron2's.
NAMES = replace(
    DETECTRON2,
    shared_tower=TowerNames(
        f"{_HEAD}.share_tower.{{conv}}", f"{_HEAD}.share_tower.{{norm}}", "", ""
    ),
    cls_tower=TowerNames(
        conv=f"{_HEAD}.cls_tower.{{conv}}",
        norm=f"{_HEAD}.cls_tower.{{norm}}",
        deformable_conv=f"{_HEAD}.cls_tower.{{conv}}.conv",
        deformable_offset=f"{_HEAD}.cls_tower.{{conv}}.offset",
    ),
    box_tower=TowerNames(
        conv=f"{_HEAD}.bbox_tower.{{conv}}",
        norm=f"{_HEAD}.bbox_tower.{{norm}}",
        deformable_conv=f"{_HEAD}.bbox_tower.{{conv}}.conv",
        deformable_offset=f"{_HEAD}.bbox_tower.{{conv}}.offset",
    ),
    cls_logits=f"{_HEAD}.cls_logits",
    ltrb=f"{_HEAD}.bbox_pred",
    centerness=f"{_HEAD}.ctrness",
    scale=f"{_HEAD}.scales.{{level}}",
)
IGNORED = (
    "pixel_mean",
    "pixel_std",
    "proposal_generator.anchor_generator.",
    *(f"{NAMES.trunk}.{name}" for name in DLA_UNUSED),
)
# Of the ImageNet weights that its X-101-32x8d was trained from; the other backbones have 1.
_STD_32X8D = (57.375, 57.12, 58.395)


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys."""
    return {f"{_HEAD}.cls_logits.weight", f"{_HEAD}.ctrness.weight"} <= set(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights: with P3 to P5 alone, those of real-time models."""
    real_time = f"{NAMES.extras[0]}.weight" not in state
    preset = dialects.adelaidet_rt() if real_time else dialects.adelaidet()
    model, data = infer(state, NAMES, preset.model), preset.data
    if model.backbone in NETWORKS:  # which it freezes no stage of
        model = replace(model, frozen_stages=0)
    if model.backbone == "resnext101_32x8d":
        data = replace(data, std=_STD_32X8D)
    return replace(preset, model=model, data=pixel_statistics(state, data))


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return translate(state, NAMES, config(state).model, IGNORED)
