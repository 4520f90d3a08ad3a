"""The network is the published one: against torchvision's FCOS, with the same weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn

from fcos.config import Backbone, ConfigError, ModelConfig
from fcos.locations import feature_sizes
from fcos.model import FCOS
from fcos.presets import PRESETS, improved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = replace(tiny().model, num_classes=3)


def build(config: ModelConfig = SMALL, **changes: Any) -> FCOS:
    torch.manual_seed(0)
    return FCOS(replace(config, **changes), pretrained_backbone=False).eval()


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    torch.manual_seed(0)
    network = fcos_resnet50_fpn(weights=None, weights_backbone=None).eval()
    # fresh weights give outputs that hardly differ from their biases: 0.01 wide, behind a norm
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def renamed(key: str) -> str:
    """torchvision's name of a parameter to ours."""
    for theirs, ours in (
        ("head.classification_head.conv.", "head.cls_tower."),
        ("head.regression_head.conv.", "head.box_tower."),
        ("head.classification_head.cls_logits.", "head.cls_logits."),
        ("head.regression_head.bbox_reg.", "head.ltrb."),
        ("head.regression_head.bbox_ctrness.", "head.centerness."),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def test_outputs_equal_torchvisions(published: torch.nn.Module) -> None:
    network = build(
        improved().model, num_classes=91, frozen_batch_norm=False, trainable_scales=False
    )
    network.load_state_dict({renamed(k): v for k, v in published.state_dict().items()})
    images = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        ours = network(images)
        theirs = published.head(list(published.backbone(images).values()))

    def flat(levels: list[Tensor]) -> Tensor:  # torchvision's [N, locations, channels]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)

    for name, output in (
        ("cls_logits", ours.logits),
        ("bbox_ctrness", ours.centerness),
        ("bbox_regression", ours.ltrb),
    ):
        assert theirs[name].std() > 0.1, f"{name} would be equal whatever the weights"
        torch.testing.assert_close(flat(output), theirs[name], rtol=1e-4, atol=1e-5)


def test_parameter_count(published: torch.nn.Module) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    network = build(improved().model, num_classes=80, frozen_batch_norm=False)
    class_logits = 256 * 3 * 3 + 1
    assert count(network) == count(published) - (91 - 80) * class_logits + 5
    # the published figure counts the 53 frozen norms' scales and shifts as buffers, as we do
    frozen = build(improved().model, num_classes=91, trainable_scales=False)
    assert count(frozen) == FCOS_ResNet50_FPN_Weights.COCO_V1.meta["num_params"]


@pytest.mark.parametrize("levels", [3, 4, 5, 6])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_output_shapes(levels: int, size: tuple[int, int]) -> None:
    strides = tuple(8 * 2**i for i in range(levels))
    network = build(strides=strides, size_ranges=((0, math.inf),) * levels)
    with torch.no_grad():
        outputs = network(torch.randn(2, 3, *size))
    expected = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides]
    assert feature_sizes(size, strides) == expected
    for tensors, channels in zip(outputs, (3, 4, 1), strict=True):
        assert [tuple(t.shape) for t in tensors] == [(2, channels, *s) for s in expected]
    assert all((level >= 0).all() for level in outputs.ltrb)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset: str) -> None:
    config = replace(PRESETS[preset]().model, num_classes=2)
    with torch.device("meta"):
        network = FCOS(config, pretrained_backbone=False)
        outputs = network(torch.empty(1, 3, 64, 64))
    assert len(outputs.logits) == len(config.strides)
    assert outputs.ltrb[0].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_every_backbone(backbone: Backbone) -> None:
    with torch.device("meta"):
        network = FCOS(ModelConfig(num_classes=2, backbone=backbone), pretrained_backbone=False)
        outputs = network(torch.empty(1, 3, 64, 64))
    assert [tuple(t.shape[-2:]) for t in outputs.logits] == [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("stages", range(6))
def test_frozen_stages(stages: int) -> None:
    network = build(frozen_stages=stages)
    parts = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    frozen = tuple(f"backbone.body.{part}." for stage in parts[:stages] for part in stage)
    names = dict(network.named_parameters())
    assert sum(name.startswith("backbone.body.") for name in names) > 20
    for name, parameter in names.items():
        assert parameter.requires_grad != name.startswith(frozen or "none"), name


def test_frozen_batch_norm() -> None:
    """Neither its parameters nor its statistics move, in training mode."""
    network = build(frozen_batch_norm=True).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert not any(".bn" in name for name, _ in network.named_parameters())
    network(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    trained = build(frozen_batch_norm=False).train()
    mean = trained.get_buffer("backbone.body.bn1.running_mean").clone()
    trained(torch.randn(2, 3, 64, 64))
    assert not torch.equal(trained.get_buffer("backbone.body.bn1.running_mean"), mean)


@pytest.mark.parametrize("prior", [0.01, 0.1])
def test_prior(prior: float) -> None:
    network = build(prior_probability=prior)
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, 64, 64))
    scores = torch.cat([level.flatten() for level in outputs.logits]).sigmoid()
    assert scores.mean().item() == pytest.approx(prior, rel=0.1)


@pytest.mark.parametrize("activation", ["exp", "relu"])
def test_activation_and_scales(activation: str) -> None:
    network = build(activation=activation)
    images = torch.randn(1, 3, 64, 64)
    apply = {"exp": torch.exp, "relu": torch.relu}[activation]
    with torch.no_grad():
        features = list(network.backbone(images).values())
        network.head.ltrb.weight.normal_(0, 0.3)
        scales = torch.tensor([0.5, 1.0, 2.0, -1.0])
        network.head.scales.copy_(scales)
        outputs = network(images)
        for feature, ltrb, scale in zip(features, outputs.ltrb, scales, strict=True):
            raw = network.head.ltrb(network.head.box_tower(feature))
            assert raw.std() > 0.1
            torch.testing.assert_close(ltrb, apply(scale * raw))
    assert build(trainable_scales=False).head.scales is None


def test_exp_does_not_overflow() -> None:
    network = build(activation="exp")
    with torch.no_grad():
        network.head.ltrb.bias.fill_(1000.0)
        outputs = network(torch.zeros(1, 3, 64, 64))
    assert all(level.isfinite().all() and (level > 1e6).all() for level in outputs.ltrb)


@pytest.mark.parametrize("branch", ["cls", "box"])
def test_centerness_branch(branch: str) -> None:
    """The gradient of the centerness reaches one tower and not the other."""
    network = build(centerness_branch=branch)
    sum(level.sum() for level in network(torch.randn(1, 3, 64, 64)).centerness).backward()
    gradients = {
        name: network.head.get_submodule(f"{name}_tower")[0].weight.grad for name in ("cls", "box")
    }
    other = "box" if branch == "cls" else "cls"
    assert gradients[other] is None
    assert gradients[branch].abs().sum() > 0


def test_bf16_autocast() -> None:
    """Distances stay float32; bfloat16 steps by 1 above 128."""
    network = build()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(images)
    assert {level.dtype for level in outputs.ltrb} == {torch.float32}
    assert outputs.logits[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs.logits[0].float(), exact.logits[0], rtol=0.05, atol=0.05)


def test_backbone_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18()  # with fc. and num_batches_tracked, as published
    resnet.bn1.running_mean.fill_(0.25)
    torch.save(resnet.state_dict(), tmp_path / "r18.pt")
    config = replace(SMALL, backbone="resnet18", backbone_weights=str(tmp_path / "r18.pt"))
    for frozen in (True, False):
        network = FCOS(replace(config, frozen_batch_norm=frozen))
        own = network.backbone.body.state_dict()
        for key, value in resnet.state_dict().items():
            if not key.startswith("fc.") and "num_batches" not in key:
                assert torch.equal(own[key], value), key


def test_backbone_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pt")
    torch.save({"layer": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torchvision.models.resnet18(), tmp_path / "module.pt")
    for name, message in (
        ("missing.pt", "backbone weights .*missing.pt: no such file"),
        ("other.pt", "not a state dict of torchvision's resnet34; missing .*conv1.weight"),
        ("list.pt", "must be a state dict, names to tensors"),
        ("text.pt", "backbone weights .*text.pt: not a PyTorch file"),
        ("module.pt", "backbone weights .*module.pt: refused"),
        ("r18.pt", "not a state dict of torchvision's resnet34; missing .*layer1.2"),
    ):
        config = replace(SMALL, backbone="resnet34", backbone_weights=str(tmp_path / name))
        with pytest.raises(ConfigError, match=message):
            FCOS(config)
    with pytest.raises(ConfigError, match="do not fit resnet50: .*shape"):
        FCOS(replace(SMALL, backbone="resnet50", backbone_weights=str(tmp_path / "r18.pt")))


def test_download_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: WeightsEnum, *args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    config = replace(SMALL, backbone="resnet50", backbone_weights="imagenet")
    with pytest.raises(ConfigError) as caught:
        FCOS(config)
    # what failed, what to fetch, and what to do instead; V1, which the literature starts from
    for part in ("Name or service", "https://", "resnet50-0676ba61.pth", "set it to none"):
        assert part in str(caught.value)
    FCOS(config, pretrained_backbone=False)


def test_imagenet_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *a, **k: dict(state))
    network = FCOS(replace(SMALL, backbone="resnet18", backbone_weights="imagenet"))
    assert torch.equal(network.backbone.body.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": None}, "model.num_classes must be >= 1, got None"),
        ({"num_classes": 0}, "model.num_classes must be >= 1, got 0"),
        ({"strides": (8, 16)}, "model.strides must start with 8 16 32"),
        ({"strides": (8, 16, 64, 128)}, "model.strides must start with 8 16 32"),
        ({"strides": (4, 8, 16, 32)}, "model.strides must start with 8 16 32"),
        ({"size_ranges": ((0, 64),)}, "one range for each of the 4 strides, got 1"),
        ({"size_ranges": ((0, 9), (9, 3), (0, 1), (0, 1))}, r"got \(9, 3\) at level 1"),
        ({"fpn_channels": 48}, "model.fpn_channels must be a multiple of 32"),
        ({"fpn_channels": 32}, "at least 64"),
        ({"frozen_stages": 6}, "model.frozen_stages must lie in 0..5, got 6"),
        ({"prior_probability": 0.0}, "model.prior_probability"),
        ({"center_sampling_radius": -1.0}, "model.center_sampling_radius must be >= 0, got -1.0"),
        ({"tower_convs": -1}, "model.tower_convs must be >= 0"),
        ({"backbone_weights": "imagenet"}, "has no ImageNet weights"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FCOS(replace(SMALL, **changes))
