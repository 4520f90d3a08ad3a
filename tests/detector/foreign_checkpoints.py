"""Checkpoints with the key layouts of other code bases, written from descriptions of those layouts.

Independent of the tables in ``fcos.convert``. Each tensor comes with its role: the name that the
same tensor has in torchvision's layout, and so in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from foreign_trunks import dla34, hrfpn, hrnet, mobilenet, vovnet
from torch import Tensor

PLANS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 18: (2, 2, 2, 2)}

#: What stands before the names of the backbone.
ROOTS = {
    "original": "backbone.body.",
    "adelaidet": "backbone.bottom_up.",
    "detectron2": "backbone.bottom_up.",
    "mmdet": "backbone.",
    "rosinality": "backbone.",
}


@dataclass
class Checkpoint:
    """A state dict, and for each role the key that has it."""

    make: Callable[[tuple[int, ...]], Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    scales: list[str] = field(default_factory=list)

    def add(self, theirs: str, role: str, *shape: int) -> None:
        assert theirs not in self.state and role not in self.roles, (theirs, role)
        self.state[theirs] = self.make(shape)
        self.roles[role] = theirs

    def conv(
        self, theirs: str, role: str, outputs: int, inputs: int, kernel: int, bias: bool = False
    ) -> None:
        self.add(f"{theirs}.weight", f"{role}.weight", outputs, inputs, kernel, kernel)
        if bias:
            self.add(f"{theirs}.bias", f"{role}.bias", outputs)

    def norm(self, theirs: str, role: str, channels: int, *, batch: bool = True) -> None:
        for part in ("weight", "bias", *(("running_mean", "running_var") if batch else ())):
            self.add(f"{theirs}.{part}", f"{role}.{part}", channels)

    def cycle(self, theirs: str, role: str, channels: int, levels: int) -> None:
        """Their one weight and bias have the role of each level's."""
        for part in ("weight", "bias"):
            self.state[f"{theirs}.{part}"] = self.make((channels,))
            for level in range(levels):
                self.roles[f"{role}.{level}.{part}"] = f"{theirs}.{part}"
        for level in range(levels):
            for part in ("running_mean", "running_var"):
                self.add(f"{theirs}.{level}.{part}", f"{role}.{level}.{part}", channels)


class Unique:
    """Tensors that all hold another number, and take no memory."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return torch.tensor(float(self.count)).expand(shape)


class Random:
    """Weights that neither die out nor explode through many layers; positive where 1-d, so that
    they may be variances."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 4:
            fan = shape[1] * shape[2] * shape[3]
            return torch.randn(shape, generator=self.generator) * (2 / fan) ** 0.5
        return 0.5 + torch.rand(shape, generator=self.generator)


@dataclass(frozen=True)
class Layout:
    """What varies between checkpoints of one code base."""

    family: str
    depth: int = 50
    groups: int = 1
    group_width: int = 64
    mobilenet: bool = False
    other: str = ""
    """DLA-34, a VoVNet (of foreign_trunks.VOVNETS), or HRNet and its width as in W18."""
    dcn_stages: tuple[int, ...] = ()
    dcn_interval: int = 1
    dcn_tower: bool = False
    channels: int = 256
    levels: int = 5
    classes: int = 80
    tower: int = 4
    shared: int = 0
    norm: str = "gn"
    """gn, bn (AdelaiDet: one for each level; others: one for all), none; cycle: detectron2's
    statistics of each level, with one weight and bias for all"""
    bias: bool = True
    scales: bool = True
    c5: bool = False
    old: bool = False
    """Names of mmdetection's earlier versions."""


def build(layout: Layout, make: Callable[[tuple[int, ...]], Tensor] | None = None) -> Checkpoint:
    """The checkpoint of a layout."""
    checkpoint = Checkpoint(make or Unique())
    root = ROOTS[layout.family]
    if layout.other.startswith("W"):
        branches = hrnet(checkpoint, root, int(layout.other[1:]))
        hrfpn(checkpoint, branches, layout.channels, layout.levels)
        _head(checkpoint, layout)
        return checkpoint
    if layout.mobilenet:
        stage_channels = mobilenet(checkpoint)
    elif layout.other == "DLA-34":
        stage_channels = dla34(checkpoint, root)
    elif layout.other:
        stage_channels = vovnet(checkpoint, root, layout.other)
    else:
        stage_channels = _resnet(checkpoint, layout)
    _pyramid(checkpoint, layout, stage_channels)
    _head(checkpoint, layout)
    return checkpoint


def _resnet(c: Checkpoint, layout: Layout) -> list[int]:
    family = layout.family
    root = ROOTS[family]
    d2 = family in ("adelaidet", "detectron2")
    stem = root + ("stem." if family != "mmdet" else "")
    c.conv(f"{stem}conv1", "backbone.body.conv1", 64, 3, 7)
    c.norm(stem + ("conv1.norm" if d2 else "bn1"), "backbone.body.bn1", 64)
    basic = layout.depth == 18
    inputs = 64
    channels = []
    for s, blocks in enumerate(PLANS[layout.depth]):
        width = 64 * 2**s * layout.groups * layout.group_width // 64
        outputs = 64 * 2**s * (1 if basic else 4)
        for b in range(blocks):
            theirs = f"{root}res{s + 2}.{b}." if d2 else f"{root}layer{s + 1}.{b}."
            role = f"backbone.body.layer{s + 1}.{b}."
            plan = [(1, inputs, width), (2, width // layout.groups, width), (1, width, outputs)]
            if basic:
                plan = [(3, inputs, outputs), (3, outputs, outputs)]
            for n, (_, from_, to) in enumerate(plan, start=1):
                kernel = 3 if basic or n == 2 else 1
                dcn = n == 2 and s + 1 in layout.dcn_stages and b % layout.dcn_interval == 0
                conv = f"{theirs}conv{n}"
                c.conv(
                    conv + (".conv" if dcn and family == "original" else ""),
                    f"{role}conv{n}",
                    to,
                    from_,
                    kernel,
                )
                if dcn:
                    offset = {
                        "original": f"{conv}.offset",
                        "mmdet": f"{conv}_offset" if layout.old else f"{conv}.conv_offset",
                    }.get(family, f"{conv}_offset")
                    c.conv(offset, f"{role}conv{n}.offset", 27, width, 3, bias=True)
                norm = f"{theirs}conv{n}.norm" if d2 else f"{theirs}bn{n}"
                c.norm(norm, f"{role}bn{n}", to)
            if b == 0 and inputs != outputs:
                shortcut = f"{theirs}shortcut" if d2 else f"{theirs}downsample.0"
                c.conv(shortcut, f"{role}downsample.0", outputs, inputs, 1)
                norm = f"{theirs}shortcut.norm" if d2 else f"{theirs}downsample.1"
                c.norm(norm, f"{role}downsample.1", outputs)
            inputs = outputs
        channels.append(outputs)
    return channels[1:]


def _pyramid(c: Checkpoint, layout: Layout, stage_channels: list[int]) -> None:
    family, out = layout.family, layout.channels
    for i, channels in enumerate(stage_channels):
        lateral, output = {
            "original": (f"backbone.fpn.fpn_inner{i + 2}", f"backbone.fpn.fpn_layer{i + 2}"),
            "mmdet": (f"neck.lateral_convs.{i}.conv", f"neck.fpn_convs.{i}.conv"),
            "rosinality": (f"fpn.inner_convs.{i + 2}", f"fpn.out_convs.{i + 2}"),
        }.get(family, (f"backbone.fpn_lateral{i + 3}", f"backbone.fpn_output{i + 3}"))
        c.conv(lateral, f"backbone.fpn.inner_blocks.{i}.0", out, channels, 1, bias=True)
        c.conv(output, f"backbone.fpn.layer_blocks.{i}.0", out, out, 3, bias=True)
    for i in range(layout.levels - 3):
        theirs = {
            "original": f"backbone.fpn.top_blocks.p{6 + i}",
            "mmdet": f"neck.fpn_convs.{3 + i}.conv",
            "rosinality": f"fpn.top_blocks.p{6 + i}",
        }.get(family, f"backbone.top_block.p{6 + i}")
        below = stage_channels[-1] if layout.c5 and i == 0 else out
        c.conv(theirs, f"backbone.fpn.extra_blocks.p{6 + i}", out, below, 3, bias=True)


def _head(c: Checkpoint, layout: Layout) -> None:
    family, channels = layout.family, layout.channels
    head, cls, box, logits, ltrb, centerness = {
        "original": (
            "rpn.head.",
            "cls_tower",
            "bbox_tower",
            "cls_logits",
            "bbox_pred",
            "centerness",
        ),
        "adelaidet": (
            "proposal_generator.fcos_head.",
            "cls_tower",
            "bbox_tower",
            "cls_logits",
            "bbox_pred",
            "ctrness",
        ),
        "detectron2": (
            "head.",
            "cls_subnet",
            "bbox_subnet",
            "cls_score",
            "bbox_pred",
            "ctrness",
        ),
        "rosinality": (
            "head.",
            "cls_tower",
            "bbox_tower",
            "cls_pred",
            "bbox_pred",
            "center_pred",
        ),
        "mmdet": (
            "bbox_head.",
            "cls_convs",
            "reg_convs",
            *(
                ("fcos_cls", "fcos_reg", "fcos_centerness")
                if layout.old
                else ("conv_cls", "conv_reg", "conv_centerness")
            ),
        ),
    }[family]
    for theirs, role, convs in (
        ("share_tower", "head.shared_tower", layout.shared),
        (cls, "head.cls_tower", layout.tower),
        (box, "head.box_tower", layout.tower),
    ):
        for k in range(convs):
            step = 2 if layout.norm == "none" else 3
            dcn = layout.dcn_tower and k == convs - 1 and theirs != "share_tower"
            if family == "mmdet":
                conv, norm = (f"{head}{theirs}.{k}.{part}" for part in ("conv", layout.norm))
                offset = conv + ("_offset" if layout.old else ".conv_offset")
            else:
                conv, norm = f"{head}{theirs}.{step * k}", f"{head}{theirs}.{step * k + 1}"
                offset = conv + ".offset"
                conv += ".conv" if dcn else ""
            place = f"{role}.{step * k}"
            c.conv(conv, place, channels, channels, 3, bias=layout.bias)
            if dcn:
                c.conv(offset, f"{place}.offset", 27, channels, 3, bias=True)
            after = f"{role}.{step * k + 1}"
            if layout.norm == "gn":
                c.norm(norm, after, channels, batch=False)
            elif layout.norm == "cycle":
                c.cycle(norm, after, channels, layout.levels)
            elif layout.norm == "bn" and family == "adelaidet":
                for level in range(layout.levels):
                    c.norm(f"{norm}.{level}", f"{after}.{level}", channels)
            elif layout.norm == "bn":
                c.norm(norm, after, channels)
    c.conv(head + logits, "head.cls_logits", layout.classes, channels, 3, bias=True)
    c.conv(head + ltrb, "head.ltrb", 4, channels, 3, bias=True)
    c.conv(head + centerness, "head.centerness", 1, channels, 3, bias=True)
    for level in range(layout.levels if layout.scales else 0):
        key = f"{head}scales.{level}.scale"
        c.state[key] = c.make(() if family == "mmdet" else (1,))
        c.scales.append(key)
