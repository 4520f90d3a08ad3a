"""The network that a checkpoint's keys and shapes describe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fcos.config import Backbone, ModelConfig, TowerNorm

from .errors import ConvertError
from .names import BLOCKS, Names, TowerNames, place

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
    lateral = _shape(state, f"{names.laterals[2]}.weight")
    backbone = _backbone(state, names)
    extras = [name for name in names.extras if f"{name}.weight" in state]
    c5 = bool(extras) and _shape(state, f"{extras[0]}.weight")[1] == lateral[1] != lateral[0]
    levels = 3 + len(extras)
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
        fpn_channels=lateral[0],
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


def _backbone(state: State, names: Names) -> Backbone:
    if names.features and f"{names.features}.0.0.weight" in state:
        return "mobilenet_v2"

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
        raise ConvertError(
            f"has a backbone that is not here: no ResNet, ResNeXt or MobileNetV2 known by "
            f"{names.conv.format(stage=names.stage(1), block=0, i=1)} with stages of "
            f"{tuple(blocks)} blocks"
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
