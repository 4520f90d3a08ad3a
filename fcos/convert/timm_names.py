"""What code bases call the parts of the networks that we have from timm.

DLA and HRNet have the names that their authors gave them in all code bases, timm too, so that only
what stands before them differs. VoVNet's authors repeat the names of the modules in those of their
layers; timm has names of its own.
"""

from __future__ import annotations

from .parts import BATCH_NORM, CONV, CONV_BIAS, Rows, keys

BODY = "backbone.body"
PYRAMID = "backbone.fpn"

#: Convolutions of 3x3 in a block of a VoVNet.
VOVNET_LAYERS = 5
#: Blocks of each stage, and whether they have an eSE, by backbone.
VOVNETS = {
    "vovnet57": ((1, 1, 4, 3), False),
    "vovnet39_ese": ((1, 1, 2, 2), True),
    "vovnet57_ese": ((1, 1, 4, 3), True),
    "vovnet99_ese": ((1, 3, 9, 3), True),
}
#: Trees of the stages 2 to 5 of DLA-34 that are made of two trees: the inner ones project.
_DLA_STAGES = {2: False, 3: True, 4: True, 5: False}
#: Channels of an HRNet's first branch, by backbone.
HRNETS = {"hrnet_w18": 18, "hrnet_w32": 32, "hrnet_w40": 40}
#: Modules of the stages 2 to 4 of an HRNet, each with as many branches as the stage's number.
_HRNET_MODULES = {2: 1, 3: 4, 4: 3}
_HRNET_BLOCKS = 4

#: mmdetection's pyramid for HRNets.
HRFPN_REDUCTION = "neck.reduction_conv.conv"
HRFPN_LEVEL = "neck.fpn_convs.{level}.conv"
#: Of weights of the authors' DLA: projections that they make and never use.
DLA_UNUSED = ("level3.project.", "level4.project.")


def timm_trunk(backbone: str, theirs: str) -> Rows:
    """Our key and theirs of every tensor of a trunk.

    Args:
        backbone: one of timm's.
        theirs: what stands before the names of the trunk, with a dot at its end; "": nothing.
    """
    if backbone == "dla34":
        return _dla(theirs)
    if backbone in VOVNETS:
        return _vovnet(backbone, theirs)
    return _hrnet(theirs)


def hrfpn(levels: int) -> Rows:
    """Those of the pyramid of an HRNet."""
    yield from keys(f"{PYRAMID}.reduction", HRFPN_REDUCTION, CONV_BIAS)
    for level in range(levels):
        theirs = HRFPN_LEVEL.format(level=level)
        yield from keys(f"{PYRAMID}.convs.{level}", theirs, CONV_BIAS)


def _unit(theirs: str, conv: str, norm: str) -> Rows:
    """A convolution and its norm, of the same names on both sides."""
    yield from keys(f"{BODY}.{conv}", f"{theirs}{conv}", CONV)
    yield from keys(f"{BODY}.{norm}", f"{theirs}{norm}", BATCH_NORM)


def _dla(theirs: str) -> Rows:
    for part in ("base_layer", "level0", "level1"):
        yield from _unit(theirs, f"{part}.0", f"{part}.1")
    for stage, nested in _DLA_STAGES.items():
        for tree in ("tree1.", "tree2.") if nested else ("",):
            root = f"level{stage}.{tree}"
            for block in ("tree1", "tree2"):
                for i in (1, 2):
                    yield from _unit(theirs, f"{root}{block}.conv{i}", f"{root}{block}.bn{i}")
            yield from _unit(theirs, f"{root}root.conv", f"{root}root.bn")
            if tree != "tree2.":  # which has as many channels as it is given
                yield from _unit(theirs, f"{root}project.0", f"{root}project.1")


def _vovnet(backbone: str, theirs: str) -> Rows:
    blocks, has_ese = VOVNETS[backbone]

    def unit(ours: str, theirs: str) -> Rows:
        yield from keys(f"{ours}.conv", f"{theirs}/conv", CONV)
        yield from keys(f"{ours}.bn", f"{theirs}/norm", BATCH_NORM)

    for i in range(3):
        yield from unit(f"{BODY}.stem.{i}", f"{theirs}stem.stem_{i + 1}")
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            name = f"OSA{stage}_{block + 1}"
            our_block = f"{BODY}.stage{stage}.blocks.{block}"
            their_block = f"{theirs}stage{stage}.{name}"
            for i in range(VOVNET_LAYERS):
                yield from unit(f"{our_block}.conv_mid.{i}", f"{their_block}.layers.{i}.{name}_{i}")
            yield from unit(f"{our_block}.conv_concat", f"{their_block}.concat.{name}_concat")
            if has_ese:
                yield from keys(f"{our_block}.attn.fc", f"{their_block}.ese.fc", CONV_BIAS)


def _hrnet(theirs: str) -> Rows:
    for i in (1, 2):
        yield from _unit(theirs, f"conv{i}", f"bn{i}")
    for block in range(_HRNET_BLOCKS):
        for i in (1, 2, 3):
            yield from _unit(theirs, f"layer1.{block}.conv{i}", f"layer1.{block}.bn{i}")
    yield from _unit(theirs, "layer1.0.downsample.0", "layer1.0.downsample.1")
    for stage, modules in _HRNET_MODULES.items():
        # a new branch from the last one; before stage 2, the first two from layer1
        transition = f"transition{stage - 1}"
        if stage == 2:
            yield from _unit(theirs, f"{transition}.0.0", f"{transition}.0.1")
        new = f"{transition}.{stage - 1}.0"
        yield from _unit(theirs, f"{new}.0", f"{new}.1")
        for module in range(modules):
            yield from _hrnet_module(theirs, f"stage{stage}.{module}", branches=stage)


def _hrnet_module(theirs: str, module: str, branches: int) -> Rows:
    for branch in range(branches):
        for block in range(_HRNET_BLOCKS):
            name = f"{module}.branches.{branch}.{block}"
            for i in (1, 2):
                yield from _unit(theirs, f"{name}.conv{i}", f"{name}.bn{i}")
    for to in range(branches):
        for source in range(branches):
            name = f"{module}.fuse_layers.{to}.{source}"
            if source > to:  # enlarged
                yield from _unit(theirs, f"{name}.0", f"{name}.1")
            for halving in range(to - source):
                yield from _unit(theirs, f"{name}.{halving}.0", f"{name}.{halving}.1")
