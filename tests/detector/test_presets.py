"""The named settings say what the publications say."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fcos.config import Config, ConfigError
from fcos.limits import check
from fcos.presets import PRESETS, improved, paper, tiny, torchvision


def test_names() -> None:
    assert list(PRESETS)[:4] == ["improved", "paper", "tiny", "torchvision"]
    assert all(isinstance(preset(), Config) and preset.__doc__ for preset in PRESETS.values())


def test_paper() -> None:
    """arXiv 1904.01355, sections 3.1 to 4."""
    config = paper()
    model, train = config.model, config.train
    assert model.backbone == "resnet50" and model.strides == (8, 16, 32, 64, 128)
    assert [high for _, high in model.size_ranges] == [64, 128, 256, 512, math.inf]
    assert (model.activation, model.trainable_scales, model.normalize_ltrb) == ("exp", True, False)
    assert (model.centerness_branch, model.center_sampling_radius) == ("cls", 0)
    assert (config.loss.box_loss, config.loss.focal_alpha, config.loss.focal_gamma) == (
        "iou",
        0.25,
        2.0,
    )
    assert (train.optimizer, train.learning_rate, train.momentum) == ("sgd", 0.01, 0.9)
    assert (train.weight_decay, train.batch_size, train.iterations) == (1e-4, 16, 90_000)
    post = config.postprocess
    assert (post.score_threshold, post.topk_candidates, post.iou_threshold) == (0.05, 1000, 0.6)
    assert (config.data.min_sizes, config.data.max_size) == ((800,), 1333)


def test_improved_differs_from_paper_in_the_improvements_alone() -> None:
    a, b = improved(), paper()
    assert (a.data, a.train, a.postprocess) == (b.data, b.train, b.postprocess)
    differ = {name for name in vars(a.model) if getattr(a.model, name) != getattr(b.model, name)}
    assert differ == {
        "center_sampling_radius",
        "normalize_ltrb",
        "activation",
        "centerness_branch",
    }
    assert (a.model.activation, a.model.centerness_branch) == ("relu", "box")
    assert a.model.center_sampling_radius == 1.5 and a.model.normalize_ltrb
    assert a.loss.box_loss == "giou"


def test_torchvision() -> None:
    """What its parity test does not see: the recipe, as torchvision's reference scripts have it."""
    train = torchvision().train
    assert (train.batch_size, train.learning_rate, train.weight_decay) == (16, 0.01, 1e-4)
    epochs = train.iterations * train.batch_size / 117_266
    assert epochs == pytest.approx(26, abs=0.01)
    assert [m * epochs for m in train.milestones] == pytest.approx([16, 22], abs=0.01)
    assert (train.warmup, train.warmup_iterations, train.warmup_factor) == ("linear", 1000, 0.001)
    assert torchvision().model.frozen_stages == 2  # of torchvision's five, three are trained


def test_tiny_needs_no_download() -> None:
    model = tiny().model
    assert model.backbone_weights == "none"
    assert not model.frozen_batch_norm and not model.frozen_stages


def test_dialects_read_pictures_as_caffe_did() -> None:
    for name in set(list(PRESETS)[4:]) - {"rosinality"}:
        data = PRESETS[name]().data
        assert (data.color_order, data.pixel_range, data.std) == ("bgr", 255, (1, 1, 1)), name
        assert PRESETS[name]().model.stride_in == "1x1", name
        # the ImageNet weights of torchvision know nothing of that
        with pytest.raises(ConfigError, match="data.color_order is bgr"):
            check(PRESETS[name]())


def test_mmdet_is_the_original_but_for_its_own_choices() -> None:
    a, b = PRESETS["original"](), PRESETS["mmdet"]()
    differ = {name for name in vars(a.model) if getattr(a.model, name) != getattr(b.model, name)}
    assert differ == {"tower_bias", "batch_norm_eps", "corners"}
    assert a.data == replace(b.data, resize="truncate") and b.postprocess.score == "product"


IMAGENET, CAFFE = (103.53, 116.28, 123.675), (102.9801, 115.9465, 122.7717)
RGB = (0.485, 0.456, 0.406)
#: What differs between the checkpoints of the code bases, row by row.
ROWS: dict[str, dict[str, Any]] = {
    "original": {
        "model": ("exp", False, True, "cls", True, "half_stride", "1x1", 0.0, "inclusive", 0.0),
        "ends": ("pixels", "exact", "before_nms", False),
        "loss": ("iou", 1.0, "centerness", "all_reduced"),
        "post": (0.05, "class", "sqrt", "final", 0.6),
        "data": ("bgr", 255, CAFFE, "truncate", "multiple"),
    },
    "original-imprv": {
        "model": ("relu", True, True, "box", True, "half_stride", "1x1", 0.0, "inclusive", 1.5),
        "ends": ("pixels", "exact", "before_nms", False),
        "loss": ("giou", 1.0, "centerness", "all_reduced"),
        "post": (0.05, "class", "sqrt", "final", 0.6),
        "data": ("bgr", 255, CAFFE, "truncate", "multiple"),
    },
    "adelaidet": {
        "model": ("relu", True, True, "box", True, "half_stride", "1x1", 1e-5, "inclusive", 1.5),
        "ends": ("edges", "exact", "after_nms", True),
        "loss": ("giou", 1.0, "centerness", "all_reduced"),
        "post": (0.05, "class", "sqrt", "final", 0.6),
        "data": ("bgr", 255, IMAGENET, "round", "multiple"),
    },
    "detectron2": {
        "model": ("relu", True, False, "box", True, "half_stride", "1x1", 1e-5, "strict", 1.5),
        "ends": ("edges", "exact", "after_nms", True),
        "loss": ("giou", 0.0, "none", "moving"),
        "post": (0.2, "final", "sqrt", "final", 0.6),
        "data": ("bgr", 255, IMAGENET, "round", "multiple"),
    },
    "torchvision": {
        "model": ("relu", True, False, "box", True, "torchvision", "3x3", 1e-5, "strict", 1.5),
        "ends": ("edges", "torchvision", "before_nms", True),
        "loss": ("giou", 0.0, "none", "local"),
        "post": (0.2, "final", "sqrt", "final", 0.6),
        "data": ("rgb", 1, RGB, "torchvision", "multiple"),
    },
    "mmdet": {
        "model": ("exp", False, True, "cls", False, "half_stride", "1x1", 1e-5, "inclusive", 0.0),
        "ends": ("edges", "exact", "before_nms", False),
        "loss": ("iou", 0.0, "centerness", "all_reduced"),
        "post": (0.05, "class", "product", "class", 0.5),
        "data": ("bgr", 255, CAFFE, "opencv", "multiple"),
    },
    "mmdet-tricks": {
        "model": ("relu", True, True, "box", True, "half_stride", "1x1", 1e-5, "inclusive", 1.5),
        "ends": ("edges", "exact", "before_nms", False),
        "loss": ("giou", 0.0, "centerness", "all_reduced"),
        "post": (0.05, "class", "product", "class", 0.6),
        "data": ("bgr", 255, IMAGENET, "opencv", "multiple"),
    },
}
ROWS["rosinality"] = {
    "model": ("exp", False, True, "cls", False, "half_stride", "3x3", 1e-5, "inclusive", 1.5),
    "ends": ("pixels", "edges", "before_nms", True),
    "loss": ("giou", 1.0, "centerness", "local"),
    "post": (0.05, "class", "sqrt", "final", 0.6),
    "data": ("rgb", 1, (0.40789654, 0.44719302, 0.47026115), "truncate", "beyond"),
}
ROWS["adelaidet-rt"] = ROWS["adelaidet"]
ROWS["adelaidet-iou"] = ROWS["adelaidet"] | {"loss": ("giou", 1.0, "none", "all_reduced")}


@pytest.mark.parametrize("name", ROWS)
def test_dialects_have_the_rows_of_their_table(name: str) -> None:
    config = PRESETS[name]()
    model, loss, post, data = config.model, config.loss, config.postprocess, config.data
    assert {
        "model": (
            model.activation,
            model.normalize_ltrb,
            model.trainable_scales,
            model.centerness_branch,
            model.tower_bias,
            model.locations,
            model.stride_in,
            model.batch_norm_eps,
            model.boundary,
            model.center_sampling_radius,
        ),
        "ends": (model.corners, post.overlaps, post.clip, post.keep_empty),
        "loss": (loss.box_loss, loss.iou_smooth, loss.box_weights, loss.normalizer),
        "post": (
            post.score_threshold,
            post.threshold_on,
            post.score,
            post.topk_by,
            post.iou_threshold,
        ),
        "data": (data.color_order, data.pixel_range, data.mean, data.resize, data.padding),
    } == ROWS[name]
    # the same in all of them
    assert loss.quality == ("iou" if name == "adelaidet-iou" else "centerness")
    assert model.p6_source == ("c5" if name == "rosinality" else "p5")
    assert model.tower_norm == "group"
    assert (post.topk_candidates, post.max_detections) == (1000, 100)
    assert (loss.focal_alpha, loss.focal_gamma, model.prior_probability) == (0.25, 2.0, 0.01)
    assert model.ties == ("torchvision" if model.boundary == "strict" else "exact")
    assert model.size_ranges[-1][1] == math.inf and model.size_ranges[0] == (0, 64)
    stds = {
        "torchvision": (0.229, 0.224, 0.225),
        "rosinality": (0.28863828, 0.27408164, 0.27809835),
    }
    assert data.std == stds.get(name, (1, 1, 1))
    levels = 3 if name == "adelaidet-rt" else 5
    assert len(model.strides) == len(model.size_ranges) == levels
