"""Converted networks compute what their authors' code computes: replayed step by step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_checkpoints import PLANS, Checkpoint, Layout, Random, build
from torch import Tensor

from fcos.convert.conversion import convert_weights
from fcos.convert.reading import ForeignFile
from fcos.model import FCOS

pytestmark = pytest.mark.usefixtures("one_thread")


def deform(x: Tensor, offset: Tensor, weight: Tensor, bias: Any, stride: int) -> Tensor:
    """DCNv2 as its paper has it: y(p) = sum_k w_k x(p + p_k + dp_k) m_k; 18 offsets (y, x), then 9
    masks."""
    height, width = x.shape[-2:]
    masks = offset[:, 18:].sigmoid()
    out = 0
    rows = torch.arange(offset.shape[2], dtype=x.dtype).view(-1, 1) * stride
    columns = torch.arange(offset.shape[3], dtype=x.dtype).view(1, -1) * stride
    groups = x.shape[1] // weight.shape[1]
    for k in range(9):
        y = rows + k // 3 - 1 + offset[:, 2 * k]
        x_ = columns + k % 3 - 1 + offset[:, 2 * k + 1]
        grid = torch.stack((2 * x_ / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1)
        sampled = F.grid_sample(x, grid, align_corners=True, padding_mode="zeros")
        point = weight[:, :, k // 3, k % 3, None, None]
        out = out + F.conv2d(sampled * masks[:, k : k + 1], point, groups=groups)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


class Replay:
    """A forward pass from tensors by role; ``strides_first`` is where Caffe's ResNets stride."""

    def __init__(self, c: Checkpoint, layout: Layout, eps: float, strides_first: bool) -> None:
        self.tensor = {role: c.state[theirs].double() for role, theirs in c.roles.items()}
        self.scales = [c.state[key].double().reshape(()) for key in c.scales]
        self.layout, self.eps, self.strides_first = layout, eps, strides_first

    def conv(self, x: Tensor, role: str, stride: int = 1) -> Tensor:
        weight, bias = self.tensor[f"{role}.weight"], self.tensor.get(f"{role}.bias")
        if f"{role}.offset.weight" in self.tensor:
            return deform(x, self.conv(x, f"{role}.offset", stride), weight, bias, stride)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def batch_norm(self, x: Tensor, role: str, eps: float) -> Tensor:
        w, b, mean, var = (
            self.tensor[f"{role}.{part}"].view(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + eps).sqrt() * w + b

    def block(self, x: Tensor, role: str, stride: int) -> Tensor:
        if f"{role}.conv3.weight" in self.tensor:
            strides = [stride, 1, 1] if self.strides_first else [1, stride, 1]
        else:
            strides = [stride, 1]
        y = x
        for i, s in enumerate(strides, start=1):
            y = self.batch_norm(self.conv(y, f"{role}.conv{i}", s), f"{role}.bn{i}", self.eps)
            y = y.relu() if i < len(strides) else y
        if f"{role}.downsample.0.weight" in self.tensor:
            x = self.conv(x, f"{role}.downsample.0", stride)
            x = self.batch_norm(x, f"{role}.downsample.1", self.eps)
        return (x + y).relu()

    def resnet(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x, "backbone.body.conv1", 2)
        x = self.batch_norm(x, "backbone.body.bn1", self.eps).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for stage, blocks in enumerate(PLANS[self.layout.depth], start=1):
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 1 else 1
                x = self.block(x, f"backbone.body.layer{stage}.{i}", stride)
            stages.append(x)
        return stages[1:]

    def mobilenet(self, x: Tensor) -> list[Tensor]:
        """Blocks that halve the resolution: the first of 24, 32, 64 and 160 channels."""

        def unit(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
            return self.batch_norm(self.conv(x, conv, stride), norm, self.eps)

        body = "backbone.body"
        x = unit(x, f"{body}.0.0", f"{body}.0.1", 2).clamp(0, 6)
        taps = []
        for i in range(1, 18):
            stride = 2 if i in (2, 4, 7, 14) else 1
            layers = f"{body}.{i}.conv"
            y, n = x, 0
            if i > 1:
                y, n = unit(y, f"{layers}.0.0", f"{layers}.0.1").clamp(0, 6), 1
            y = unit(y, f"{layers}.{n}.0", f"{layers}.{n}.1", stride).clamp(0, 6)
            y = unit(y, f"{layers}.{n + 1}", f"{layers}.{n + 2}")
            x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
            if i in (6, 13, 17):
                taps.append(x)
        return taps

    def pyramid(self, stages: list[Tensor]) -> list[Tensor]:
        fpn = "backbone.fpn"
        inner = [self.conv(c, f"{fpn}.inner_blocks.{i}.0") for i, c in enumerate(stages)]
        for i in (1, 0):
            up = inner[i + 1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            inner[i] = inner[i] + up
        levels = [self.conv(x, f"{fpn}.layer_blocks.{i}.0") for i, x in enumerate(inner)]
        if self.layout.levels == 5:
            source = stages[-1] if self.layout.c5 else levels[-1]
            levels.append(self.conv(source, f"{fpn}.extra_blocks.p6", 2))
            levels.append(self.conv(levels[-1].relu(), f"{fpn}.extra_blocks.p7", 2))
        return levels

    def tower(self, x: Tensor, role: str, convs: int, level: int) -> Tensor:
        step = 2 if self.layout.norm == "none" else 3
        for k in range(convs):
            x = self.conv(x, f"{role}.{step * k}")
            norm = f"{role}.{step * k + 1}"
            if f"{norm}.{level}.weight" in self.tensor:
                x = self.batch_norm(x, f"{norm}.{level}", 1e-5)
            elif self.layout.norm == "bn":
                x = self.batch_norm(x, norm, 1e-5)
            elif self.layout.norm == "gn":
                shape = x.shape
                groups = x.reshape(shape[0], 32, -1)
                spread = groups.var(dim=2, unbiased=False, keepdim=True)
                x = (groups - groups.mean(dim=2, keepdim=True)) / (spread + 1e-5).sqrt()
                w, b = (self.tensor[f"{norm}.{part}"] for part in ("weight", "bias"))
                x = x.reshape(shape) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
            x = x.relu()
        return x

    def __call__(
        self, image: Tensor, activation: Callable[[Tensor], Tensor], centerness_on: str
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        stages = self.mobilenet(image) if self.layout.mobilenet else self.resnet(image)
        outputs = []
        for level, x in enumerate(self.pyramid(stages)):
            x = self.tower(x, "head.shared_tower", self.layout.shared, level)
            cls = self.tower(x, "head.cls_tower", self.layout.tower, level)
            box = self.tower(x, "head.box_tower", self.layout.tower, level)
            scale = self.scales[level] if self.scales else 1.0
            outputs.append(
                (
                    self.conv(cls, "head.cls_logits"),
                    activation(scale * self.conv(box, "head.ltrb")),
                    self.conv(cls if centerness_on == "cls" else box, "head.centerness"),
                )
            )
        return outputs


SMALL: dict[str, Any] = {"channels": 64, "tower": 2, "classes": 3}
CASES: dict[str, tuple[str, Layout, float, bool, Callable[[Tensor], Tensor], str]] = {
    "original": ("original", Layout("original", **SMALL), 0.0, True, torch.exp, "cls"),
    "imprv dcnv2, C5": (
        "original-imprv",
        Layout("original", dcn_stages=(2, 4), dcn_tower=True, c5=True, **SMALL),
        0.0,
        True,
        torch.relu,
        "box",
    ),
    "MobileNetV2": (
        "original",
        Layout("original", mobilenet=True, **SMALL),
        1e-5,
        False,
        torch.exp,
        "cls",
    ),
    "adelaidet RT shared towers": (
        "adelaidet",
        Layout("adelaidet", norm="bn", shared=2, levels=3, **{**SMALL, "tower": 0}),
        1e-5,
        True,
        torch.relu,
        "box",
    ),
    "detectron2": (
        "detectron2",
        Layout("detectron2", scales=False, **SMALL),
        1e-5,
        True,
        torch.relu,
        "box",
    ),
    "mmdet R-18 tricks": ("mmdet", Layout("mmdet", depth=18, **SMALL), 1e-5, False, F.relu, "box"),
    "mmdet DCN": (
        "mmdet",
        Layout("mmdet", dcn_stages=(3,), dcn_tower=True, bias=False, **SMALL),
        1e-5,
        True,
        torch.exp,
        "cls",
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs(case: str) -> None:
    source, layout, eps, strides_first, activation, centerness_on = CASES[case]
    checkpoint = build(layout, Random(seed=0))
    for key, tensor in checkpoint.state.items():
        if "bbox_pred" in key or "conv_reg" in key:
            tensor *= 0.3  # exp
        if "offset" in key:
            tensor *= 0.3  # a pixel or so
    result = convert_weights(ForeignFile(checkpoint.state, ()), Path("any.pth"), source)
    with torch.device("meta"):
        network = FCOS(result.config.model, pretrained_backbone=False)
    network.load_state_dict(result.state, assign=True)
    network = network.double().eval()

    image = torch.randn(1, 3, 128, 192, dtype=torch.float64)
    if layout.dcn_tower:  # the oracle interpolates, which takes two pixels
        image = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    found = network(image)
    expected = Replay(checkpoint, layout, eps, strides_first)(image, activation, centerness_on)
    assert len(found.logits) == len(expected) == layout.levels
    for level, (logits, ltrb, centerness) in enumerate(expected):
        for name, ours, theirs in (
            ("logits", found.logits[level], logits),
            ("ltrb", found.ltrb[level], ltrb),  # float32, always
            ("centerness", found.centerness[level], centerness),
        ):
            spread = theirs.std().item()
            assert spread > 0, (name, level)
            torch.testing.assert_close(
                ours.double(), theirs, rtol=1e-6, atol=1e-6 * spread, msg=f"{name} of {level}"
            )


@torch.no_grad()
def test_replay_tells_the_switches_apart() -> None:
    """Were a switch wrong, the comparison above would say so."""
    layout = Layout("original", **SMALL)
    checkpoint = build(layout, Random(seed=0))
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    right = Replay(checkpoint, layout, 0.0, True).resnet(image)[-1]
    for eps, strides_first in ((1e-5, True), (0.0, False)):
        other = Replay(checkpoint, layout, eps, strides_first).resnet(image)[-1]
        assert not torch.allclose(right, other, rtol=1e-6, atol=1e-6 * right.std().item())
    c5 = Replay(checkpoint, replace(layout, levels=3), 0.0, True)
    assert len(c5.pyramid(c5.resnet(image))) == 3
