"""Settings under which other code bases trained and measured FCOS.

Detectors that were converted from their checkpoints carry these. To train with one of them, give it
the backbone weights that it was trained from (``model.backbone_weights``): those of torchvision
expect RGB in 0..1, and halve the resolution in their 3x3 convolutions.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .config import Config, DataConfig, LossConfig, ModelConfig, PostprocessConfig, TrainConfig

Colors = tuple[float, float, float]

# Means of Caffe's ImageNet models, and the rounded ones that others took over; BGR in 0..255.
_CAFFE_MEAN: Colors = (102.9801, 115.9465, 122.7717)
_IMAGENET_MEAN: Colors = (103.53, 116.28, 123.675)
_SHORTER_SIDES = (640, 672, 704, 736, 768, 800)


def original() -> Config:
    """tianzhi0549/FCOS: ResNet-50 of MSRA, distances in pixels, exp, centerness on the class tower.

    Published: 37.1 AP on COCO minival after 90,000 iterations of 16 images (R-101 41.4,
    X-101-32x8d 42.5, X-101-64x4d 43.0 after twice as many; MobileNetV2 33.1, with 128 channels
    30.9). Boxes end at their last pixels, in pictures that PIL resizes to truncated sizes.
    """
    model = ModelConfig(
        stride_in="1x1",
        batch_norm_eps=0.0,
        activation="exp",
        normalize_ltrb=False,
        centerness_branch="cls",
        center_sampling_radius=0.0,
        corners="pixels",
    )
    data = replace(_bgr(_CAFFE_MEAN), resize="truncate")
    return Config(model=model, loss=LossConfig(box_loss="iou", iou_smooth=1.0), data=data)


def original_imprv() -> Config:
    """tianzhi0549/FCOS with its improvements: center sampling, strides as unit, relu, GIoU.

    Published: 38.7 AP on COCO minival with ResNet-50 (R-101 43.0, X-101-32x8d 44.0, X-101-64x4d
    44.7; with deformable convolutions 42.3, 45.6, 46.4 and 46.6).
    """
    config = original()
    model = replace(
        config.model,
        activation="relu",
        normalize_ltrb=True,
        centerness_branch="box",
        center_sampling_radius=1.5,
    )
    return replace(config, model=model, loss=LossConfig(box_loss="giou", iou_smooth=1.0))


def adelaidet() -> Config:
    """aim-uofa/AdelaiDet, FCOS-Detection: boxes are cut off at the border after NMS.

    Published: 38.7 AP on COCO val2017 with R_50_1x (MS_R_50_2x 41.0, MS_R_101_2x 43.1,
    MS_X_101_32x8d_2x 43.9, MS_X_101_64x4d_2x 44.7, with deformable convolutions 46.6). With
    VoVNets, three times as long, 43.5 (V-39), 44.4 (V-57) and 45.2 (V-99): for them add
    ``--model.stride-in 3x3 --model.frozen-stages 0``.
    """
    return Config(
        model=ModelConfig(stride_in="1x1"),
        loss=LossConfig(iou_smooth=1.0),
        postprocess=PostprocessConfig(clip="after_nms", keep_empty=True),
        data=_bgr(_IMAGENET_MEAN),
        train=TrainConfig(warmup="linear", warmup_iterations=1000, warmup_factor=0.001),
    )


def adelaidet_iou() -> Config:
    """AdelaiDet's detector whose centerness learns the IoU of its box; all else is the same.

    Published: 39.4 AP on COCO val2017 with R_50_1x_iou (MS_R_50_2x 41.5, MS_R_101_2x 43.5,
    MS_X_101_32x8d_2x 44.5, with deformable convolutions 47.4).
    """
    config = adelaidet()
    return replace(config, loss=replace(config.loss, quality="iou", box_weights="none"))


def adelaidet_rt() -> Config:
    """AdelaiDet's real-time models: P3 to P5 alone, pictures of 512 x 736.

    Published: 40.2 AP on COCO val2017 with R-50 after 360,000 iterations, 39.3 with batch norm in
    the head; with DLA-34 (``--model.backbone dla34 --model.stride-in 3x3 --model.frozen-stages 0``)
    40.3 and 39.4, and 39.1 and 38.9 with shared towers. In their training the longer side could be
    900 pixels.
    """
    config = adelaidet()
    model = replace(
        config.model, strides=(8, 16, 32), size_ranges=((0, 64), (64, 128), (128, math.inf))
    )
    data = replace(config.data, min_sizes=(*range(256, 609, 32), 512), max_size=736)
    train = replace(config.train, iterations=360_000, milestones=(300 / 360, 340 / 360))
    return replace(config, model=model, data=data, train=train)


def detectron2() -> Config:
    """facebookresearch/detectron2's FCOS: no trainable scales, size ranges without their ends.

    Ties by float32 arithmetic, box losses without weights, a moving average of the positives as
    normaliser, and a threshold of 0.2 on the final score. It publishes neither weights nor AP.
    """
    return Config(
        model=ModelConfig(
            stride_in="1x1", boundary="strict", ties="torchvision", trainable_scales=False
        ),
        loss=LossConfig(box_weights="none", normalizer="moving"),
        postprocess=PostprocessConfig(
            score_threshold=0.2, threshold_on="final", clip="after_nms", keep_empty=True
        ),
        data=replace(_bgr(_IMAGENET_MEAN), min_sizes=_SHORTER_SIDES),
        train=TrainConfig(warmup="linear", warmup_iterations=1000, warmup_factor=0.001),
    )


def mmdet() -> Config:
    """open-mmlab/mmdetection's plain FCOS: as ``original``, no bias in the towers, no square root.

    The best candidates of a level are chosen by class score alone, boxes end at their edges, and
    pictures are resized as by OpenCV, without antialiasing.

    Published: 36.6 AP on COCO val2017 with R-50 caffe 1x (R-101 39.1; multi-scale 2x 38.5 and 40.8;
    X-101-64x4d multi-scale 2x 42.6).
    """
    config = original()
    return replace(
        config,
        model=replace(config.model, tower_bias=False, batch_norm_eps=1e-5, corners="edges"),
        loss=LossConfig(box_loss="iou"),
        postprocess=PostprocessConfig(score="product", topk_by="class", iou_threshold=0.5),
        data=replace(_bgr(_CAFFE_MEAN), resize="opencv"),
        train=TrainConfig(clip_gradient_norm=35.0),
    )


def mmdet_tricks() -> Config:
    """mmdetection's FCOS with center sampling, strides as unit, centerness on the box tower, GIoU.

    All else as in ``mmdet``, but for the mean, and the threshold of NMS.

    Published: 38.7 AP on COCO val2017 with R-50 caffe 1x, 42.3 with deformable convolutions.
    """
    config = original_imprv()
    return replace(
        config,
        model=replace(config.model, batch_norm_eps=1e-5, corners="edges"),
        loss=LossConfig(),
        postprocess=PostprocessConfig(score="product", topk_by="class"),
        data=replace(_bgr(_IMAGENET_MEAN), resize="opencv"),
        train=TrainConfig(warmup="linear"),
    )


def rosinality() -> Config:
    """rosinality/fcos-pytorch: VoVNet-57, P6 from C5, exp of pixels, center sampling, GIoU.

    It publishes neither weights nor AP. The numbers that it normalises RGB with are those of BGR.
    Boxes end at their last pixels, but its NMS compares them as if those were edges. For training,
    it adds the images of a batch to the number of positives that losses are divided by, and its SGD
    has Nesterov's momentum: both are not here.
    """
    model = ModelConfig(
        backbone="vovnet57",
        frozen_stages=0,
        p6_source="c5",
        tower_bias=False,
        activation="exp",
        normalize_ltrb=False,
        centerness_branch="cls",
        corners="pixels",
    )
    data = DataConfig(
        min_sizes=tuple(range(640, 801)),
        resize="truncate",
        padding="beyond",
        mean=(0.40789654, 0.44719302, 0.47026115),
        std=(0.28863828, 0.27408164, 0.27809835),
    )
    train = TrainConfig(
        iterations=175_899,  # 24 times the 117,266 images that have boxes
        warmup_iterations=0,
        milestones=(16 / 24, 22 / 24),
        clip_gradient_norm=10.0,
    )
    loss = LossConfig(normalizer="local", iou_smooth=1.0)
    post = PostprocessConfig(overlaps="edges", keep_empty=True)
    return Config(model=model, loss=loss, postprocess=post, data=data, train=train)


def _bgr(mean: Colors) -> DataConfig:
    return DataConfig(color_order="bgr", pixel_range=255, mean=mean, std=(1.0, 1.0, 1.0))
