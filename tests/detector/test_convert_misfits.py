"""What does not fit is refused, and said in full; and the way back to detectron2."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import Checkpoint, Layout, build

from fcos.convert.conversion import Converted, convert_weights, write_back
from fcos.convert.errors import ConvertError
from fcos.convert.reading import ForeignFile

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = Layout("original")
IMPRV = replace(ORIGINAL, dcn_stages=(2, 3, 4), dcn_tower=True)
ADELAIDET = Layout("adelaidet")
DETECTRON2 = Layout("detectron2", scales=False)
MMDET = Layout("mmdet", bias=False)


def converted(checkpoint: Checkpoint, source: str = "auto") -> Converted:
    return convert_weights(ForeignFile(checkpoint.state, ()), Path("any.pth"), source)


def test_everything_that_does_not_fit_is_listed() -> None:
    checkpoint = build(DETECTRON2)
    for key in ("head.ctrness.bias", "backbone.bottom_up.res3.1.conv2.norm.running_var"):
        del checkpoint.state[key]
    checkpoint.state["head.extra.weight"] = torch.zeros(1)
    checkpoint.state["head.bbox_pred.bias"] = torch.zeros(5)
    with pytest.raises(ConvertError) as caught:
        converted(checkpoint)
    for part in (
        "any.pth: 4 keys do not fit resnet50",
        "missing head.ctrness.bias",
        "missing backbone.bottom_up.res3.1.conv2.norm.running_var",
        "unknown head.extra.weight",
        "head.bbox_pred.bias has shape (5,), not (4,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (ORIGINAL, {}, "give --source original or --source original-imprv"),
        (IMPRV, {"rpn.head.scales.1.scale": (2,)}, "scales.1.scale has"),
        (MMDET, {"bbox_head.scales.4.scale": None}, "missing bbox_head.scales.4.scale"),
        (MMDET, {"bbox_head.conv_cls.bias": (91,)}, r"shape \(91,\), not \(80,\)"),
        (replace(MMDET, classes=91), {}, "has 91 outputs, and not COCO's 80 classes"),
        (MMDET, {"bbox_head.conv_cls.weight": (80,)}, "must be the weight of a convolution"),
        (MMDET, {"backbone.layer3.5.conv1.weight": None}, r"stages of \(3, 4, 5, 3\) blocks"),
        (
            replace(MMDET, other="W18"),
            {"backbone.stage4.0.branches.0.0.conv1.weight": (48, 48, 3, 3)},
            r"has an HRNet of width 48, only \(18, 32, 40\) are here",
        ),
        (
            replace(MMDET, other="W18"),
            {"neck.fpn_convs.4.conv.weight": None, "neck.fpn_convs.4.conv.bias": None},
            r"missing bbox_head.scales.4|unknown bbox_head.scales.4",
        ),
        (
            replace(ADELAIDET, other="DLA-34"),
            {"backbone.bottom_up.level3.tree1.tree1.conv3.weight": (64, 64, 1, 1)},
            "has a DLA of bottlenecks",
        ),
        (
            replace(ADELAIDET, other="V-39-eSE"),
            {"backbone.bottom_up.stage4.OSA4_2.concat.OSA4_2_concat/conv.weight": None},
            r"has a VoVNet that is not here: stages of \(1, 1, 1, 2\) blocks, with eSE",
        ),
        (
            replace(ADELAIDET, other="V-39-eSE"),
            {"backbone.bottom_up.stage4.OSA4_1.ese.fc.weight": None},
            "missing backbone.bottom_up.stage4.OSA4_1.ese.fc.weight",
        ),
        (
            Layout("rosinality", other="V-57", bias=False),
            {"backbone.stem.stem_1/conv.weight": None},
            "no VoVNet known by backbone.stem.stem_1/conv",
        ),
        (MMDET, {"neck.lateral_convs.2.conv.weight": (48, 2048, 1, 1)}, "impossible network"),
        (DETECTRON2, {"pixel_mean": (4,)}, "pixel_mean must be three numbers, got 4"),
        (
            replace(ADELAIDET, dcn_stages=(2,)),
            {"backbone.bottom_up.res3.2.conv2_offset.weight": None},
            "deformable blocks .* out of order",
        ),
    ],
)  # fmt: skip
def test_refused(layout: Layout, change: dict[str, Any], message: str) -> None:
    checkpoint = build(layout)
    for key, shape in change.items():
        if shape is None:
            del checkpoint.state[key]
        else:
            checkpoint.state[key] = torch.zeros(shape)
    with pytest.raises(ConvertError, match=f"any.pth: .*{message}"):
        converted(checkpoint)


def test_other_networks() -> None:
    retinanet = build(DETECTRON2)
    for part in ("weight", "bias"):
        del retinanet.state[f"head.ctrness.{part}"]
    with pytest.raises(ConvertError, match="not from a known FCOS .*named backbone"):
        converted(retinanet)
    with pytest.raises(ConvertError, match=r"got original-improv; did you mean original-imprv\?"):
        converted(retinanet, source="original-improv")
    with pytest.raises(ConvertError, match="no ResNet, ResNeXt or MobileNetV2 known by backbone.l"):
        converted(retinanet, source="mmdet")


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"depth": 101, "groups": 64, "group_width": 4},
        {"norm": "cycle"},
        {"norm": "bn"},
        {"norm": "none"},
    ],
)
def test_detectron2_and_back(network: dict[str, Any]) -> None:
    checkpoint = build(replace(DETECTRON2, **network))
    result = converted(checkpoint)
    back = write_back("detectron2", result.state, result.config, Path("any.pt"))
    assert back.keys() == checkpoint.state.keys()
    for key, tensor in checkpoint.state.items():
        assert back[key].shape == tensor.shape and back[key].flatten()[0] == tensor.flatten()[0]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (MMDET, "needs model.activation 'relu', got 'exp'"),
        (ADELAIDET, "needs model.trainable_scales False, got True"),
        (
            replace(ADELAIDET, scales=False, norm="bn"),
            "has one weight for all levels in head.cls_subnet.1, got several",
        ),
        (replace(DETECTRON2, bias=False), "needs model.tower_bias True"),
    ],
)
def test_no_way_back(layout: Layout, message: str) -> None:
    result = converted(build(layout))
    with pytest.raises(ConvertError, match=f"any.pt: detectron2's FCOS {message}"):
        write_back("detectron2", result.state, result.config, Path("any.pt"))
