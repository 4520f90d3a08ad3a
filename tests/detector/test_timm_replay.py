"""DLA, VoVNet, HRNet and its pyramid compute what their papers say, step by step, from the weights
of synthetic checkpoints of their authors' layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_checkpoints import Checkpoint, Layout, Random, build
from foreign_trunks import VOVNETS
from torch import Tensor

from fcos.convert.conversion import convert_weights
from fcos.convert.reading import ForeignFile
from fcos.model import FCOS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"channels": 64, "tower": 1, "classes": 2}


class Replay:
    """Layers by the name that the module of a convolution and of its norm has in the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, root: str) -> None:
        self.state = {key: tensor.double() for key, tensor in checkpoint.state.items()}
        self.root = root

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def unit(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        x = self.conv(x, self.root + conv, stride)
        w, b, mean, var = (
            self.state[f"{self.root}{norm}.{part}"].view(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    def has(self, name: str) -> bool:
        return f"{self.root}{name}.weight" in self.state


class DLA(Replay):
    """Yu et al., figure 3 and section 3: a tree joins its two blocks at its root, and hands on what
    its own root is to join besides."""

    def block(self, x: Tensor, name: str, stride: int, shortcut: Tensor) -> Tensor:
        y = self.unit(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
        return (self.unit(y, f"{name}.conv2", f"{name}.bn2") + shortcut).relu()

    def tree(self, x: Tensor, name: str, stride: int, joined: list[Tensor]) -> Tensor:
        bottom = F.max_pool2d(x, stride) if stride > 1 else x
        shortcut = bottom
        if self.has(f"{name}.project.0"):
            shortcut = self.unit(bottom, f"{name}.project.0", f"{name}.project.1")
        first = self.block(x, f"{name}.tree1", stride, shortcut)
        second = self.block(first, f"{name}.tree2", 1, first)
        joined = [second, first, *joined]
        return self.unit(torch.cat(joined, 1), f"{name}.root.conv", f"{name}.root.bn").relu()

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = self.unit(x, "base_layer.0", "base_layer.1").relu()
        x = self.unit(x, "level0.0", "level0.1").relu()
        x = self.unit(x, "level1.0", "level1.1", 2).relu()
        x = self.tree(x, "level2", 2, [])
        levels = []
        for level in (3, 4):
            first = self.tree(x, f"level{level}.tree1", 2, [])
            x = self.tree(first, f"level{level}.tree2", 1, [F.max_pool2d(x, 2), first])
            levels.append(x)
        levels.append(self.tree(x, "level5", 2, [F.max_pool2d(x, 2)]))
        return levels


class VoVNet(Replay):
    """Lee et al., figure 2 of the first and figure 3 of the second version: five convolutions, all
    of whose outputs are joined once; then, in the second, each channel is weighed, and the input is
    added but in the first block of a stage."""

    def __init__(self, checkpoint: Checkpoint, root: str, blocks: tuple[int, ...]) -> None:
        super().__init__(checkpoint, root)
        self.blocks = blocks

    def layer(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return self.unit(x, f"{name}/conv", f"{name}/norm", stride).relu()

    def block(self, x: Tensor, stage: int, block: int) -> Tensor:
        osa = f"OSA{stage}_{block}"
        name = f"stage{stage}.{osa}"
        outputs = [x]
        for i in range(5):
            outputs.append(self.layer(outputs[-1], f"{name}.layers.{i}.{osa}_{i}"))
        y = self.layer(torch.cat(outputs, 1), f"{name}.concat.{osa}_concat")
        if self.has(f"{name}.ese.fc"):
            mean = y.mean(dim=(2, 3), keepdim=True)
            gate = self.conv(mean, f"{self.root}{name}.ese.fc")
            y = y * (gate + 3).clamp(0, 6) / 6
        return x + y if block > 1 else y

    def __call__(self, x: Tensor) -> list[Tensor]:
        for i, stride in ((1, 2), (2, 1), (3, 2)):
            x = self.layer(x, f"stem.stem_{i}", stride)
        stages = []
        for stage, blocks in enumerate(self.blocks, start=2):
            if stage > 2:  # an even side: the last window has one row beyond the border
                padded = F.pad(x, (0, 1, 0, 1), value=-torch.inf)
                x = F.max_pool2d(padded, 3, 2)
            for block in range(1, blocks + 1):
                x = self.block(x, stage, block)
            stages.append(x)
        return stages[1:]


class HRNet(Replay):
    """Wang et al., section 3 and the appendix: branches side by side, each fed by all."""

    def basic(self, x: Tensor, name: str) -> Tensor:
        y = self.unit(x, f"{name}.conv1", f"{name}.bn1").relu()
        return (x + self.unit(y, f"{name}.conv2", f"{name}.bn2")).relu()

    def module(self, branches: list[Tensor], name: str) -> list[Tensor]:
        for b in range(4):
            branches = [self.basic(x, f"{name}.branches.{i}.{b}") for i, x in enumerate(branches)]
        fused = []
        for i in range(len(branches)):
            total = torch.zeros_like(branches[i])
            for j, x in enumerate(branches):
                layers = f"{name}.fuse_layers.{i}.{j}"
                if j > i:
                    x = self.unit(x, f"{layers}.0", f"{layers}.1")
                    times = 2 ** (j - i)
                    x = x.repeat_interleave(times, 2).repeat_interleave(times, 3)
                for step in range(i - j):
                    x = self.unit(x, f"{layers}.{step}.0", f"{layers}.{step}.1", 2)
                    x = x.relu() if step < i - j - 1 else x
                total = total + x
            fused.append(total.relu())
        return fused

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = self.unit(x, "conv1", "bn1", 2).relu()
        x = self.unit(x, "conv2", "bn2", 2).relu()
        for b in range(4):
            y, name = x, f"layer1.{b}"
            for i in (1, 2, 3):
                y = self.unit(y, f"{name}.conv{i}", f"{name}.bn{i}")
                y = y.relu() if i < 3 else y
            if b == 0:
                x = self.unit(x, f"{name}.downsample.0", f"{name}.downsample.1")
            x = (x + y).relu()
        first = self.unit(x, "transition1.0.0", "transition1.0.1").relu()
        branches = [first, self.unit(x, "transition1.1.0.0", "transition1.1.0.1", 2).relu()]
        for stage, modules in ((2, 1), (3, 4), (4, 3)):
            if stage > 2:
                new = f"transition{stage - 1}.{stage - 1}.0"
                branches.append(self.unit(branches[-1], f"{new}.0", f"{new}.1", 2).relu())
            for m in range(modules):
                branches = self.module(branches, f"stage{stage}.{m}")
        return branches

    def pyramid(self, branches: list[Tensor]) -> list[Tensor]:
        joined = [branches[0]]
        for i, branch in enumerate(branches[1:], start=1):
            joined.append(F.interpolate(branch, scale_factor=2**i, mode="bilinear"))
        features = self.conv(torch.cat(joined, 1), "neck.reduction_conv.conv")
        levels = []
        for i in range(5):
            window, (h, w) = 2**i, features.shape[-2:]
            h, w = h // window, w // window
            cells = features[..., : h * window, : w * window].unflatten(-1, (w, window))
            means = cells.unflatten(-3, (h, window)).mean(dim=(-3, -1))
            levels.append(self.conv(means, f"neck.fpn_convs.{i}.conv", 2))
        return levels


def make(layout: Layout) -> tuple[Checkpoint, FCOS]:
    checkpoint = build(layout, Random(seed=0))
    result = convert_weights(ForeignFile(checkpoint.state, ()), Path("any.pth"))
    with torch.device("meta"):
        network = FCOS(result.config.model, pretrained_backbone=False)
    network.load_state_dict(result.state, assign=True)
    return checkpoint, network.double().eval()


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        spread = theirs.std().item()
        assert spread > 0 and theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * spread)


def images(height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, height, width, dtype=torch.float64, generator=generator)


@torch.no_grad()
def test_dla34() -> None:
    checkpoint, network = make(Layout("adelaidet", other="DLA-34", levels=3, **SMALL))
    found = list(network.backbone.body(images()).values())
    assert [tuple(x.shape[1:]) for x in found] == [(128, 8, 12), (256, 4, 6), (512, 2, 3)]
    compare(found, DLA(checkpoint, "backbone.bottom_up.")(images()))


@pytest.mark.parametrize("kind", ["V-39-eSE", "V-57"])
@torch.no_grad()
def test_vovnet(kind: str) -> None:
    family, root = "adelaidet", "backbone.bottom_up."
    if kind == "V-57":
        family, root = "rosinality", "backbone."
    checkpoint, network = make(Layout(family, other=kind, bias=kind != "V-57", **SMALL))
    found = list(network.backbone.body(images()).values())
    assert [tuple(x.shape[1:]) for x in found] == [(512, 8, 12), (768, 4, 6), (1024, 2, 3)]
    compare(found, VoVNet(checkpoint, root, VOVNETS[kind])(images()))


@torch.no_grad()
def test_hrnet_and_its_pyramid() -> None:
    checkpoint, network = make(Layout("mmdet", other="W18", bias=False, **SMALL))
    replay = HRNet(checkpoint, "backbone.")
    pictures = images(128, 160)
    branches = replay(pictures)
    compare(network.backbone.body(pictures), branches)
    levels = replay.pyramid(branches)
    compare(list(network.backbone(pictures).values()), levels)
    sizes = [tuple(level.shape[-2:]) for level in levels]
    assert sizes == [(16, 20), (8, 10), (4, 5), (2, 3), (1, 1)]


@torch.no_grad()
def test_rosinality_from_pixels_to_predictions() -> None:
    """P6 from C5, towers without bias, centerness on the first, exp of a scaled distance."""
    layout = Layout("rosinality", other="V-57", bias=False, c5=True, **SMALL)
    checkpoint = build(layout, Random(seed=0))
    checkpoint.state["head.bbox_pred.weight"] *= 0.1
    result = convert_weights(ForeignFile(checkpoint.state, ()), Path("any.pth"))
    network = FCOS(result.config.model, pretrained_backbone=False)
    network.load_state_dict(result.state)
    found = network.double().eval()(images(128, 192))

    replay = VoVNet(checkpoint, "backbone.", VOVNETS["V-57"])
    c3, c4, c5 = replay(images(128, 192))
    inner = [replay.conv(c, f"fpn.inner_convs.{i}") for i, c in ((2, c3), (3, c4), (4, c5))]
    for i in (1, 0):
        inner[i] = inner[i] + F.interpolate(inner[i + 1], scale_factor=2, mode="nearest")
    levels = [replay.conv(x, f"fpn.out_convs.{i + 2}") for i, x in enumerate(inner)]
    levels.append(replay.conv(c5, "fpn.top_blocks.p6", 2))
    levels.append(replay.conv(levels[-1].relu(), "fpn.top_blocks.p7", 2))

    def tower(x: Tensor, name: str) -> Tensor:
        x = replay.conv(x, f"head.{name}.0")
        weight, bias = (replay.state[f"head.{name}.1.{part}"] for part in ("weight", "bias"))
        return F.group_norm(x, 32, weight, bias, 1e-5).relu()

    for i, level in enumerate(levels):
        cls, box = tower(level, "cls_tower"), tower(level, "bbox_tower")
        distances = replay.conv(box, "head.bbox_pred") * replay.state[f"head.scales.{i}.scale"]
        compare([found.logits[i]], [replay.conv(cls, "head.cls_pred")])
        compare([found.centerness[i]], [replay.conv(cls, "head.center_pred")])
        # float32, always
        torch.testing.assert_close(found.ltrb[i].double(), distances.exp(), rtol=1e-5, atol=0)
