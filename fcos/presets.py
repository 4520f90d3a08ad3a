"""Named settings. Each is a function, so that its text can say what to expect from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from . import dialects
from .config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    TrainConfig,
)


def improved() -> Config:
    """ResNet-50 with the authors' later improvements. The default.

    Center sampling, distances in strides, centerness on the box tower, GIoU loss.
    ``fcos train improved --data.train-annotations ANN.json``: COCO's 90,000 iterations of 16
    images, 800 x 1333. The authors report 38.7 AP on COCO minival.
    """
    return Config()


def paper() -> Config:
    """ResNet-50 as in the paper of 2019.

    Locations anywhere inside a box, exp with trainable scales on pixels, centerness on the class
    tower, IoU loss. Same schedule as ``improved``. The authors report 37.1 AP on COCO minival.
    """
    config = Config()
    model = replace(
        config.model,
        center_sampling_radius=0.0,
        normalize_ltrb=False,
        activation="exp",
        centerness_branch="cls",
    )
    return replace(config, model=model, loss=LossConfig(box_loss="iou"))


def tiny() -> Config:
    """A small network that learns from scratch, on a CPU, in minutes.

    A ResNet of ten layers, 64 channels, four levels, AdamW, small images. For the demo, tests, and
    data sets of a few hundred pictures.
    """
    model = ModelConfig(
        backbone="resnet10_half",
        backbone_weights="none",
        frozen_batch_norm=False,
        frozen_stages=0,
        strides=(8, 16, 32, 64),
        size_ranges=((0, 32), (32, 64), (64, 128), (128, math.inf)),
        fpn_channels=64,
        tower_convs=2,
    )
    data = DataConfig(min_sizes=(256,), max_size=448, workers=1)
    train = TrainConfig(
        iterations=1500,
        batch_size=4,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup="linear",
        warmup_iterations=100,
        warmup_factor=0.01,
        schedule="cosine",
        clip_gradient_norm=10.0,
        ema_decay=0.995,
        channels_last=True,
        eval_every=750,
    )
    return Config(model=model, data=data, train=train)


def torchvision() -> Config:
    """torchvision's ``fcos_resnet50_fpn``: its network, losses, images and detections.

    With the same weights and images, float32 results are torchvision's but for rounding. What
    differs from ``improved``: no scales, locations from 0 on a grid that follows the padding, size
    ranges without their ends, ties by float32 arithmetic, box losses without weights, normalisers
    of each process, images resized without antialiasing after normalisation, and a threshold of
    0.2 on the final score.

    torchvision publishes 39.2 AP on COCO val2017 for 26 epochs on 8 GPUs, two images each:
    ``fcos train torchvision --data.train-annotations ANN.json``. Its own run used float16 autocast
    and weight decay on norms and biases too; the classes are here those of the annotations,
    without the 11 outputs of its 91 that stand for nothing.
    """
    model = ModelConfig(
        boundary="strict",
        ties="torchvision",
        locations="torchvision",
        trainable_scales=False,
    )
    loss = LossConfig(box_weights="none", normalizer="local")
    postprocess = PostprocessConfig(
        score_threshold=0.2, threshold_on="final", keep_empty=True, overlaps="torchvision"
    )
    data = DataConfig(resize="torchvision")
    train = TrainConfig(
        iterations=190_560,  # 26 times the 117,266 images that have boxes
        warmup="linear",
        warmup_iterations=1000,
        warmup_factor=0.001,
        milestones=(16 / 26, 22 / 26),
    )
    return Config(model=model, loss=loss, postprocess=postprocess, data=data, train=train)


PRESETS: dict[str, Callable[[], Config]] = {
    "improved": improved,
    "paper": paper,
    "tiny": tiny,
    "torchvision": torchvision,
    "original": dialects.original,
    "original-imprv": dialects.original_imprv,
    "adelaidet": dialects.adelaidet,
    "adelaidet-iou": dialects.adelaidet_iou,
    "adelaidet-rt": dialects.adelaidet_rt,
    "detectron2": dialects.detectron2,
    "mmdet": dialects.mmdet,
    "mmdet-tricks": dialects.mmdet_tricks,
    "rosinality": dialects.rosinality,
}
