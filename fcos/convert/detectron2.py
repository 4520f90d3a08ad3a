"""facebookresearch/detectron2: its FCOS, to and from; ``.pth``, or ``.pkl`` of numpy arrays."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fcos import dialects
from fcos.config import Config, DataConfig

from .errors import ConvertError
from .infer import infer
from .names import Names, TowerNames
from .translate import from_ours as translate_back
from .translate import to_ours as translate

NAME = "detectron2"
NAMES = Names(
    stem_conv="backbone.bottom_up.stem.conv1",
    stem_norm="backbone.bottom_up.stem.conv1.norm",
    conv="backbone.bottom_up.res{stage}.{block}.conv{i}",
    norm="backbone.bottom_up.res{stage}.{block}.conv{i}.norm",
    shortcut_conv="backbone.bottom_up.res{stage}.{block}.shortcut",
    shortcut_norm="backbone.bottom_up.res{stage}.{block}.shortcut.norm",
    deformable_conv="backbone.bottom_up.res{stage}.{block}.conv2",
    deformable_offset="backbone.bottom_up.res{stage}.{block}.conv2_offset",
    laterals=("backbone.fpn_lateral3", "backbone.fpn_lateral4", "backbone.fpn_lateral5"),
    outputs=("backbone.fpn_output3", "backbone.fpn_output4", "backbone.fpn_output5"),
    extras=("backbone.top_block.p6", "backbone.top_block.p7"),
    cls_tower=TowerNames("head.cls_subnet.{conv}", "head.cls_subnet.{norm}", "", ""),
    box_tower=TowerNames("head.bbox_subnet.{conv}", "head.bbox_subnet.{norm}", "", ""),
    cls_logits="head.cls_score",
    ltrb="head.bbox_pred",
    centerness="head.ctrness",
    first_stage=2,
    trunk="backbone.bottom_up",
)
IGNORED = ("pixel_mean", "pixel_std", "anchor_generator.")


# A norm of a tower, of which each level has its statistics, but all have one weight and bias.
_LEVEL_NORM = re.compile(r"(head\.(?:cls|bbox)_subnet\.\d+)\.(\d+)\.running_mean")
_SHARED = ("weight", "bias")


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys."""
    return {"head.cls_score.weight", "head.ctrness.weight", "backbone.fpn_lateral3.weight"} <= set(
        keys
    )


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights."""
    preset = dialects.detectron2()
    model = infer(_with_level_norms(state), NAMES, preset.model)
    return replace(preset, model=model, data=pixel_statistics(state, preset.data))


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return translate(_with_level_norms(state), NAMES, config(state).model, IGNORED)


def from_ours(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What detectron2's FCOS loads. Its configuration must say the rest: where the ResNet strides,
    the mean and deviation of the pixels, and their order.

    Raises:
        ConvertError: its FCOS has no such network.
    """
    model = config.model
    for name, needed in (
        ("activation", "relu"),
        ("normalize_ltrb", True),
        ("centerness_branch", "box"),
        ("locations", "half_stride"),
        ("corners", "edges"),
        ("trainable_scales", False),
        ("tower_bias", True),
        ("tower_deformable", False),
        ("shared_tower_convs", 0),
        ("batch_norm_eps", 1e-5),
    ):
        if getattr(model, name) != needed:
            raise ConvertError(
                f"detectron2's FCOS needs model.{name} {needed!r}, got {getattr(model, name)!r}"
            )
    if not model.backbone.startswith("resne") or model.backbone == "resnet10_half":
        raise ConvertError(f"detectron2 has no {model.backbone}")
    if len(model.strides) > 5:
        raise ConvertError(f"detectron2's pyramid has no strides beyond 128, got {model.strides}")
    return _without_level_norms(translate_back(state, NAMES, model))


def _with_level_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a weight and a bias for each level, all the same."""
    result = dict(state)
    for norm, level in _level_norms(state):
        for part in _SHARED:
            shared = f"{norm}.{part}"
            if shared in state:
                result[f"{norm}.{level}.{part}"] = state[shared]
                result.pop(shared, None)  # the first level's turn
    return result


def _without_level_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one for all. Raises ConvertError where levels differ in them."""
    for norm, level in _level_norms(state):
        for part in _SHARED:
            own = state.pop(f"{norm}.{level}.{part}")
            if not torch.equal(state.setdefault(f"{norm}.{part}", own), own):
                raise ConvertError(
                    f"detectron2's FCOS has one {part} for all levels in {norm}, got several"
                )
    return state


def _level_norms(keys: Collection[str]) -> list[tuple[str, str]]:
    """Their names, and each level."""
    found = [match for key in keys if (match := _LEVEL_NORM.fullmatch(key))]
    return [(match[1], match[2]) for match in found]


def pixel_statistics(state: Mapping[str, Tensor], data: DataConfig) -> DataConfig:
    """The mean and deviation that the checkpoint itself holds, if it does."""
    return replace(
        data,
        mean=_three_numbers(state, "pixel_mean", data.mean),
        std=_three_numbers(state, "pixel_std", data.std),
    )


def _three_numbers(
    state: Mapping[str, Tensor], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    if key not in state or state[key].is_meta:
        return default
    if state[key].numel() != 3:
        raise ConvertError(f"{key} must be three numbers, got {state[key].numel()}")
    # as they were written, 103.53, and not as the nearest float32
    first, second, third = (float(str(value)) for value in state[key].float().flatten().numpy())
    return first, second, third
