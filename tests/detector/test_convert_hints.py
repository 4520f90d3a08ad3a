"""What the weights do not tell: options, file names and notes decide, and it is said which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import Layout, build

from fcos import cli
from fcos.convert.conversion import Converted, convert_weights
from fcos.convert.errors import ConvertError
from fcos.convert.reading import ForeignFile, read_foreign

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"channels": 64, "tower": 1}
MMDET = Layout("mmdet", **SMALL)
PLAIN = replace(MMDET, bias=False)
DETECTRON2 = Layout("detectron2", scales=False, **SMALL)
ADELAIDET = Layout("adelaidet", **SMALL)

#: As mmdetection prints its configuration of a ResNet that torchvision trained.
NOTES = """
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    bbox_head=dict(type='FCOSHead', num_classes=80, norm_on_bbox=True, centerness_on_reg=True,
        center_sampling=True, conv_bias=True),
    test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.55)))
"""


def converted(
    layout: Layout, name: str = "any.pth", notes: str = "", style: Any = "auto", **extra: Any
) -> Converted:
    state = {**build(layout).state, **extra}
    return convert_weights(ForeignFile(state, (), notes), Path(name), style=style)


def is_pytorch(result: Converted) -> bool:
    """Of that style in all respects, and not in some."""
    model, data = result.config.model, result.config.data
    assert (model.stride_in, data.color_order) in (("3x3", "rgb"), ("1x1", "bgr"))
    assert (data.mean[0] > data.mean[2]) == (data.color_order == "rgb")
    assert (data.std == (58.395, 57.12, 57.375)) == (data.color_order == "rgb")
    return model.stride_in == "3x3"


@pytest.mark.parametrize(
    ("layout", "name", "notes", "style", "expected", "reason"),
    [
        (MMDET, "fcos_r50_caffe_fpn_gn-head_1x.pth", "", "auto", False, "file's name says"),
        (MMDET, "fcos_r50-caffe.pth", NOTES, "auto", True, "configuration says"),
        (PLAIN, "a.pth", NOTES.replace("pytorch", "caffe"), "auto", False, "configuration"),
        (MMDET, "fcos_r50_lsj_200e.pth", "", "auto", True, "with lsj"),
        (MMDET, "fcos_pytorch.pth", "", "auto", True, "file's name says"),
        (MMDET, "caffeine.pth", "", "auto", False, "for lack of a hint; .* --style pytorch"),
        (MMDET, "caffe.pth", NOTES, "caffe", False, None),
        (MMDET, "caffe.pth", "", "pytorch", True, None),
        (DETECTRON2, "a.pth", "", "auto", False, "for lack of a hint"),
        (DETECTRON2, "a.pth", "", "pytorch", True, None),
        (ADELAIDET, "a.pth", "", "auto", False, "as all of its own are"),
        (replace(MMDET, depth=101), "a.pth", "", "pytorch", True, None),
    ],
)
def test_style_of_a_resnet(
    layout: Layout, name: str, notes: str, style: str, expected: bool, reason: str | None
) -> None:
    result = converted(layout, name, notes, style)
    assert is_pytorch(result) == expected
    said = [line for line in result.assumed if "style" in line]
    if reason is None:
        assert not said
    else:
        assert len(said) == 1 and (reason.split(";")[0] in said[0])


def test_style_from_the_mean_of_the_pixels() -> None:
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    assert is_pytorch(converted(DETECTRON2, pixel_mean=mean, pixel_std=std))
    result = converted(DETECTRON2, pixel_mean=mean.flip(0), pixel_std=torch.ones(3))
    assert not is_pytorch(result) and "pixel_mean says" in result.assumed[0]


@pytest.mark.parametrize(
    "layout",
    [
        replace(MMDET, depth=18),
        Layout("original", **SMALL, dcn_tower=True),
        Layout("mmdet", other="W18", **SMALL),
    ],
)
def test_style_where_there_is_but_one(layout: Layout) -> None:
    result = converted(layout)
    assert not any("style" in line for line in result.assumed)
    with pytest.raises(ConvertError, match="any.pth: --style pytorch: is for the ResNet-50 and"):
        converted(layout, style="pytorch")


def test_what_mmdetection_predicts() -> None:
    """A bias goes with the tricks in all that is published; a configuration knows better."""
    without = converted(PLAIN)
    assert without.config.model.activation == "exp"
    assert "exp of pixels, centerness is on the cls tower, NMS at 0.5," in without.assumed[0]
    with_bias = converted(MMDET)
    assert with_bias.config.model.activation == "relu"
    assert "published models with a bias" in with_bias.assumed[0]

    told = converted(PLAIN, notes=NOTES)
    model = told.config.model
    assert (model.activation, model.normalize_ltrb, model.centerness_branch) == (
        "relu",
        True,
        "box",
    )
    assert told.config.postprocess.iou_threshold == 0.55 and not model.tower_bias
    for flag in ("norm_on_bbox", "centerness_on_reg", "center_sampling"):
        changed = converted(MMDET, notes=NOTES.replace(f"{flag}=True", f"{flag}=False"))
        model = changed.config.model
        assert (model.activation, model.normalize_ltrb) == (
            ("exp", False) if flag == "norm_on_bbox" else ("relu", True)
        )
        assert model.centerness_branch == ("cls" if flag == "centerness_on_reg" else "box")
        assert model.center_sampling_radius == (0 if flag == "center_sampling" else 1.5)
    assert not any("distances" in line for line in told.assumed)


def test_what_the_centerness_of_adelaidet_learned() -> None:
    plain = converted(ADELAIDET, "FCOS_MS_R_50_2x.pth")
    assert (plain.config.loss.quality, plain.preset) == ("centerness", "adelaidet")
    assert any("--loss.quality iou" in line for line in plain.assumed)
    iou = converted(ADELAIDET, "FCOS_MS_R_50_2x_iou.pth")
    assert (iou.config.loss.quality, iou.config.loss.box_weights) == ("iou", "none")
    assert iou.preset == "adelaidet-iou"
    assert replace(iou.config, loss=plain.config.loss) == plain.config


def test_plain_or_improved() -> None:
    layout = Layout("original", **SMALL)
    assert "the plain detector" in converted(layout, "FCOS_R_50.pth").assumed[0]
    assert "the improved detector" in converted(layout, "FCOS_imprv_R_50.pth").assumed[0]


def test_classes_are_said() -> None:
    state = build(PLAIN).state
    assert "COCO's classes, as there are 80" in converted(PLAIN).assumed
    for names in ((), tuple("abcdefgh" * 10)):
        found = convert_weights(ForeignFile(state, names), Path("a.pth"), class_names=names)
        assert ("COCO's classes, as there are 80" in found.assumed) == (names == ())
    nothing = converted(Layout("rosinality", other="V-57", bias=False, classes=3, **SMALL))
    assert nothing.assumed == []


def test_file_of_rosinality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are beside the state of its optimiser."""
    path = tmp_path / "epoch-24.pt"
    state = build(Layout("rosinality", other="V-57", bias=False, c5=True, **SMALL)).state
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": state, "optim": optimizer}, path)
    assert cli.main(["convert", "--weights", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "preset: rosinality" in printed and "vovnet57" in printed
    assert "rgb in 0..1, mean (0.40789654, " in printed and "resize truncate" in printed


@pytest.mark.parametrize("place", ["config", "cfg"])
def test_notes_of_a_file(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as text, wherever mmdetection's versions keep them; anything else is no note."""
    path = tmp_path / "mine.pth"
    state = build(replace(MMDET, depth=18)).state
    torch.save({"state_dict": state, "meta": {place: NOTES}}, path)
    assert read_foreign(path).notes == NOTES
    assert cli.main(["convert", "--weights", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "NMS 0.55" in printed and "assumed: COCO's classes" in printed
    for other in ({place: {"a": 1}}, {}, [1]):
        torch.save({"state_dict": state, "meta": other}, path)
        assert read_foreign(path).notes == ""


def test_style_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.pth"
    torch.save({"model": build(DETECTRON2).state}, path)
    assert cli.main(["convert", "--weights", str(path), "--style", "pytorch"]) == 0
    printed = capsys.readouterr().out
    assert "resnet50, stride in 3x3" in printed and "images: rgb in 0..255" in printed
    assert "a ResNet of" not in printed
    assert cli.main(["convert", "--weights", str(path)]) == 0
    assert "assumed: a ResNet of caffe's style (strides in 1x1" in capsys.readouterr().out
