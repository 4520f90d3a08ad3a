"""The network that a checkpoint's keys and shapes describe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor

from fcos.config import Backbone, ModelConfig, TowerNorm

from .errors import ConvertError
from .names import BLOCKS, Names, TowerNames, place
from .timm_names import HRFPN_LEVEL, HRFPN_REDUCTION, HRNETS, VOVNETS

State = Mapping[str, Tensor]

# Bottleneck ResNets by blocks of each stage, channels of the first 3x3 convolution, and how many of
# them make a group.
_BOTTLENECKS: dict[tuple[tuple[int, ...], int, int], Backbone] = {
    (BLOCKS["resnet50"], 64, 64): "resnet50",
    (BLOCKS["resnet101"], 64, 64): "resnet101",
    (BLOCKS["resnext101_32x8d"], 256, 8): "resnext101_32x8d",
    (BLOCKS["resnext101_64x4d"], 256, 4): "resnext101_64x4d",
}
_BASIC: dict[tuple[int, ...], Backbone] = {
    BLOCKS["resnet18"]: "resnet18",
    BLOCKS["resnet34"]: "resnet34",
}


def infer(state: State, names: Names, base: ModelConfig) -> ModelConfig:
    """``base``, with the parts of the network as the checkpoint has them.

    Raises:
        ConvertError: it has another network than those of this project.
    """
    backbone = _backbone(state, names)
    channels, levels, c5 = _pyramid(state, names, backbone)
    shared = names.shared_tower
    # with all of its convolutions shared, a head has no other towers to look at
    has_cls_tower = _has_conv(state, names.cls_tower, 0)
    tower = names.cls_tower if has_cls_tower or shared is None else shared
    norm = _tower_norm(state, tower)
    convs = _count_convs(state, names.cls_tower, norm)
    first = place(tower.conv, 0, norm)
    if f"{first}.weight" not in state:  # a single one, and that deformable
        first = place(tower.deformable_conv, 0, norm)
    last_offset = place(names.cls_tower.deformable_offset, max(convs - 1, 0), norm)
    config = replace(
        base,
        num_classes=_shape(state, f"{names.cls_logits}.weight")[0],
        backbone=backbone,
        # whatever others a code base has are PyTorch's
        stride_in=base.stride_in if backbone in ("resnet50", "resnet101") else "3x3",
        strides=tuple(8 * 2**level for level in range(levels)),
        size_ranges=_size_ranges(base, levels),
        fpn_channels=channels,
        p6_source="c5" if c5 else "p5",
        shared_tower_convs=0 if shared is None else _count_convs(state, shared, norm),
        tower_convs=convs,
        tower_norm=norm,
        tower_bias=f"{first}.bias" in state,
        tower_deformable=convs > 0 and f"{last_offset}.weight" in state,
        trainable_scales=bool(names.scale) and f"{names.scale.format(level=0)}.scale" in state,
    )
    return _with_deformable_blocks(state, names, config)


def _shape(state: State, key: str) -> tuple[int, ...]:
    """Of a convolution's weight."""
    if key not in state:
        raise ConvertError(f"lacks {key}")
    shape = tuple(state[key].shape)
    if len(shape) != 4:
        raise ConvertError(f"{key} must be the weight of a convolution, got shape {shape}")
    return shape


def _size_ranges(base: ModelConfig, levels: int) -> tuple[tuple[float, float], ...]:
    if levels == len(base.size_ranges):
        return base.size_ranges
    return (*base.size_ranges[: levels - 1], (base.size_ranges[levels - 1][0], math.inf))


def _pyramid(state: State, names: Names, backbone: Backbone) -> tuple[int, int, bool]:
    """Its channels, how many levels it has, and whether P6 comes from C5."""
    if backbone in HRNETS:
        levels = 0
        while f"{HRFPN_LEVEL.format(level=levels)}.weight" in state:
            levels += 1
        return _shape(state, f"{HRFPN_REDUCTION}.weight")[0], levels, False
    outputs, inputs = _shape(state, f"{names.laterals[2]}.weight")[:2]
    extras = [name for name in names.extras if f"{name}.weight" in state]
    # where C5 has as many channels as P5, nothing tells
    c5 = bool(extras) and _shape(state, f"{extras[0]}.weight")[1] == inputs != outputs
    return outputs, 3 + len(extras), c5


def _backbone(state: State, names: Names) -> Backbone:
    if names.features and f"{names.features}.0.0.weight" in state:
        return "mobilenet_v2"
    if names.trunk and (found := _timm_backbone(state, names.trunk)):
        return found

    def conv(stage: int, block: int, i: int) -> str:
        return names.conv.format(stage=names.stage(stage), block=block, i=i) + ".weight"

    blocks = []
    for stage in range(1, 5):
        count = 0
        while conv(stage, count, 1) in state:
            count += 1
        blocks.append(count)
    if conv(1, 0, 3) not in state:
        if tuple(blocks) in _BASIC:
            return _BASIC[tuple(blocks)]
        first = names.conv.format(stage=names.stage(1), block=0, i=1)
        raise ConvertError(
            "has a backbone that is not here: "
            + (
                f"no ResNet, ResNeXt or MobileNetV2 known by {first} with stages of "
                f"{tuple(blocks)} blocks"
                if first
                else f"no VoVNet known by {names.trunk}.stem.stem_1/conv"
            )
        )
    second = conv(1, 0, 2)
    if second not in state:
        deformable = names.deformable_conv.format(stage=names.stage(1), block=0)
        second = f"{deformable}.weight"
    width, per_group = _shape(state, second)[:2]
    kind = _BOTTLENECKS.get((tuple(blocks), width, per_group))
    if kind is None:
        raise ConvertError(
            f"has a ResNet that is not here: stages of {tuple(blocks)} blocks, the first with "
            f"{width} channels in groups of {per_group}"
        )
    return kind


def _timm_backbone(state: State, trunk: str) -> Backbone | None:
    """DLA, VoVNet or HRNet; None: it is another network."""
    if f"{trunk}.base_layer.0.weight" in state:
        if f"{trunk}.level3.tree1.tree1.conv3.weight" in state:
            raise ConvertError("has a DLA of bottlenecks, which is not here: only DLA-34 is")
        return "dla34"
    if f"{trunk}.stem.stem_1/conv.weight" in state:
        return _vovnet(state, trunk)
    branch = f"{trunk}.stage4.0.branches.0.0.conv1.weight"
    if branch not in state:
        return None
    width = _shape(state, branch)[0]
    for hrnet, channels in HRNETS.items():
        if channels == width:
            return cast(Backbone, hrnet)
    raise ConvertError(f"has an HRNet of width {width}, only {tuple(HRNETS.values())} are here")


def _vovnet(state: State, trunk: str) -> Backbone:
    blocks = []
    for stage in range(2, 6):
        count = 0
        name = f"OSA{stage}_1"
        while f"{trunk}.stage{stage}.{name}.concat.{name}_concat/conv.weight" in state:
            count += 1
            name = f"OSA{stage}_{count + 1}"
        blocks.append(count)
    ese = f"{trunk}.stage2.OSA2_1.ese.fc.weight" in state
    for vovnet, plan in VOVNETS.items():
        if plan == (tuple(blocks), ese):
            return cast(Backbone, vovnet)
    raise ConvertError(
        f"has a VoVNet that is not here: stages of {tuple(blocks)} blocks, "
        f"with{'' if ese else 'out'} eSE"
    )


def _with_deformable_blocks(state: State, names: Names, config: ModelConfig) -> ModelConfig:
    blocks = BLOCKS.get(config.backbone, ())
    found = {
        (stage, block)
        for stage in range(1, len(blocks) + 1)
        for block in range(blocks[stage - 1])
        if names.deformable_offset.format(stage=names.stage(stage), block=block) + ".weight"
        in state
    }
    stages = tuple(sorted({stage for stage, _ in found}))
    for interval in range(1, max(blocks, default=0) + 1):
        regular = {
            (stage, block) for stage in stages for block in range(0, blocks[stage - 1], interval)
        }
        if found == regular:
            return replace(config, deformable_stages=stages, deformable_interval=interval)
    if found:
        raise ConvertError(f"has deformable blocks (stage, block) out of order: {sorted(found)}")
    return config


def _tower_norm(state: State, tower: TowerNames) -> TowerNorm:
    norm: TowerNorm
    for norm, part in (
        ("level_batch", "0.running_mean"),
        ("batch", "running_mean"),
        ("group", "weight"),
    ):
        key = f"{place(tower.norm, 0, norm)}.{part}"
        # in a sequence without norms, a convolution may have the place of a norm
        if key in state and state[key].dim() == 1:
            return norm
    return "none"


def _has_conv(state: State, tower: TowerNames, i: int, norm: str = "group") -> bool:
    return any(
        f"{place(template, i, norm)}.weight" in state
        for template in (tower.conv, tower.deformable_conv)
    )


def _count_convs(state: State, tower: TowerNames, norm: str) -> int:
    count = 0
    while _has_conv(state, tower, count, norm):
        count += 1
    return count
