"""Backbones of timm: what the settings do to them, their weights, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import Checkpoint, Layout, Random, build
from foreign_trunks import vovnet
from torch import Tensor, nn

import fcos
from fcos import cli
from fcos.backbones import build_backbone
from fcos.config import ConfigError, LossConfig, ModelConfig
from fcos.convert.conversion import convert_weights
from fcos.convert.errors import ConvertError
from fcos.convert.reading import ForeignFile
from fcos.losses import assign, fcos_losses, step_normalizers
from fcos.model import FCOS
from fcos.timm_backbones import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(num_classes=3, fpn_channels=64, tower_convs=1, backbone_weights="none")
SMALL: dict[str, Any] = {"channels": 64, "tower": 1, "classes": 2}


def on_meta(backbone: Any, **changes: Any) -> FCOS:
    with torch.device("meta"):
        config = replace(MODEL, backbone=backbone, **changes)
        return FCOS(config, pretrained_backbone=False)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_levels(backbone: str) -> None:
    network = on_meta(backbone)
    logits = network(torch.empty(2, 3, 128, 192, device="meta")).logits
    assert [tuple(x.shape) for x in logits] == [
        (2, 3, 16, 24),
        (2, 3, 8, 12),
        (2, 3, 4, 6),
        (2, 3, 2, 3),
        (2, 3, 1, 2),
    ]


@pytest.mark.parametrize("backbone", ["dla34", "vovnet39_ese", "hrnet_w18"])
@pytest.mark.parametrize("frozen", [True, False])
def test_norms(backbone: str, frozen: bool) -> None:
    body = on_meta(backbone, frozen_batch_norm=frozen, batch_norm_eps=0.25).backbone.body
    norms = [m for m in body.modules() if hasattr(m, "running_var")]
    assert len(norms) > 30 and {norm.eps for norm in norms} == {0.25}
    assert all(isinstance(norm, nn.BatchNorm2d) != frozen for norm in norms)
    assert all(any(True for _ in norm.parameters()) != frozen for norm in norms)


@pytest.mark.parametrize(
    ("backbone", "second"),
    [("dla34", "level2."), ("vovnet39_ese", "stage2."), ("hrnet_w18", "layer1.")],
)
def test_frozen_stages(backbone: Any, second: str) -> None:
    config = replace(MODEL, backbone=backbone)

    def trained(frozen_stages: int) -> set[str]:
        with torch.device("meta"):
            body = build_backbone(replace(config, frozen_stages=frozen_stages), False).body
        return {name for name, weight in body.named_parameters() if weight.requires_grad}

    everything, but_stem, fewer, none = (trained(stages) for stages in (0, 1, 2, 5))
    assert none == set() and everything > but_stem > fewer
    assert but_stem - fewer == {name for name in everything if name.startswith(second)}


def test_batch_norms_learn_and_see_the_batch() -> None:
    torch.manual_seed(0)
    config = replace(MODEL, backbone="dla34", frozen_batch_norm=False, frozen_stages=0)
    network = FCOS(config).train()
    body = network.backbone.body
    before = body.get_submodule("level5.root.bn").running_mean.clone()
    sum(x.sum() for x in network(torch.randn(2, 3, 64, 64)).logits).backward()
    norm = body.get_submodule("level5.root.bn")
    assert norm.weight.grad.abs().sum() > 0 and not torch.equal(norm.running_mean, before)


def test_targets_of_an_hrnet_are_of_its_levels() -> None:
    """At 800 x 160, say, its P7 has 6 rows, and not 7."""
    config = replace(MODEL, backbone="hrnet_w18", frozen_stages=0)
    torch.manual_seed(0)
    network = FCOS(config)
    height, width = 160, 32
    predictions = network(torch.randn(1, 3, height, width))
    boxes = torch.tensor([[[4.0, 5.0, 30.0, 28.0]]])
    targets = assign(
        (height, width), config, boxes, torch.ones(1, 1, dtype=torch.int64), torch.tensor([1])
    )
    locations = sum(level[0, 0].numel() for level in predictions.logits)
    assert targets.labels.shape[1] == locations
    losses = fcos_losses(predictions, targets, step_normalizers([targets]), LossConfig())
    sum(losses.values()).backward()
    assert network.backbone.fpn.reduction.weight.grad.abs().sum() > 0
    with torch.no_grad():
        small, large = (on_meta("hrnet_w18")(torch.empty(1, 3, s, 800, device="meta")).logits
                        for s in (32, 800))  # fmt: skip
    assert tuple(large[4].shape[-2:]) == (6, 6) and tuple(small[4].shape[-2:]) == (1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "dla34", "stride_in": "1x1"}, "stride_in must be '3x3' for dla34, got '1x1'"),
        (
            {"backbone": "hrnet_w18", "deformable_stages": (2,)},
            r"deformable_stages must be \(\) for hrnet_w18, got \(2,\)",
        ),
        ({"backbone": "hrnet_w18", "p6_source": "c5"}, "p6_source must be 'p5' for hrnet_w18"),
        (
            {"backbone": "hrnet_w18", "locations": "torchvision"},
            "locations must be 'half_stride' for hrnet_w18",
        ),
    ],
)
def test_settings_that_they_do_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FCOS(replace(MODEL, **changes))


@pytest.mark.parametrize("backbone", NETWORKS)
def test_without_timm(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=f"model.backbone {backbone} needs .* pip install timm"):
        FCOS(replace(MODEL, backbone=backbone))  # type: ignore[arg-type]


def test_with_an_older_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.__version__", "1.0.21.dev0")
    with pytest.raises(ConfigError, match="needs timm 1.0.22 or newer, got 1.0.21.dev0: pip inst"):
        FCOS(replace(MODEL, backbone="dla34"))
    monkeypatch.setattr("timm.__version__", "1.1")
    on_meta("dla34")


def test_conversion_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build(Layout("adelaidet", other="DLA-34", levels=3, channels=96)).state
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(ConvertError, match="any.pth: model.backbone dla34 needs the package timm"):
        convert_weights(ForeignFile(state, ()), Path("any.pth"))


@pytest.mark.parametrize("backbone", ["vovnet57", "vovnet39_ese", "vovnet57_ese", "vovnet99_ese"])
def test_no_imagenet_weights(backbone: Any) -> None:
    config = replace(MODEL, backbone=backbone, backbone_weights="imagenet")
    with pytest.raises(ConfigError, match=f"{backbone} has no ImageNet weights .*set model.backb"):
        build_backbone(config, pretrained=True)


def test_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for, and what goes wrong is said."""
    import timm

    asked: list[Any] = []

    def no_connection(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append((name, pretrained))
        raise RuntimeError("no connection")

    monkeypatch.setattr(timm, "create_model", no_connection)
    config = replace(MODEL, backbone="hrnet_w32", backbone_weights="imagenet")
    with pytest.raises(ConfigError, match="hrnet_w32 could not be downloaded .no connection.*none"):
        build_backbone(config, pretrained=True)
    assert asked == [("hrnet_w32", True)]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(suffix: str, tmp_path: Path) -> None:
    """Those that classify do not matter, nor do the two projections of DLA that nothing uses."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("dla34")
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in model.state_dict().items()}
    state["level3.project.0.weight"] = torch.zeros(128, 64, 1, 1)
    path = tmp_path / f"dla34.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(state, path)
    config = replace(MODEL, backbone="dla34", backbone_weights=str(path))
    body = build_backbone(config, pretrained=True).body
    for name, value in body.state_dict().items():
        assert torch.equal(value, state[name]), name
    del state["level2.root.conv.weight"]
    save(state, path)
    with pytest.raises(
        ConfigError, match="not a state dict of timm's dla34; missing .*level2.root"
    ):
        build_backbone(config, pretrained=True)
    with pytest.raises(ConfigError, match="gone.pth: no such file"):
        build_backbone(replace(config, backbone_weights="gone.pth"), pretrained=True)


def test_vovnet_weights_from_a_file(tmp_path: Path) -> None:
    """In the authors' names; timm's lack some that weigh channels."""
    import timm

    checkpoint = Checkpoint(Random(seed=0))
    vovnet(checkpoint, "", "V-39-eSE")
    path = tmp_path / "theirs.pth"
    torch.save({**checkpoint.state, "classifier.weight": torch.zeros(1)}, path)
    config = replace(MODEL, backbone="vovnet39_ese", backbone_weights=str(path))
    body = build_backbone(config, pretrained=True).body.state_dict()
    for role, theirs in checkpoint.roles.items():
        assert torch.equal(body.pop(role.removeprefix("backbone.body.")), checkpoint.state[theirs])
    assert not body
    torch.save(timm.create_model("ese_vovnet39b").state_dict(), path)
    with pytest.raises(ConfigError, match="missing .*stage4.blocks.0.attn.fc.weight"):
        build_backbone(config, pretrained=True)


def test_vovnet_weights_in_the_names_of_timm(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vovnet57a", residual=True)
    path = tmp_path / "timms.pth"
    torch.save(model.state_dict(), path)
    config = replace(MODEL, backbone="vovnet57", backbone_weights=str(path))
    body = build_backbone(config, pretrained=True).body
    name = "blocks.1.conv_mid.2.conv.weight"
    assert torch.equal(
        body.get_parameter(f"stage4.{name}"), model.get_parameter(f"stages.2.{name}")
    )


def test_convert_predict_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real-time model of AdelaiDet, from its file to boxes on a picture."""
    from PIL import Image

    layout = Layout(
        "adelaidet", other="DLA-34", levels=3, norm="bn", shared=1, **{**SMALL, "tower": 0}
    )
    checkpoint = build(layout, Random(seed=0))
    checkpoint.state["proposal_generator.fcos_head.cls_logits.bias"].fill_(1.0)
    weights = tmp_path / "FCOS_RT_MS_DLA_34_4x_shtw_bn.pth"
    torch.save({"model": checkpoint.state}, weights)
    assert cli.main(["convert", "--weights", str(weights), "--class-names", "cat", "dog"]) == 0
    printed = capsys.readouterr().out
    assert "network: dla34" in printed and "preset: adelaidet-rt" in printed
    assert "ignored: backbone.bottom_up.level3.project.0.weight, " in printed
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "a.png")
    converted = tmp_path / f"{weights.stem}-fcos.pt"
    arguments = [
        "predict",
        str(converted),
        str(tmp_path / "a.png"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert cli.main([*arguments, "--device", "cpu", "--score-threshold", "0.1"]) == 0
    assert "a.png" in capsys.readouterr().out
    # the other file is taken directly, too
    one, other = (fcos.load(path, device="cpu").network for path in (converted, weights))
    for (name, tensor), same in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, same), name
