"""Every setting of the detector, its data and its training, as plain frozen dataclasses.

The text under a field is its documentation and its ``--help``. A run folder holds the resolved
settings as ``config.yaml``; a checkpoint holds them too, so that it is enough to predict with.
This module imports neither torch nor anything heavy: the command line starts from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Backbone = Literal[
    "resnet10_half",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "mobilenet_v2",
    "dla34",
    "vovnet57",
    "vovnet39_ese",
    "vovnet57_ese",
    "vovnet99_ese",
    "hrnet_w18",
    "hrnet_w32",
    "hrnet_w40",
]
TowerNorm = Literal["group", "batch", "level_batch", "none"]


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


@dataclass(frozen=True)
class ModelConfig:
    """The network, and what its locations are trained to predict."""

    num_classes: int | None = None
    """Object classes, without background. None: as many as the training annotations have."""
    backbone: Backbone = "resnet50"
    """ResNet, ResNeXt or MobileNetV2 of torchvision; DLA, VoVNet or HRNet, which need the package
    timm (pip install 'fcos[timm]'); resnet10_half is a small one for CPUs."""
    backbone_weights: str = "imagenet"
    """"imagenet" (torchvision's or timm's, downloaded once), "none", or the path of a state dict
    with their names."""
    frozen_batch_norm: bool = True
    """Batch norm as a fixed scale and shift; False trains it (for training from scratch)."""
    batch_norm_eps: float = 1e-5
    """Added to the variances of the backbone's batch norms."""
    stride_in: Literal["3x3", "1x1"] = "3x3"
    """The convolution of a bottleneck block that halves the resolution: the 3x3 as in torchvision,
    or the first 1x1 as in the ResNets of Caffe and MSRA."""
    deformable_stages: tuple[int, ...] = ()
    """Stages of a bottleneck ResNet (1 to 4 for layer1 to layer4) whose 3x3 convolutions are
    deformable: DCNv2, https://arxiv.org/abs/1811.11168."""
    deformable_interval: int = 1
    """Only every so many-th block of those stages is, starting with the first."""
    frozen_stages: int = 2
    """Backbone stages that are not trained: 0 none, 1 the stem, 2 the stem and layer1, 5 all."""
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Stride of each feature level in pixels: P3, P4, P5 and one more for each extra level."""
    size_ranges: tuple[tuple[float, float], ...] = (
        (0, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, math.inf),
    )
    """Per level, the range in pixels that max(l, t, r, b) must fall into."""
    boundary: Literal["inclusive", "strict", "half_open"] = "inclusive"
    """Whether a size range contains its ends: both, neither, or only the lower one."""
    center_sampling_radius: float = 1.5
    """Positives lie within radius * stride of the box centre; 0: anywhere inside the box."""
    ties: Literal["exact", "torchvision"] = "exact"
    """Which of several boxes a location learns: the smallest; or, by torchvision's arithmetic, the
    first whose area is within some 8 square pixels of the smallest, and none from 1e8 on."""
    corners: Literal["edges", "pixels"] = "edges"
    """Where boxes end: at their right and lower edges, x + width; or, as the original code has it,
    at their last pixels, x + width - 1. That is then what is scaled, learned, predicted and cut off
    at the border of the image, and sides have 1 added in areas, in overlaps and in results: those
    end at edges either way."""
    locations: Literal["half_stride", "torchvision"] = "half_stride"
    """Where the locations of a level are: at stride / 2 + stride * index; or as torchvision has it,
    from 0 in steps of padded image size // level size, which for P6 and P7 vary with the padding,
    and so with the other images of a batch."""
    fpn_channels: int = 256
    """Channels of the feature pyramid and of the head."""
    p6_source: Literal["p5", "c5"] = "p5"
    """What the first of the extra levels is made from: P5, or the backbone's last stage. With an
    HRNet all levels are made from all of its branches."""
    shared_tower_convs: int = 0
    """3x3 convolutions that both towers have in common, before them."""
    tower_convs: int = 4
    """3x3 convolutions in each of the head's two towers."""
    tower_norm: TowerNorm = "group"
    """After each convolution of the towers: group norm with 32 groups, batch norm, batch norm with
    parameters and statistics of its own for each level, or none."""
    tower_bias: bool = True
    """Whether the convolutions of the towers have a bias."""
    tower_deformable: bool = False
    """The last convolution of each of the two towers is deformable (DCNv2)."""
    activation: Literal["exp", "relu"] = "relu"
    """Makes the predicted distances non-negative."""
    normalize_ltrb: bool = True
    """Predict distances in units of the level's stride instead of pixels."""
    trainable_scales: bool = True
    """One trainable factor a level on the box branch, before the activation."""
    centerness_branch: Literal["cls", "box"] = "box"
    """The tower that the centerness is predicted from."""
    prior_probability: float = 0.01
    """Class score of every location before training."""


@dataclass(frozen=True)
class LossConfig:
    """The training loss: focal + box + centerness, each with weight 1."""

    focal_alpha: float = 0.25
    """Weight of a positive in the focal loss; a negative has 1 - alpha."""
    focal_gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    box_loss: Literal["iou", "linear_iou", "giou", "diou", "ciou"] = "giou"
    """Overlap loss between predicted and true box."""
    iou_smooth: float = 0.0
    """Added to intersection and union of the two boxes, in the unit of the distances. 1 in the
    authors' code: little where that is the pixel, and much where it is the stride."""
    box_weights: Literal["centerness", "none"] = "centerness"
    """Weigh each location's box loss by its centerness target, or all alike; the paper weighs."""
    quality: Literal["centerness", "iou"] = "centerness"
    """What the centerness branch learns: the centerness, or the overlap of the predicted box with
    the true one. The authors' later code has "iou" together with box_weights "none"."""
    normalizer: Literal["all_reduced", "local", "moving"] = "all_reduced"
    """What sums of losses are divided by: the positives of the step's whole batch; or each process
    by those of its own images, so that the result depends on how the batch is split; or, as in
    detectron2, by a moving average of the latter, from 300 with decay 0.9."""


@dataclass(frozen=True)
class PostprocessConfig:
    """From the network's outputs to detections."""

    score_threshold: float = 0.05
    """Scores up to this one are dropped."""
    threshold_on: Literal["class", "final"] = "class"
    """Which score that is: the class score before it meets the centerness, or the final score."""
    topk_candidates: int = 1000
    """Best candidates kept per level and image."""
    topk_by: Literal["final", "class"] = "final"
    """Best by which score: the final one, or that of the class, as in mmdetection. What follows
    goes by the final score either way."""
    iou_threshold: float = 0.6
    """Of two boxes of one class that overlap by more, the lower-scored one is dropped."""
    max_detections: int = 100
    """Best detections kept per image."""
    keep_empty: bool = False
    """Keep boxes without area, such as those that lie outside the image, as torchvision does."""
    overlaps: Literal["exact", "torchvision", "edges"] = "exact"
    """Overlaps of the boxes; or of the boxes of each class moved to a place of their own, which
    rounds them: what torchvision compares for up to 1,000 candidates (25,000 on a GPU); or, where
    boxes end at their last pixels, as if those were edges."""
    score: Literal["sqrt", "product"] = "sqrt"
    """Final score: sqrt(class score * centerness), or the product itself. The order is the same."""
    clip: Literal["before_nms", "after_nms"] = "before_nms"
    """When boxes are cut off at the border of the image, and dropped if nothing is left."""


@dataclass(frozen=True)
class DataConfig:
    """Images, annotations and how they are presented to the network."""

    train_annotations: Path | None = None
    """COCO JSON of the training images."""
    train_images: Path | None = None
    """Folder that the training file names are relative to. None: "images" beside the JSON,
    or the JSON's own folder."""
    val_annotations: Path | None = None
    """COCO JSON to evaluate on. None: training runs without evaluation."""
    val_images: Path | None = None
    """Folder of the validation images; None as for train_images."""
    min_sizes: tuple[int, ...] = (800,)
    """Shorter side in pixels after resizing. Training draws one of these for each image;
    evaluation uses the last."""
    max_size: int = 1333
    """The longer side is never resized beyond this."""
    resize: Literal["round", "truncate", "torchvision", "opencv"] = "round"
    """How: to the nearest whole pixels, antialiased; truncated, as the original code has it, where
    the longer side follows from the shorter one; as in torchvision's detectors, rounded down and
    without antialiasing, after normalisation; or to the nearest whole pixels as OpenCV does it,
    without antialiasing, to the bit."""
    padding: Literal["multiple", "beyond"] = "multiple"
    """Sides of batches are the next multiples of 32 that hold their images; or, as in rosinality's
    code, the next ones beyond: 832 for 800."""
    image_shapes: tuple[tuple[int, int], ...] = ()
    """Heights and widths that batches are padded to, each to the smallest that fits. (): as large
    as its images need, by the rule above."""
    flip_probability: float = 0.5
    """Chance of a horizontal flip in training."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue in training."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels that the network sees."""
    pixel_range: Literal[1, 255] = 1
    """Values of its pixels run from 0 to this one, before the next two."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, in the order of color_order."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides them afterwards."""
    workers: int = 4
    """Loader processes per training process; 0 loads in the training process itself."""
    group_by_aspect_ratio: bool = True
    """Fill a batch with images that are all upright or all wide, which saves padding."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    output: Path | None = None
    """Run folder. None: runs/<preset>-<date>-<time>."""
    iterations: int = 90_000
    """Optimiser steps."""
    batch_size: int = 16
    """Images a step, over all processes and accumulation steps together."""
    accumulation: int = 1
    """Split each step's images into this many forward and backward passes, to save memory.
    The normalisers are shared, so the result is that of one pass."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum is the paper's; AdamW learns faster from scratch on little data."""
    learning_rate: float = 0.01
    """Peak learning rate, for the batch size above."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On weights of convolutions; norms, biases and scales have none."""
    warmup_iterations: int = 500
    """Steps before the learning rate reaches its peak."""
    warmup: Literal["constant", "linear"] = "constant"
    """Constant at, or linearly up from, warmup_factor times the peak."""
    warmup_factor: float = 1 / 3
    """See warmup."""
    schedule: Literal["step", "cosine"] = "step"
    """Divide by ten at each milestone, or fall to zero along half a cosine."""
    milestones: tuple[float, ...] = (60_000 / 90_000, 80_000 / 90_000)
    """Fractions of the iterations at which "step" divides the learning rate by ten."""
    clip_gradient_norm: float = 0.0
    """Scale the gradient down to this global norm; 0: never."""
    ema_decay: float = 0.0
    """Evaluate and keep a moving average of the weights, with this decay; 0: the weights."""
    amp: Literal["none", "bf16"] = "none"
    """bf16: run the network under bfloat16 autocast. Losses are float32 either way."""
    compile: bool = False
    """torch.compile the network."""
    graph: bool = False
    """Record each training step as a CUDA graph and replay it, which leaves the CPU nearly nothing
    to do. Batches are padded to few shapes (data.image_shapes, or nine that are derived from the
    sizes). For one process on a GPU."""
    channels_last: bool = False
    """Keep images and convolution weights in channels_last memory format."""
    eval_every: int = 5_000
    """Evaluate and save after this many iterations, and at the end."""
    log_every: int = 20
    """Iterations between two lines of metrics.csv."""
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""
    device: str = "auto"
    """"auto": the GPU if there is one; else as torch names it: "cpu", "cuda", "cuda:1", "mps"."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
