"""torchvision's state dicts: which are taken, which are refused, and what becomes of 91 outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import get_model
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import (
    FCOS_ResNet50_FPN_Weights,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fcos
from fcos.cli import main
from fcos.convert import coco
from fcos.convert import torchvision as converter
from fcos.convert.errors import ConvertError
from fcos.convert.names import BLOCKS
from fcos.limits import check
from fcos.model import FCOS
from fcos.presets import paper, torchvision
from tests.detector.torchvision_twins import make_narrow, make_twins


@pytest.fixture(scope="module")
def narrow() -> dict[str, Tensor]:
    return make_narrow().state_dict()


def meta_state(build: Any) -> dict[str, Tensor]:
    """Names and shapes alone."""
    with torch.device("meta"):
        state: dict[str, Tensor] = build().state_dict()
    return state


def test_recognises(narrow: dict[str, Tensor]) -> None:
    assert converter.NAME == "torchvision"
    assert converter.recognises(narrow.keys())
    assert not converter.recognises(
        FCOS(make_twins(make_narrow()).config.model, False).state_dict()
    )
    plain = {"weights": None, "weights_backbone": None}
    assert not converter.recognises(meta_state(lambda: retinanet_resnet50_fpn(**plain)).keys())


@pytest.mark.parametrize("backbone", BLOCKS)
def test_backbones(backbone: str) -> None:
    def build() -> TorchvisionFCOS:
        body = get_model(backbone, weights=None)
        if backbone.endswith("64x4d"):  # which resnet_fpn_backbone does not know
            reference = resnet_fpn_backbone(
                backbone_name="resnext101_32x8d",
                weights=None,
                returned_layers=[2, 3, 4],
                extra_blocks=LastLevelP6P7(256, 256),
            )
            for name in ("layer1", "layer2", "layer3", "layer4"):
                for i, block in enumerate(getattr(body, name)):
                    getattr(reference.body, name)[i].conv2 = block.conv2
            return TorchvisionFCOS(reference, 80)
        trunk = resnet_fpn_backbone(
            backbone_name=backbone,
            weights=None,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        return TorchvisionFCOS(trunk, 80)

    state = meta_state(build)
    config = converter.config(state)
    assert config == replace(
        torchvision(), model=replace(torchvision().model, backbone=backbone, num_classes=80)
    )
    ours, ignored = converter.to_ours(state)
    assert len(ours) == len(state) and ignored == []
    assert converter.from_ours(ours, config).keys() == state.keys()


def test_trained_batch_norm() -> None:
    """fcos_resnet50_fpn without any weights has one that is trained: 53 more entries."""
    state = meta_state(lambda: fcos_resnet50_fpn(weights=None, weights_backbone=None))
    config = converter.config(state)
    assert len(state) == 372 and not config.model.frozen_batch_norm
    check(config)
    ours, ignored = converter.to_ours(state)
    assert ignored == []
    assert ours.keys() == FCOS(config.model, False).state_dict().keys()
    assert converter.from_ours(ours, config).keys() == state.keys()


def test_old_names(narrow: dict[str, Tensor]) -> None:
    new_names = {new: old for old, new in converter.OLD_NAMES.items()}
    assert new_names.keys() < narrow.keys()
    old = {new_names.get(key, key): value for key, value in narrow.items()}
    ours, _ = converter.to_ours(old)
    truth, _ = converter.to_ours(narrow)
    assert ours.keys() == truth.keys()
    assert all(ours[key] is truth[key] for key in truth)


LATERAL = "backbone.fpn.inner_blocks.1.0.bias"
LOGITS = "head.classification_head.cls_logits.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {LATERAL: None, "head.regression_head.conv.1.bias": None},
            f"2 keys do not fit resnet18: missing {LATERAL}; missing head.regression_head.conv.1",
        ),
        ({LATERAL: None}, f"1 keys do not fit resnet18: missing {LATERAL}$"),
        ({"neck.weight": torch.zeros(1)}, "unknown neck.weight$"),
        ({"head.regression_head.scale": torch.zeros(1)}, "unknown head.regression_head.scale$"),
        ({"head.regression_head.conv.6.weight": torch.zeros(1)}, "unknown head.regression_head.co"),
        ({LATERAL: torch.zeros(3)}, rf"{LATERAL} has shape \(3,\), not \(64,\)$"),
        ({"head.classification_head.cls_logits.bias": torch.zeros(91)}, r"\(91,\), not \(11,\)$"),
        ({LOGITS: torch.zeros(11)}, "must be the weight of a convolution, got shape"),
        ({LOGITS: torch.zeros(11, 48, 3, 3)}, r"has shape \(11, 48, 3, 3\), not \(11, 64, 3, 3\)"),
        ({LOGITS: torch.zeros(0, 64, 3, 3)}, "impossible network: model.num_classes"),
        ({LOGITS: None}, f"lacks {LOGITS}"),
        ({"backbone.body.layer2.1.conv1.weight": None}, r"with stages of \(2, 1, 2, 2\) blocks"),
    ],
    ids=range(12),
)
def test_refused(
    narrow: dict[str, Tensor], changes: dict[str, Tensor | None], message: str
) -> None:
    """Every key that is wrong is named."""
    state: dict[str, Any] = {**narrow, **changes}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ConvertError, match=message):
        converter.to_ours(state)


def test_networks_that_torchvision_does_not_have() -> None:
    twins = make_twins(make_narrow())
    state = twins.ours.state_dict()
    for change in (
        {"activation": "exp"},
        {"trainable_scales": True},
        {"centerness_branch": "cls"},
        {"normalize_ltrb": False},
        {"locations": "half_stride"},
    ):
        config = replace(twins.config, model=replace(twins.config.model, **change))
        (name,) = change
        with pytest.raises(ConvertError, match=f"torchvision's FCOS needs model.{name}"):
            converter.from_ours(state, config)
    with pytest.raises(ConvertError, match="torchvision's FCOS needs model"):
        converter.from_ours(state, paper())
    state.pop("head.ltrb.bias")
    with pytest.raises(ConvertError, match="lacks head.ltrb.bias$"):
        converter.from_ours(state, twins.config)


def test_categories() -> None:
    """Ours are those that torchvision's weights name."""
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert len(names) == 91
    known = [i for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert tuple(known) == coco.CATEGORY_IDS
    assert tuple(names[i] for i in known) == coco.CLASS_NAMES


def test_only_categories() -> None:
    """The 80 outputs give what they gave among 91."""
    twins = make_twins(make_narrow(91))
    state, config = converter.only_categories(twins.ours.state_dict(), twins.config)
    assert config == replace(twins.config, model=replace(twins.config.model, num_classes=80))
    network = FCOS(config.model, pretrained_backbone=False)
    network.load_state_dict(state)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few, all_of_them = network(images), twins.ours(images)
    for ours, truth in zip(few.logits, all_of_them.logits, strict=True):
        torch.testing.assert_close(ours, truth[:, list(coco.CATEGORY_IDS)])

    other = make_twins(make_narrow(7))
    state, config = converter.only_categories(other.ours.state_dict(), other.config)
    assert config == other.config and state.keys() == other.ours.state_dict().keys()


def test_file_of_91_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``fcos convert`` and ``fcos.load`` take the 80 categories, or all that are named."""
    twins = make_twins(make_narrow(91))
    weights, ours, back = (tmp_path / name for name in ("tv.pth", "ours.pt", "back.pth"))
    torch.save(twins.theirs.state_dict(), weights)
    assert main(["convert", "--weights", str(weights), "--output", str(ours)]) == 0
    printed = capsys.readouterr().out
    assert "torchvision" in printed and "11 outputs of 91" in printed
    for path in (weights, ours):
        predictor = fcos.load(path, device="cpu")
        assert predictor.class_names == coco.CLASS_NAMES
        assert predictor.category_ids == coco.CATEGORY_IDS
        assert predictor.config.postprocess == torchvision().postprocess

    names = [f"name {i}" for i in range(91)]
    arguments = ["convert", "--weights", str(weights), "--class-names", *names]
    assert main([*arguments, "--output", str(ours)]) == 0
    assert fcos.load(ours, device="cpu").class_names == tuple(names)
    arguments = ["convert", "--weights", str(ours), "--to", "torchvision"]
    assert main([*arguments, "--output", str(back)]) == 0
    state = torch.load(back, weights_only=True)
    truth = twins.theirs.state_dict()
    assert state.keys() == truth.keys()
    assert all(torch.equal(state[key], value) for key, value in truth.items())
