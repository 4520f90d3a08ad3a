"""What code bases call the parts of the network, and the table that follows.

A family has one :class:`Names`: the key map of its checkpoints, written out. Which of the parts
there are, and how many of each, is in our :class:`fcos.config.ModelConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fcos.config import ModelConfig

from .parts import BATCH_NORM, CONV, CONV_BIAS, Rows, keys
from .timm_names import HRNETS, hrfpn, timm_trunk

#: Blocks of each stage, by backbone.
BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
    "resnext101_64x4d": (3, 4, 23, 3),
}
#: Inverted residual blocks of MobileNetV2 after the stem; all but the first expand their channels.
MOBILENET_BLOCKS = range(1, 18)


@dataclass(frozen=True)
class TowerNames:
    """A tower's layers. In the templates, {conv} is the place of the convolution in a sequence of
    all layers, {norm} that of the norm behind it, and {i} the number of the convolution."""

    conv: str
    norm: str
    deformable_conv: str
    deformable_offset: str


@dataclass(frozen=True)
class Names:
    """Templates of module names. {stage} counts from ``first_stage``, {block} from 0, and {i}, the
    convolution of a block, from 1."""

    stem_conv: str
    stem_norm: str
    conv: str
    norm: str
    shortcut_conv: str
    shortcut_norm: str
    deformable_conv: str
    deformable_offset: str
    laterals: tuple[str, str, str]
    outputs: tuple[str, str, str]
    extras: tuple[str, str]
    cls_tower: TowerNames
    box_tower: TowerNames
    cls_logits: str
    ltrb: str
    centerness: str
    shared_tower: TowerNames | None = None
    scale: str = ""
    """{level}; "": there are none."""
    first_stage: int = 1
    features: str = ""
    """Of MobileNetV2."""
    trunk: str = ""
    """Before the names of the networks that we have from timm."""

    def stage(self, stage: int) -> int:
        """Their number of our stage 1 to 4."""
        return stage - 1 + self.first_stage


OURS = Names(
    stem_conv="backbone.body.conv1",
    stem_norm="backbone.body.bn1",
    conv="backbone.body.layer{stage}.{block}.conv{i}",
    norm="backbone.body.layer{stage}.{block}.bn{i}",
    shortcut_conv="backbone.body.layer{stage}.{block}.downsample.0",
    shortcut_norm="backbone.body.layer{stage}.{block}.downsample.1",
    deformable_conv="backbone.body.layer{stage}.{block}.conv2",
    deformable_offset="backbone.body.layer{stage}.{block}.conv2.offset",
    laterals=(
        "backbone.fpn.inner_blocks.0.0",
        "backbone.fpn.inner_blocks.1.0",
        "backbone.fpn.inner_blocks.2.0",
    ),
    outputs=(
        "backbone.fpn.layer_blocks.0.0",
        "backbone.fpn.layer_blocks.1.0",
        "backbone.fpn.layer_blocks.2.0",
    ),
    extras=("backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"),
    shared_tower=TowerNames("head.shared_tower.{conv}", "head.shared_tower.{norm}", "", ""),
    cls_tower=TowerNames(
        "head.cls_tower.{conv}",
        "head.cls_tower.{norm}",
        "head.cls_tower.{conv}",
        "head.cls_tower.{conv}.offset",
    ),
    box_tower=TowerNames(
        "head.box_tower.{conv}",
        "head.box_tower.{norm}",
        "head.box_tower.{conv}",
        "head.box_tower.{conv}.offset",
    ),
    cls_logits="head.cls_logits",
    ltrb="head.ltrb",
    centerness="head.centerness",
    features="backbone.body",
)


def table(names: Names, config: ModelConfig) -> list[tuple[str, str]]:
    """Our key and theirs of every tensor but the scales and the counters of batch norms."""
    rows = list(_trunk(names, config))
    rows += _pyramid(names, config)
    if OURS.shared_tower is not None and names.shared_tower is not None:
        rows += _tower(
            OURS.shared_tower, names.shared_tower, config, config.shared_tower_convs, False
        )
    for ours_tower, their_tower in (
        (OURS.cls_tower, names.cls_tower),
        (OURS.box_tower, names.box_tower),
    ):
        rows += _tower(ours_tower, their_tower, config, config.tower_convs, config.tower_deformable)
    for part in ("cls_logits", "ltrb", "centerness"):
        rows += keys(getattr(OURS, part), getattr(names, part), CONV_BIAS)
    return rows


def place(template: str, i: int, norm: str) -> str:
    """The name of a layer of the tower's convolution ``i``."""
    step = 2 if norm == "none" else 3
    short = "bn" if "batch" in norm else "gn"
    return template.format(i=i, conv=step * i, norm=step * i + 1, kind=short)


def _pyramid(names: Names, config: ModelConfig) -> Rows:
    levels = len(config.strides)
    if config.backbone in HRNETS:
        yield from hrfpn(levels)
        return
    for level in range(3):
        yield from keys(OURS.laterals[level], names.laterals[level], CONV_BIAS)
        yield from keys(OURS.outputs[level], names.outputs[level], CONV_BIAS)
    for ours, theirs in zip(OURS.extras[: levels - 3], names.extras, strict=False):
        yield from keys(ours, theirs, CONV_BIAS)


def _trunk(names: Names, config: ModelConfig) -> Rows:
    if config.backbone == "mobilenet_v2":
        yield from _mobilenet(names)
        return
    if config.backbone not in BLOCKS:
        yield from timm_trunk(config.backbone, f"{names.trunk}.")
        return
    yield from keys(OURS.stem_conv, names.stem_conv, CONV)
    yield from keys(OURS.stem_norm, names.stem_norm, BATCH_NORM)
    bottleneck = config.backbone not in ("resnet18", "resnet34")
    for stage, blocks in enumerate(BLOCKS[config.backbone], start=1):
        for block in range(blocks):

            def both(
                part: str, i: int = 0, stage: int = stage, block: int = block
            ) -> tuple[str, str]:
                ours = getattr(OURS, part).format(stage=stage, block=block, i=i)
                return ours, getattr(names, part).format(stage=names.stage(stage), block=block, i=i)

            deformable = (
                stage in config.deformable_stages and block % config.deformable_interval == 0
            )
            for i in (1, 2, 3) if bottleneck else (1, 2):
                if deformable and i == 2:
                    yield from keys(*both("deformable_conv"), CONV)
                    yield from keys(*both("deformable_offset"), CONV_BIAS)
                else:
                    yield from keys(*both("conv", i), CONV)
                yield from keys(*both("norm", i), BATCH_NORM)
            if block == 0 and (bottleneck or stage > 1):
                yield from keys(*both("shortcut_conv"), CONV)
                yield from keys(*both("shortcut_norm"), BATCH_NORM)


def _mobilenet(names: Names) -> Rows:
    """Torchvision has convolution, norm and ReLU6 in a sequence of their own; the older layout has
    all of a block's layers in one."""
    ours, theirs = OURS.features, names.features
    yield from keys(f"{ours}.0.0", f"{theirs}.0.0", CONV)
    yield from keys(f"{ours}.0.1", f"{theirs}.0.1", BATCH_NORM)
    for block in MOBILENET_BLOCKS:
        layers: tuple[tuple[str, str, int], ...]
        if block == 1:
            layers = (("0.0", "0.1", 0), ("1", "2", 3))
        else:
            layers = (("0.0", "0.1", 0), ("1.0", "1.1", 3), ("2", "3", 6))
        for conv, norm, at in layers:
            yield from keys(f"{ours}.{block}.conv.{conv}", f"{theirs}.{block}.conv.{at}", CONV)
            yield from keys(
                f"{ours}.{block}.conv.{norm}", f"{theirs}.{block}.conv.{at + 1}", BATCH_NORM
            )


def _tower(
    ours: TowerNames, theirs: TowerNames, config: ModelConfig, convs: int, deformable: bool
) -> Rows:
    norm = config.tower_norm
    for i in range(convs):

        def both(part: str, i: int = i) -> tuple[str, str]:
            return place(getattr(ours, part), i, norm), place(getattr(theirs, part), i, norm)

        conv = CONV_BIAS if config.tower_bias else CONV
        if deformable and i == convs - 1:
            yield from keys(*both("deformable_conv"), conv)
            yield from keys(*both("deformable_offset"), CONV_BIAS)
        else:
            yield from keys(*both("conv"), conv)
        if norm == "group":
            yield from keys(*both("norm"), CONV_BIAS)
        elif norm == "batch":
            yield from keys(*both("norm"), BATCH_NORM)
        elif norm == "level_batch":
            for level in range(len(config.strides)):
                our_norm, their_norm = both("norm")
                yield from keys(f"{our_norm}.{level}", f"{their_norm}.{level}", BATCH_NORM)
