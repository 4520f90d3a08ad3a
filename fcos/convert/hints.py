"""What the weights do not tell, but something beside them: options, the file's name, its notes.

mmdetection keeps the text of its configuration in its checkpoints. It is searched as text alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from fcos.config import Config, DataConfig, PostprocessConfig

from .errors import ConvertError

#: How a ResNet's weights were first trained, which decides where it strides and what it is shown.
Style = Literal["auto", "caffe", "pytorch"]
_STYLES = ("caffe", "pytorch")
_WHAT = {
    "caffe": "strides in 1x1 convolutions, BGR",
    "pytorch": "strides in 3x3 convolutions, RGB",
}
# In some of these a ResNet may be of either style; it has no other backbones that may.
_BOTH_STYLES = ("adelaidet", "detectron2", "mmdet")
_RESNETS = ("resnet50", "resnet101")


class Hints(NamedTuple):
    """Beside the weights of a file."""

    file_name: str
    notes: str = ""
    """mmdetection's configuration, as text."""
    style: Style = "auto"
    """As the user says."""

    def has_word(self, *words: str) -> bool:
        """Whether the file's name has one of them."""
        return not set(words).isdisjoint(re.split(r"[^a-z0-9]+", self.file_name.lower()))


def with_hints(
    family: str, state: Mapping[str, Tensor], config: Config, hints: Hints
) -> tuple[Config, list[str]]:
    """The settings, and which of them are taken for granted, or from hints.

    Args:
        family: the code base.
        state: its weights.
        config: what they tell.
        hints: what else there is.

    Raises:
        ConvertError: the hints do not go with the weights.
    """
    assumed: list[str] = []
    if family == "mmdet":
        config = _mmdet(config, hints.notes, assumed)
    if family == "adelaidet":
        config = _adelaidet(config, hints, assumed)
    either = family in _BOTH_STYLES and config.model.backbone in _RESNETS
    if not either:
        if hints.style != "auto":
            raise ConvertError(
                f"--style {hints.style}: is for the ResNet-50 and -101 of "
                f"{', '.join(_BOTH_STYLES)}, not for {config.model.backbone} of {family}"
            )
        return config, assumed
    style, reason = _style(family, state, hints)
    if hints.style == "auto":
        assumed.append(f"a ResNet of {style}'s style ({_WHAT[style]}), {reason}")
    if style == "pytorch":
        data = pytorch_colors(config.data)
        if "pixel_mean" in state:  # then its numbers are there already
            data = replace(data, mean=config.data.mean, std=config.data.std)
        config = replace(config, model=replace(config.model, stride_in="3x3"), data=data)
    return config, assumed


def pytorch_colors(data: DataConfig) -> DataConfig:
    """What torchvision's ImageNet weights know, in the numbers of mmdetection and detectron2."""
    return replace(
        data,
        color_order="rgb",
        pixel_range=255,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    )


def _style(family: str, state: Mapping[str, Tensor], hints: Hints) -> tuple[str, str]:
    """Which, and why."""
    if hints.style != "auto":
        return hints.style, ""
    said = re.findall(r"style=['\"](caffe|pytorch)['\"]", hints.notes)
    if said:
        return said[-1], "as its configuration says"
    mean = state.get("pixel_mean")
    if mean is not None and mean.numel() == 3 and not mean.is_meta:
        first, _, last = mean.flatten().tolist()
        return _STYLES[first > last], "as its pixel_mean says"
    if hints.has_word(*_STYLES):
        return _STYLES[hints.has_word("pytorch")], "as the file's name says"
    if family == "mmdet" and hints.has_word("lsj"):
        return "pytorch", "as the file's name says, with lsj"
    if family == "adelaidet":
        return "caffe", "as all of its own are"
    return "caffe", "for lack of a hint; if it is not, give --style pytorch"


def _mmdet(config: Config, notes: str, assumed: list[str]) -> Config:
    """What its locations predict, which a bias in the towers goes with in what it publishes."""
    model, post = config.model, config.postprocess
    if "FCOSHead" not in notes:
        bias = "with" if model.tower_bias else "without"
        what = "relu of strides" if model.normalize_ltrb else "exp of pixels"
        assumed.append(
            f"distances are {what}, centerness is on the {model.centerness_branch} tower, NMS at "
            f"{post.iou_threshold:g}, as in all published models {bias} a bias in the towers"
        )
        return config
    normalized = _flag(notes, "norm_on_bbox")
    model = replace(
        model,
        normalize_ltrb=normalized,
        activation="relu" if normalized else "exp",
        centerness_branch="box" if _flag(notes, "centerness_on_reg") else "cls",
        center_sampling_radius=1.5 if _flag(notes, "center_sampling") else 0.0,
    )
    return replace(config, model=model, postprocess=_mmdet_nms(post, notes))


def _mmdet_nms(post: PostprocessConfig, notes: str) -> PostprocessConfig:
    thresholds = re.findall(r"\biou_thr(?:eshold)?=(0?\.\d+)", notes)
    return replace(post, iou_threshold=float(thresholds[-1])) if thresholds else post


def _flag(notes: str, name: str) -> bool:
    return bool(re.search(rf"\b{name}=True\b", notes))


def _adelaidet(config: Config, hints: Hints, assumed: list[str]) -> Config:
    """What the centerness learned matters to further training alone."""
    if hints.has_word("iou"):
        assumed.append("centerness that learned the IoU, as the file's name says")
        return replace(config, loss=replace(config.loss, quality="iou", box_weights="none"))
    assumed.append(
        "centerness that learned the centerness; if it learned the IoU, which predictions do not "
        "depend on, train it further with --loss.quality iou --loss.box-weights none"
    )
    return config
