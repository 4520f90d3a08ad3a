"""The values that settings may have. Types are checked in config.py, the network's in model.py."""

from __future__ import annotations

import math

from .config import Config, ConfigError


def check(config: Config, world_size: int = 1, device: str = "cpu") -> None:
    """Raises ConfigError for settings that no training can have.

    Args:
        config: all settings.
        world_size: processes that share a batch.
        device: type of the device they train on.
    """
    train, data, loss, post = config.train, config.data, config.loss, config.postprocess
    share = world_size * train.accumulation
    rules = [
        ("train.iterations", train.iterations >= 1, ">= 1"),
        ("train.accumulation", train.accumulation >= 1, ">= 1"),
        (
            "train.batch_size",
            train.batch_size >= 1 and train.batch_size % max(1, share) == 0,
            f"a positive multiple of processes x accumulation = {share}",
        ),
        ("train.learning_rate", 0 < train.learning_rate < math.inf, "positive"),
        ("train.momentum", 0 <= train.momentum < 1, ">= 0 and below 1"),
        ("train.weight_decay", 0 <= train.weight_decay < math.inf, ">= 0"),
        ("train.warmup_iterations", train.warmup_iterations >= 0, ">= 0"),
        ("train.warmup_factor", 0 <= train.warmup_factor <= 1, "between 0 and 1"),
        ("train.milestones", all(0 < m <= 1 for m in train.milestones), "fractions in 0..1"),
        ("train.clip_gradient_norm", train.clip_gradient_norm >= 0, ">= 0"),
        ("train.ema_decay", 0 <= train.ema_decay < 1, ">= 0 and below 1"),
        ("train.eval_every", train.eval_every >= 1, ">= 1"),
        ("train.log_every", train.log_every >= 1, ">= 1"),
        ("train.seed", train.seed >= 0, ">= 0"),
        ("train.threads", train.threads >= 0, ">= 0"),
        (
            "data.min_sizes",
            bool(data.min_sizes) and all(size >= 1 for size in data.min_sizes),
            "one or more numbers of pixels",
        ),
        (
            "data.image_shapes",
            all(side >= 32 and side % 32 == 0 for shape in data.image_shapes for side in shape),
            "pairs of multiples of 32",
        ),
        ("data.max_size", data.max_size >= 1, ">= 1"),
        ("data.flip_probability", 0 <= data.flip_probability <= 1, "between 0 and 1"),
        ("data.mean", all(map(math.isfinite, data.mean)), "finite"),
        ("data.std", all(0 < s < math.inf for s in data.std), "positive"),
        ("data.workers", data.workers >= 0, ">= 0"),
        ("loss.focal_alpha", 0 <= loss.focal_alpha <= 1, "between 0 and 1"),
        ("loss.focal_gamma", 0 <= loss.focal_gamma < math.inf, ">= 0"),
        ("loss.iou_smooth", 0 <= loss.iou_smooth < math.inf, ">= 0"),
        ("postprocess.score_threshold", 0 <= post.score_threshold < 1, ">= 0 and below 1"),
        ("postprocess.topk_candidates", post.topk_candidates >= 1, ">= 1"),
        ("postprocess.iou_threshold", 0 <= post.iou_threshold <= 1, "between 0 and 1"),
        ("postprocess.max_detections", post.max_detections >= 1, ">= 1"),
    ]
    for name, holds, rule in rules:
        if not holds:
            section, _, field = name.partition(".")
            value = getattr(getattr(config, section), field)
            raise ConfigError(f"{name} must be {rule}, got {value}")
    if train.graph and (device != "cuda" or world_size > 1):
        raise ConfigError(
            "train.graph needs one process on a GPU, got "
            f"{world_size} on {device}; train.compile works anywhere"
        )
    model = config.model
    if model.backbone_weights == "imagenet" and data.color_order == "bgr":
        raise ConfigError(
            "data.color_order is bgr, but model.backbone_weights is imagenet: torchvision's or "
            "timm's, which know RGB; set model.backbone_weights to a file of weights that were "
            "trained on BGR"
        )
    if model.backbone_weights == "none" and model.frozen_stages:
        raise ConfigError(
            f"model.frozen_stages is {model.frozen_stages}, but model.backbone_weights is none: "
            "random stages would never be trained; set model.frozen_stages to 0 (and "
            "model.frozen_batch_norm to False)"
        )
