"""Backbones that are no ResNets, under the names of their authors: MobileNetV2, DLA, VoVNet, HRNet.

Written from descriptions of those networks; see ``foreign_checkpoints.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foreign_checkpoints import Checkpoint

BODY = "backbone.body."
# expansion, output channels, blocks of MobileNetV2's seven groups
MOBILENET = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
#: Blocks of stages 2 to 5 by name, of five 3x3 convolutions each.
VOVNETS = {
    "V-57": (1, 1, 4, 3),
    "V-39-eSE": (1, 1, 2, 2),
    "V-57-eSE": (1, 1, 4, 3),
    "V-99-eSE": (1, 3, 9, 3),
}
VOVNET_INNER = (128, 160, 192, 224)
VOVNET_OUTER = (256, 512, 768, 1024)


def mobilenet(c: Checkpoint) -> list[int]:
    theirs, role = "backbone.body.features.", "backbone.body."
    c.conv(f"{theirs}0.0", f"{role}0.0", 32, 3, 3)
    c.norm(f"{theirs}0.1", f"{role}0.1", 32)
    inputs, at = 32, 0
    for expansion, outputs, blocks in MOBILENET:
        for _ in range(blocks):
            at += 1
            hidden = inputs * expansion
            block = f"{theirs}{at}.conv."
            ours = f"{role}{at}.conv."
            n = 0  # place in their one sequence of convolution, norm and ReLU6
            unit = 0  # ours has those three in a unit of their own, but not the last two
            if expansion > 1:
                c.conv(f"{block}{n}", f"{ours}{unit}.0", hidden, inputs, 1)
                c.norm(f"{block}{n + 1}", f"{ours}{unit}.1", hidden)
                n, unit = n + 3, unit + 1
            c.conv(f"{block}{n}", f"{ours}{unit}.0", hidden, 1, 3)
            c.norm(f"{block}{n + 1}", f"{ours}{unit}.1", hidden)
            n, unit = n + 3, unit + 1
            c.conv(f"{block}{n}", f"{ours}{unit}", outputs, hidden, 1)
            c.norm(f"{block}{n + 1}", f"{ours}{unit + 1}", outputs)
            inputs = outputs
    return [32, 96, 320]


def dla34(c: Checkpoint, root: str, *, unused: bool = True) -> list[int]:
    """Levels 0 and 1 are convolutions, 2 and 5 a tree, 3 and 4 a tree of two trees. The latter's
    outer projections exist and are of no use."""

    def unit(name: str, outputs: int, inputs: int, kernel: int, norm: str) -> None:
        c.conv(root + name, BODY + name, outputs, inputs, kernel)
        c.norm(root + norm, BODY + norm, outputs)

    def tree(name: str, inputs: int, outputs: int, joined: int) -> None:
        """Two basic blocks, and the root that joins ``joined`` channels."""
        for block, width in (("tree1", inputs), ("tree2", outputs)):
            unit(f"{name}.{block}.conv1", outputs, width, 3, f"{name}.{block}.bn1")
            unit(f"{name}.{block}.conv2", outputs, outputs, 3, f"{name}.{block}.bn2")
        unit(f"{name}.root.conv", outputs, joined, 1, f"{name}.root.bn")
        if inputs != outputs:
            unit(f"{name}.project.0", outputs, inputs, 1, f"{name}.project.1")

    unit("base_layer.0", 16, 3, 7, "base_layer.1")
    unit("level0.0", 16, 16, 3, "level0.1")
    unit("level1.0", 32, 16, 3, "level1.1")
    tree("level2", 32, 64, 64 + 64)
    for level, inputs, outputs in ((3, 64, 128), (4, 128, 256)):
        tree(f"level{level}.tree1", inputs, outputs, 2 * outputs)
        # both of its blocks, the level's input, and what the first tree made
        tree(f"level{level}.tree2", outputs, outputs, 3 * outputs + inputs)
        if unused:
            c.state[f"{root}level{level}.project.0.weight"] = c.make((outputs, inputs, 1, 1))
            for part in ("weight", "bias", "running_mean", "running_var"):
                c.state[f"{root}level{level}.project.1.{part}"] = c.make((outputs,))
    tree("level5", 256, 512, 2 * 512 + 256)
    return [128, 256, 512]


def vovnet(c: Checkpoint, root: str, kind: str) -> list[int]:
    """Three convolutions, then blocks that join the outputs of five with their input."""

    def unit(theirs: str, role: str, outputs: int, inputs: int, kernel: int) -> None:
        c.conv(f"{root}{theirs}/conv", f"{BODY}{role}.conv", outputs, inputs, kernel)
        c.norm(f"{root}{theirs}/norm", f"{BODY}{role}.bn", outputs)

    for i, (inputs, outputs) in enumerate(((3, 64), (64, 64), (64, 128))):
        unit(f"stem.stem_{i + 1}", f"stem.{i}", outputs, inputs, 3)
    inputs = 128
    for s, blocks in enumerate(VOVNETS[kind]):
        inner, outer = VOVNET_INNER[s], VOVNET_OUTER[s]
        for b in range(blocks):
            osa = f"OSA{s + 2}_{b + 1}"
            theirs, role = f"stage{s + 2}.{osa}", f"stage{s + 2}.blocks.{b}"
            for j in range(5):
                before = inner if j else inputs
                unit(f"{theirs}.layers.{j}.{osa}_{j}", f"{role}.conv_mid.{j}", inner, before, 3)
            joined = inputs + 5 * inner
            unit(f"{theirs}.concat.{osa}_concat", f"{role}.conv_concat", outer, joined, 1)
            if kind.endswith("eSE"):
                ese = f"{BODY}{role}.attn.fc"
                c.conv(f"{root}{theirs}.ese.fc", ese, outer, outer, 1, bias=True)
            inputs = outer
    return [512, 768, 1024]


def hrnet(c: Checkpoint, root: str, width: int) -> list[int]:
    """A stage of bottlenecks; then modules of two, three and four branches, each branch of half the
    resolution and twice the channels of the one before."""

    def unit(name: str, outputs: int, inputs: int, kernel: int, norm: str) -> None:
        c.conv(root + name, BODY + name, outputs, inputs, kernel)
        c.norm(root + norm, BODY + norm, outputs)

    unit("conv1", 64, 3, 3, "bn1")
    unit("conv2", 64, 64, 3, "bn2")
    for b in range(4):
        block = f"layer1.{b}"
        unit(f"{block}.conv1", 64, 256 if b else 64, 1, f"{block}.bn1")
        unit(f"{block}.conv2", 64, 64, 3, f"{block}.bn2")
        unit(f"{block}.conv3", 256, 64, 1, f"{block}.bn3")
    unit("layer1.0.downsample.0", 256, 64, 1, "layer1.0.downsample.1")
    widths = [width, 2 * width, 4 * width, 8 * width]
    unit("transition1.0.0", widths[0], 256, 3, "transition1.0.1")
    unit("transition1.1.0.0", widths[1], 256, 3, "transition1.1.0.1")
    unit("transition2.2.0.0", widths[2], widths[1], 3, "transition2.2.0.1")
    unit("transition3.3.0.0", widths[3], widths[2], 3, "transition3.3.0.1")
    for branches, modules in ((2, 1), (3, 4), (4, 3)):
        for module in (f"stage{branches}.{m}" for m in range(modules)):
            for i, channels in enumerate(widths[:branches]):
                for block in (f"{module}.branches.{i}.{b}" for b in range(4)):
                    unit(f"{block}.conv1", channels, channels, 3, f"{block}.bn1")
                    unit(f"{block}.conv2", channels, channels, 3, f"{block}.bn2")
                for j in range(branches):
                    fuse = f"{module}.fuse_layers.{i}.{j}"
                    if j > i:
                        unit(f"{fuse}.0", channels, widths[j], 1, f"{fuse}.1")
                    for step in range(i - j):
                        outputs = channels if step == i - j - 1 else widths[j]
                        unit(f"{fuse}.{step}.0", outputs, widths[j], 3, f"{fuse}.{step}.1")
    return widths


def hrfpn(c: Checkpoint, branches: list[int], channels: int, levels: int) -> None:
    """mmdetection's pyramid for it."""
    fpn = "backbone.fpn."
    reduction = "neck.reduction_conv.conv"
    c.conv(reduction, f"{fpn}reduction", channels, sum(branches), 1, bias=True)
    for i in range(levels):
        c.conv(f"neck.fpn_convs.{i}.conv", f"{fpn}convs.{i}", channels, channels, 3, bias=True)
