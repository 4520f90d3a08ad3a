"""The backbone: networks of torchvision, their ImageNet weights, and the feature pyramid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import URLError

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.misc import FrozenBatchNorm2d

from .config import ConfigError, ModelConfig
from .deformable import DeformableConv2d
from .high_resolution import HighResolutionBackbone
from .timm_backbones import NETWORKS, timm_trunk
from .trunk import Stages, Trunk, load_weights, weights_from_file

Norm = Callable[[int], nn.Module]

# The stages in the order in which they can be frozen.
STAGES: Stages = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
# Those of MobileNetV2 end where its resolution is halved next.
MOBILENET_STAGES: Stages = tuple(
    tuple(map(str, range(first, end))) for first, end in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 18))
)
#: Backbones of blocks of 1x1, 3x3 and 1x1 convolutions.
BOTTLENECKS = ("resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d")
# Of weights published for them, what classifies.
_CLASSIFIERS = ("fc.", "classifier.")


def build_backbone(config: ModelConfig, pretrained: bool) -> nn.Module:
    """The configured trunk with a feature pyramid on C3, C4 and C5; its ``body`` and its ``fpn``.

    Args:
        config: which trunk, which weights, what is frozen.
        pretrained: load ``config.backbone_weights``.

    Raises:
        ConfigError: the weights cannot be had, or do not fit.
    """
    if config.backbone in NETWORKS:
        trunk = timm_trunk(config, pretrained)
    else:
        trunk = _torchvision_trunk(config, pretrained)
    for stage in trunk.stages[: config.frozen_stages]:
        for name in stage:
            trunk.body.get_submodule(name).requires_grad_(False)
    if not trunk.taps:
        return HighResolutionBackbone(trunk, config.fpn_channels, len(config.strides))
    return BackboneWithFPN(
        trunk.body,
        return_layers=dict(zip(trunk.taps, ("p3", "p4", "p5"), strict=True)),
        in_channels_list=list(trunk.channels),
        out_channels=config.fpn_channels,
        # the pyramid's own default would append a pooled level
        extra_blocks=ExtraLevels(
            config.fpn_channels,
            len(config.strides) - 3,
            trunk.channels[-1] if config.p6_source == "c5" else None,
        ),
    )


def _torchvision_trunk(config: ModelConfig, pretrained: bool) -> Trunk:
    kind = FrozenBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d
    norm: Norm = partial(kind, eps=config.batch_norm_eps)
    if config.backbone == "resnet10_half":
        body: nn.Module = ResNet10Half(norm)
    else:
        body = get_model(config.backbone, weights=None, norm_layer=norm)
    if pretrained and config.backbone_weights != "none":
        if config.backbone_weights == "imagenet":
            state = _imagenet_weights(config.backbone)
        else:
            state = weights_from_file(Path(config.backbone_weights))
        load_weights(body, state, config, "torchvision", _CLASSIFIERS)
    if config.backbone == "mobilenet_v2":
        body = body.get_submodule("features")
        return Trunk(body, MOBILENET_STAGES, (32, 96, 320), ("6", "13", "17"))
    channels = (128, 256, 512) if isinstance(body, ResNet) else (64, 128, 256)
    if config.backbone in BOTTLENECKS:
        channels = (512, 1024, 2048)
        _adapt_bottlenecks(body, config)
    return Trunk(body, STAGES, channels, ("layer2", "layer3", "layer4"))


def _adapt_bottlenecks(trunk: nn.Module, config: ModelConfig) -> None:
    """Strides and deformable convolutions as configured, after the weights were loaded."""
    for stage in range(1, 5):
        for i, block in enumerate(trunk.get_submodule(f"layer{stage}").children()):
            if not isinstance(block, Bottleneck):
                raise TypeError(f"{config.backbone}: {type(block).__name__} is no bottleneck")
            if config.stride_in == "1x1":
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
            if stage in config.deformable_stages and i % config.deformable_interval == 0:
                block.conv2 = DeformableConv2d.from_conv(block.conv2)


class ResNet10Half(nn.Sequential):
    """ResNet-18's plan with one block a stage and half the channels, for training on a CPU.

    A seventh of its arithmetic. He et al., https://arxiv.org/abs/1512.03385.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(32)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(32, 32, 1, norm)
        self.layer2 = _stage(32, 64, 2, norm)
        self.layer3 = _stage(64, 128, 2, norm)
        self.layer4 = _stage(128, 256, 2, norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm)


class ExtraLevels(ExtraFPNBlock):
    """Coarser levels on top: P6 = conv(P5), P7 = conv(relu(P6)), and so on, each stride 2.

    Args:
        channels: of the levels.
        levels: how many to add.
        c5_channels: P6 is made from C5, which has as many; None: from P5.
    """

    def __init__(self, channels: int, levels: int, c5_channels: int | None = None) -> None:
        super().__init__()
        self.names = [f"p{6 + level}" for level in range(levels)]
        self.from_c5 = c5_channels is not None
        inputs = channels if c5_channels is None else c5_channels
        for name in self.names:
            conv = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
            inputs = channels
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.add_module(name, conv)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        for i, name in enumerate(self.names):
            below = x[-1] if self.from_c5 else results[-1]
            results.append(self.get_submodule(name)(below if i == 0 else results[-1].relu()))
            names.append(name)
        return results, names


def _imagenet_weights(backbone: str) -> dict[str, Tensor]:
    if backbone == "resnet10_half":
        raise ConfigError(
            f"model.backbone {backbone} has no ImageNet weights: set model.backbone_weights to "
            "none or to a file"
        )
    weights = list(get_model_weights(backbone))
    # The first set published, whose results the detectors of the literature start from.
    first = next((w for w in weights if w.name == "IMAGENET1K_V1"), weights[0])
    try:
        state: dict[str, Tensor] = first.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"the ImageNet weights of {backbone} could not be downloaded ({error}). Without a "
            f"connection, fetch {first.url} elsewhere and set model.backbone_weights to that "
            "file, or set it to none to train from scratch"
        ) from error
    return state
