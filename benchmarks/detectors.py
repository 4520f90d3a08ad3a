"""The two detectors that are compared as a whole: ours and torchvision's, ResNet-50, 80 classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from fcos.config import Config
from fcos.model import FCOS
from fcos.presets import improved

from . import shapes


def our_config(device: torch.device, graph: bool = False, compile: bool = False) -> Config:
    """``improved``, as one would train it on the device."""
    config = improved()
    on_gpu = device.type == "cuda"
    train = replace(
        config.train,
        amp="bf16" if on_gpu else "none",
        channels_last=True,
        graph=graph,
        compile=compile,
        device=device.type,
    )
    model = replace(config.model, num_classes=shapes.NUM_CLASSES, backbone_weights="none")
    return replace(config, train=train, model=model)


def our_network(config: Config) -> FCOS:
    torch.manual_seed(0)
    network = FCOS(config.model, pretrained_backbone=False)
    tame(network)
    return network


def torchvision_detector() -> TorchvisionFCOS:
    """As ``fcos_resnet50_fpn`` builds it, without weights to download.

    Its own resizing and normalising are not in the figures: images come as they are needed.
    """
    torch.manual_seed(0)
    trunk = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(
        trunk, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    model = TorchvisionFCOS(
        backbone,
        shapes.NUM_CLASSES,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    model.transform.resize = lambda image, target: (image, target)
    tame(model)
    return model


def excite(cls_logits: nn.Module) -> None:
    """Random class scores some hundred or thousand of which pass the threshold, as if trained."""
    with torch.no_grad():
        cls_logits.get_parameter("weight").mul_(5)
        cls_logits.get_parameter("bias").fill_(-7.5)


def tame(network: nn.Module) -> None:
    """Frozen norms with random convolutions would let activations grow beyond reason."""
    for name, buffer in network.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)
