"""`fcos.load`: a checkpoint is all that prediction needs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fcos
from fcos.checkpoint import CheckpointError, save_checkpoint
from fcos.model import FCOS
from fcos.presets import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network() -> FCOS:
    torch.manual_seed(0)
    network = FCOS(replace(tiny().model, num_classes=2)).eval()
    with torch.no_grad():
        network.head.cls_logits.bias.fill_(1.0)
        network.head.ltrb.bias.fill_(1.0)
    return network


def write(path: Path, network: FCOS, **changes: object) -> Path:
    # a run folder and a data set that are not there any more, and weights that would be fetched
    config = replace(tiny(), model=replace(network.config, backbone_weights="/gone/r18.pt"))
    config = replace(config, data=replace(config.data, min_sizes=(64,), max_size=64))
    content = {
        "config": config,
        "class_names": ("cat", "dog"),
        "category_ids": (3, 7),
        "model": network.state_dict(),
    }
    save_checkpoint(path, {**content, **changes})
    return path


def test_load_and_predict(network: FCOS, tmp_path: Path) -> None:
    predictor = fcos.load(write(tmp_path / "best.pt", network), device="cpu")
    assert predictor.class_names == ("cat", "dog")
    assert predictor.category_ids == (3, 7)
    assert not predictor.network.training
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    detections = predictor.predict(image)
    assert len(detections) and set(detections.class_names) <= {"cat", "dog"}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = predictor.network(images), network(images)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_errors(network: FCOS, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        fcos.load(tmp_path / "missing.pt")
    state = network.state_dict()
    state["head.cls_logits.weight"] = torch.zeros(5, 64, 3, 3)
    path = write(tmp_path / "best.pt", network, model=state)
    with pytest.raises(CheckpointError, match=r"head.cls_logits.weight has shape \(5, 64, 3, 3\)"):
        fcos.load(path)


def test_names_of_the_package() -> None:
    assert fcos.FCOS is FCOS
    assert fcos.Predictor.__name__ == "Predictor" and fcos.Detections.__name__ == "Detections"
    with pytest.raises(AttributeError, match="no attribute 'Detection'"):
        _ = fcos.Detection  # type: ignore[attr-defined]


def test_import_is_light() -> None:
    code = "import fcos, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
