"""``fcos convert``: what it prints, writes, and leaves alone."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import Layout, Random, Unique, build
from torchvision.models.detection import fcos_resnet50_fpn

import fcos
from fcos import cli
from fcos.checkpoint import load_checkpoint
from fcos.convert.conversion import convert_weights
from fcos.convert.reading import ForeignFile

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 18, "channels": 64, "tower": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(*arguments: Any) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """mmdetection's, R-18, with scores above a half."""
    checkpoint = build(Layout("mmdet", **SMALL), Random(seed=0))
    checkpoint.state["bbox_head.conv_cls.bias"].fill_(2.0)
    for i in (1, 2):
        checkpoint.state[f"backbone.layer1.0.bn{i}.num_batches_tracked"] = torch.tensor(9)
    torch.save({"state_dict": checkpoint.state, "meta": {}}, tmp_path / "fcos_r18.pth")
    return tmp_path / "fcos_r18.pth"


def test_convert_and_predict(
    foreign: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--weights", foreign) == 0
    text = capsys.readouterr().out
    for part in (
        "mmdet",
        "ignored: 2 num_batches_tracked",
        "rgb in 0..255",
        "80: person, bicycle",
        "-fcos.pt",
    ):
        assert part in text
    output = tmp_path / "fcos_r18-fcos.pt"
    content = load_checkpoint(output)
    assert content["class_names"][79] == "toothbrush" and content["category_ids"][79] == 90
    assert content["config"].data.pixel_range == 255
    assert names(tmp_path) == ["fcos_r18-fcos.pt", "fcos_r18.pth"]
    assert run("--weights", output, "--output", tmp_path / "twice.pt") == 2
    assert "is a checkpoint of this project already" in capsys.readouterr().err

    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    detections = fcos.load(output, device="cpu").predict(image, score_threshold=0.1)
    directly = fcos.load(foreign, device="cpu").predict(image, score_threshold=0.1)
    assert len(detections) > 0
    assert torch.equal(detections.boxes, directly.boxes)
    assert torch.equal(detections.scores, directly.scores)


def test_detectron2_pickle_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layout = Layout("detectron2", scales=False, **SMALL)
    state = build(layout, Random(seed=0)).state
    arrays = {key: value.half().numpy() for key, value in state.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    ours, back = tmp_path / "ours.pt", tmp_path / "back.pth"
    assert run("--weights", tmp_path / "a.pkl", "--output", ours) == 0
    assert run("--weights", ours, "--to", "detectron2", "--output", back) == 0
    assert "for detectron2, to be configured with" in capsys.readouterr().out
    found = torch.load(back, weights_only=True)["model"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value.half().float()) for key, value in state.items())


def test_torchvision_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with torch.device("meta"):
        network = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    make = Unique()
    state = {
        key: make(tuple(value.shape)) if value.is_floating_point() else torch.tensor(0)
        for key, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth")
    ours, back = tmp_path / "ours.pt", tmp_path / "back.pth"
    assert run("--weights", tmp_path / "a.pth", "--output", ours) == 0
    assert run("--weights", ours, "--to", "torchvision", "--output", back) == 0
    text = capsys.readouterr().out
    assert "torchvision, 372 tensors mapped" in text and "preset: torchvision, " in text
    found = torch.load(back, weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_torchvisions_91_outputs_are_cocos_80_classes(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = fcos_resnet50_fpn(weights=None, weights_backbone=None)
    state = {key: torch.zeros(()).expand(v.shape) for key, v in network.state_dict().items()}
    state["head.classification_head.cls_logits.bias"] = torch.arange(91.0)
    found = convert_weights(ForeignFile(state, ()), Path("a.pth"))
    assert found.class_names[-1] == "toothbrush" and len(found.class_names) == 80
    assert found.state["head.cls_logits.bias"].tolist() == list(found.category_ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "gone.pth"], "gone.pth: no such file"),
        (["--weights", "other.pth"], "other.pth: not from a known FCOS"),
        (["--weights", "text.pth"], "text.pth: "),
        (["--weights", "plain.pth"], "plain.pth: the weights do not tell whether"),
        (["--weights", "plain.pth", "--source", "mmdt"], "did you mean mmdet?"),
        (["--weights", "plain.pth", "--output", "plain.pth"], "must not replace the weights"),
        (["--weights", "plain.pth", "--output", "no/out.pt"], "no such folder"),
        (["--weights", "plain.pth", "--source", "original", "--class-names", "a"], "has 2 classes"),
        (
            ["--weights", "plain.pth", "--source", "original", "--to", "detectron2"],
            "plain.pth: detectron2's FCOS needs model.activation 'relu', got 'exp'",
        ),
    ],
)
def test_errors_leave_nothing_behind(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layer.weight": torch.zeros(2)}, "other.pth")
    Path("text.pth").write_text("hello")
    torch.save(
        {"model": build(Layout("original", classes=2, **SMALL), Unique()).state}, "plain.pth"
    )
    before = names(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert names(tmp_path) == before
