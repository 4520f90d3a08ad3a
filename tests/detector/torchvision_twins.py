"""A torchvision FCOS and ours with the same random weights, and what both are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from fcos.config import Config
from fcos.convert import torchvision as converter
from fcos.data.batches import Batch, Sample, collate
from fcos.data.transforms import train_transforms
from fcos.model import FCOS

Size = tuple[int, int]


@dataclass
class Twins:
    """The same network twice."""

    theirs: TorchvisionFCOS
    ours: FCOS
    config: Config

    def parameters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Ours and theirs by our names."""
        theirs, _ = converter.to_ours(self.theirs.state_dict(keep_vars=True))
        return {
            name: (parameter, theirs[name])  # type: ignore[dict-item]
            for name, parameter in self.ours.named_parameters()
        }


def make_full(num_classes: int = 91, **options: Any) -> TorchvisionFCOS:
    """What fcos_resnet50_fpn builds for its published weights."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return TorchvisionFCOS(backbone, num_classes, **options)


def make_narrow(num_classes: int = 11, **options: Any) -> TorchvisionFCOS:
    """The same with a smaller ResNet, 64 channels and two convolutions a tower."""
    backbone = BackboneWithFPN(
        resnet18(norm_layer=FrozenBatchNorm2d),
        {"layer2": "0", "layer3": "1", "layer4": "2"},
        [128, 256, 512],
        64,
        extra_blocks=LastLevelP6P7(64, 64),
    )
    head = FCOSHead(64, 1, num_classes, num_convs=2)
    return TorchvisionFCOS(backbone, num_classes, head=head, **options)


def make_twins(theirs: TorchvisionFCOS, seed: int = 0) -> Twins:
    """Random weights in torchvision's network, converted to ours."""
    randomize(theirs, seed)
    state = theirs.state_dict()
    config = converter.config(state)
    transform = theirs.transform
    config = replace(
        config,
        data=replace(
            config.data,
            min_sizes=tuple(transform.min_size),
            max_size=transform.max_size,
            flip_probability=0.0,
        ),
        postprocess=replace(
            config.postprocess,
            score_threshold=theirs.score_thresh,
            iou_threshold=theirs.nms_thresh,
            topk_candidates=theirs.topk_candidates,
            max_detections=theirs.detections_per_img,
        ),
    )
    ours = FCOS(config.model, pretrained_backbone=False)
    ours.load_state_dict(converter.to_ours(state)[0])
    return Twins(theirs, ours, config)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """So that features neither vanish nor explode, scores differ and boxes have all sizes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.dim() == 4:
            gain = 1.5 if name.endswith(("cls_logits.weight", "bbox_reg.weight")) else 1.0
            value.normal_(std=gain * (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.0, generator=generator)
        elif value.is_floating_point():
            value.normal_(std=0.1, generator=generator)
    state = model.state_dict()
    state["head.classification_head.cls_logits.bias"].sub_(3)
    state["head.regression_head.bbox_reg.bias"].add_(2)


def random_images(sizes: Sequence[Size], seed: int = 0) -> list[Tensor]:
    """uint8 [3, H, W] with patches of colour, in which neighbours are alike but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for height, width in sizes:
        patches = torch.rand(1, 3, 9, 9, generator=generator) * 200
        image = nn.functional.interpolate(patches, size=(height, width), mode="bilinear")[0]
        noise = torch.rand(3, height, width, generator=generator) * 55
        images.append((image + noise).to(torch.uint8))
    return images


def as_floats(images: Sequence[Tensor]) -> list[Tensor]:
    """In 0..1, as torchvision's weights say that their model wants them."""
    return [image / 255 for image in images]


def as_batch(images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], data: Any) -> Batch:
    """By our transforms for training."""
    samples = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        height, width = image.shape[1:]
        boxes = tv_tensors.BoundingBoxes(
            target["boxes"],
            format="XYXY",  # type: ignore[arg-type]
            canvas_size=(height, width),
        )
        prepared, found = train_transforms(data)(tv_tensors.Image(image), {"boxes": boxes})
        samples.append(Sample(prepared, found["boxes"], target["labels"], i, (height, width)))
    return collate(samples)
