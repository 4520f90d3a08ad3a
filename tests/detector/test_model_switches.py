"""Settings of the network, images and detections that foreign checkpoints need."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from fcos.backbones import build_backbone
from fcos.config import ConfigError, DataConfig, ModelConfig, PostprocessConfig
from fcos.data.transforms import prepare_image
from fcos.deformable import DeformableConv2d
from fcos.model import FCOS, Predictions
from fcos.postprocess import postprocess
from fcos.presets import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = replace(tiny().model, num_classes=3)
RESNET50 = ModelConfig(num_classes=2, fpn_channels=64)


def build(config: ModelConfig = SMALL, **changes: Any) -> FCOS:
    torch.manual_seed(0)
    return FCOS(replace(config, **changes), pretrained_backbone=False).eval()


def on_meta(**changes: Any) -> FCOS:
    with torch.device("meta"):
        return build(RESNET50, **changes)


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
def test_stride_in(stride_in: str) -> None:
    strides = []
    for module in on_meta(stride_in=stride_in).modules():
        if isinstance(module, Bottleneck) and module.downsample is not None:
            strides.append((module.conv1.stride[0], module.conv2.stride[0]))
    expected = (1, 2) if stride_in == "3x3" else (2, 1)
    assert strides == [(1, 1), expected, expected, expected]


def test_batch_norm_eps() -> None:
    for frozen in (True, False):
        network = on_meta(batch_norm_eps=0.25, frozen_batch_norm=frozen)
        norms = [m for m in network.modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)]
        assert len(norms) == 53 and {norm.eps for norm in norms} == {0.25}


def test_p6_from_c5() -> None:
    network = build(p6_source="c5")
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        c5 = list(network.backbone.body(images).values())[-1]
        p6 = network.backbone(images)["p6"]
        torch.testing.assert_close(p6, network.backbone.fpn.extra_blocks.p6(c5))
        network.backbone.fpn.extra_blocks.p6.weight.zero_()
        network(images)
    assert build().backbone.fpn.extra_blocks.p6.weight.shape[1] == 64


@pytest.mark.parametrize(
    ("stages", "interval", "count"),
    [((), 1, 0), ((4,), 1, 3), ((2, 3, 4), 1, 13), ((3, 4), 3, 3), ((1,), 2, 2)],
)
def test_deformable_stages(stages: tuple[int, ...], interval: int, count: int) -> None:
    network = on_meta(deformable_stages=stages, deformable_interval=interval)
    names = [n for n, m in network.named_modules() if isinstance(m, DeformableConv2d)]
    assert len(names) == count
    assert {name.split("layer")[1][0] for name in names} == {str(stage) for stage in stages}
    assert [tuple(t.shape[-2:]) for t in network(torch.empty(1, 3, 64, 64, device="meta")).logits][
        :2
    ] == [
        (8, 8),
        (4, 4),
    ]


@pytest.mark.parametrize(("stride", "groups", "bias"), [(1, 1, True), (2, 4, False)])
def test_deformable_starts_as_half_a_convolution(stride: int, groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, stride, padding=1, groups=groups, bias=bias)
    deformable = DeformableConv2d.from_conv(conv)
    features = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        if bias:
            conv.bias.zero_()
        torch.testing.assert_close(deformable(features), conv(features) / 2)
        # moved by a whole pixel, with full weight
        deformable.offset.bias[0:18:2] = 1.0
        deformable.offset.bias[18:] = 100.0
        moved = torch.roll(features, -1, dims=2)
        found, expected = deformable(features), conv(moved)
        torch.testing.assert_close(found[:, :, 1:-2], expected[:, :, 1:-2])
    found.sum()


def test_deformable_trains_and_runs_in_bf16() -> None:
    network = build(tower_deformable=True)
    for tower in (network.head.cls_tower, network.head.box_tower):
        assert not any(p.any() for p in tower[3].offset.parameters())
    features = torch.randn(1, 3, 64, 64)
    outputs = network(features)
    sum(level.sum() for level in outputs.logits).backward()
    last = network.head.cls_tower[3]
    assert isinstance(last, DeformableConv2d) and last.offset.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lower = network(features)
    torch.testing.assert_close(lower.logits[0].float(), outputs.logits[0], rtol=0.05, atol=0.05)


def test_imagenet_weights_reach_deformable_convolutions(tmp_path: Any) -> None:
    torch.manual_seed(1)
    resnet = torchvision.models.resnet50()
    torch.save(resnet.state_dict(), tmp_path / "r50.pt")
    config = replace(RESNET50, backbone_weights=str(tmp_path / "r50.pt"), deformable_stages=(3,))
    body = build_backbone(config, pretrained=True).body
    assert torch.equal(body.layer3[1].conv2.weight, resnet.layer3[1].conv2.weight)
    assert body.layer3[0].conv2.offset.weight.abs().sum() == 0
    assert all(not p.requires_grad for p in body.layer1.parameters())


def test_mobilenet_from_a_file(tmp_path: Any) -> None:
    torch.manual_seed(1)
    mobilenet = torchvision.models.mobilenet_v2()
    torch.save(mobilenet.state_dict(), tmp_path / "v2.pt")
    config = replace(
        RESNET50, backbone="mobilenet_v2", backbone_weights=str(tmp_path / "v2.pt"), frozen_stages=2
    )
    network = FCOS(config).eval()
    body = network.backbone.body
    assert torch.equal(body["17"].conv[2].weight, mobilenet.features[17].conv[2].weight)
    trained = {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(4, 18)}
    with torch.no_grad():
        levels = body(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (32, 8, 12),
        (96, 4, 6),
        (320, 2, 3),
    ]


@pytest.mark.parametrize("norm", ["group", "batch", "level_batch", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_towers(norm: str, bias: bool) -> None:
    network = build(tower_norm=norm, tower_bias=bias, shared_tower_convs=1)
    kinds = {"group": nn.GroupNorm, "batch": nn.BatchNorm2d, "level_batch": nn.ModuleList}
    expected = [nn.Conv2d, *([] if norm == "none" else [kinds[norm]]), nn.ReLU]
    for tower, convs in (("shared_tower", 1), ("cls_tower", 2), ("box_tower", 2)):
        layers = list(network.head.get_submodule(tower))
        assert len(layers) == convs * len(expected)
        for layer, kind in zip(layers, expected * convs, strict=True):
            assert isinstance(layer, kind)
        assert (layers[0].bias is not None) == bias
    with torch.no_grad():
        assert len(network(torch.randn(1, 3, 64, 64)).logits) == 4
    network.train()(torch.randn(2, 3, 64, 64))


def test_norms_of_levels_see_their_level() -> None:
    network = build(tower_norm="level_batch").train()
    norms = network.head.box_tower[1]
    assert len(norms) == 4
    network(torch.randn(2, 3, 64, 64))
    means = torch.stack([norm.running_mean for norm in norms])
    assert means.abs().sum(dim=1).gt(0).all() and len(means.unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_tower_convs": -1}, "model.shared_tower_convs must be >= 0, got -1"),
        ({"tower_deformable": True, "tower_convs": 0}, "needs model.tower_convs >= 1"),
        ({"batch_norm_eps": -1.0}, "model.batch_norm_eps must be >= 0 and below 1, got -1.0"),
        ({"stride_in": "1x1"}, "model.stride_in must be '3x3' for resnet10_half"),
        ({"deformable_stages": (2,)}, r"model.deformable_stages must be \(\) for resnet10_half"),
        ({"backbone": "resnet50", "deformable_stages": (0,)}, r"must lie in 1..4, got \(0,\)"),
        ({"deformable_interval": 0}, "model.deformable_interval must be >= 1, got 0"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize("resize", ["round", "torchvision"])
def test_colors(resize: Any) -> None:
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    sizes = {"min_sizes": (32,), "max_size": 48, "resize": resize}
    mean, std = (102.9801, 115.9465, 122.7717), (1.0, 2.0, 4.0)
    data = DataConfig(color_order="bgr", pixel_range=255, mean=mean, std=std, **sizes)
    found = prepare_image(image, data)
    blue = image[2].float()
    torch.testing.assert_close(found[0], blue - 102.9801, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[2], (image[0].float() - 122.7717) / 4)
    # the same pixels in 0..1 and RGB
    unit = DataConfig(
        mean=tuple(m / 255 for m in mean[::-1]), std=tuple(s / 255 for s in std[::-1]), **sizes
    )
    torch.testing.assert_close(found, prepare_image(image, unit).flip(0), rtol=1e-4, atol=1e-3)


def test_clip_after_nms() -> None:
    """Two boxes that differ outside the image alone: the same box once they are cut off."""
    logits = torch.full((1, 1, 8, 8), -20.0)
    ltrb = torch.ones(1, 4, 8, 8)
    logits[0, 0, 0, 0], logits[0, 0, 0, 1] = 4.0, 3.0
    ltrb[0, :, 0, 0] = torch.tensor([4.0, 4.0, 20.0, 20.0])
    ltrb[0, :, 0, 1] = torch.tensor([200.0, 200.0, 12.0, 20.0])
    # and one beyond the border
    logits[0, 0, 7, 7], ltrb[0, :, 7, 7] = 5.0, torch.tensor([1.0, 1.0, 2.0, 2.0])
    predictions = Predictions([logits], [ltrb], [torch.full((1, 1, 8, 8), 9.0)])
    model = replace(SMALL, strides=(8,), size_ranges=((0, 9),), normalize_ltrb=False)
    sizes = torch.tensor([[32, 40]])

    def detect(clip: Any, keep_empty: bool) -> Any:
        config = PostprocessConfig(clip=clip, keep_empty=keep_empty)
        return postprocess(predictions, sizes, 2 * sizes, model, config)

    before = detect("before_nms", False)
    assert before.counts.tolist() == [1]
    after = detect("after_nms", True)
    assert after.counts.tolist() == [2]
    assert after.boxes[0, :2].tolist() == [[0, 0, 48, 48], [0, 0, 48, 48]]
    assert after.labels[0].tolist() == [0, 0] + [-1] * 98
    assert (after.scores[0, :2].diff() < 0).all() and not after.scores[0, 2:].any()
    assert not after.boxes[0, 2:].any()
