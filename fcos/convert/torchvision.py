"""torchvision's FCOS, to and from: ``fcos_resnet50_fpn``, and the same on its other ResNets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fcos import presets
from fcos.config import Config

from . import coco
from .errors import ConvertError
from .infer import infer
from .names import Names, TowerNames
from .translate import COUNTER, network_shapes
from .translate import from_ours as translate_back
from .translate import to_ours as translate

NAME = "torchvision"
NAMES = Names(
    stem_conv="backbone.body.conv1",
    stem_norm="backbone.body.bn1",
    conv="backbone.body.layer{stage}.{block}.conv{i}",
    norm="backbone.body.layer{stage}.{block}.bn{i}",
    shortcut_conv="backbone.body.layer{stage}.{block}.downsample.0",
    shortcut_norm="backbone.body.layer{stage}.{block}.downsample.1",
    deformable_conv="",
    deformable_offset="",
    laterals=(
        "backbone.fpn.inner_blocks.0.0",
        "backbone.fpn.inner_blocks.1.0",
        "backbone.fpn.inner_blocks.2.0",
    ),
    outputs=(
        "backbone.fpn.layer_blocks.0.0",
        "backbone.fpn.layer_blocks.1.0",
        "backbone.fpn.layer_blocks.2.0",
    ),
    extras=("backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"),
    cls_tower=TowerNames(
        "head.classification_head.conv.{conv}", "head.classification_head.conv.{norm}", "", ""
    ),
    box_tower=TowerNames(
        "head.regression_head.conv.{conv}", "head.regression_head.conv.{norm}", "", ""
    ),
    cls_logits="head.classification_head.cls_logits",
    ltrb="head.regression_head.bbox_reg",
    centerness="head.regression_head.bbox_ctrness",
)
#: What the pyramid's convolutions were called before torchvision 0.13, and are now.
OLD_NAMES = {
    f"{name.removesuffix('.0')}.{part}": f"{name}.{part}"
    for name in (*NAMES.laterals, *NAMES.outputs)
    for part in ("weight", "bias")
}
# Of a backbone's norm that is trained, and not frozen.
_COUNTER = f"{NAMES.stem_norm}.{COUNTER}"
_OUTPUTS = 91


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys; torchvision's RetinaNet lacks the second one."""
    return {f"{NAMES.cls_logits}.weight", f"{NAMES.centerness}.weight"} <= set(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights. Raises ConvertError."""
    preset = presets.torchvision()
    state = _with_new_names(state)
    model = infer(state, NAMES, preset.model)
    if _COUNTER in state:  # nothing was pretrained, so that nothing was frozen
        model = replace(model, frozen_batch_norm=False, frozen_stages=0, backbone_weights="none")
    return replace(preset, model=model)


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out: none.

    All outputs are kept, also those of COCO's 91 that are of no category: see
    :func:`only_categories`.

    Raises:
        ConvertError: a key does not fit, or one is missing; it lists all.
    """
    state = _with_new_names(state)
    ours, ignored = translate(state, NAMES, config(state).model, ())
    # Counters of trained norms, which a backbone of ours has under the same names.
    counters = {key: state[key] for key in ignored if key in ours}
    return {**ours, **counters}, [key for key in ignored if key not in ours]


def from_ours(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What torchvision's FCOS loads, built with as many classes.

    Raises:
        ConvertError: torchvision has no such FCOS, or the weights are not of these settings.
    """
    model = config.model
    for name, needed in (
        ("activation", "relu"),
        ("normalize_ltrb", True),
        ("centerness_branch", "box"),
        ("trainable_scales", False),
        ("locations", "torchvision"),
        ("corners", "edges"),
        ("strides", (8, 16, 32, 64, 128)),
        ("p6_source", "p5"),
        ("stride_in", "3x3"),
        ("batch_norm_eps", 1e-5),
        ("deformable_stages", ()),
        ("tower_norm", "group"),
        ("tower_bias", True),
        ("tower_deformable", False),
        ("shared_tower_convs", 0),
    ):
        if getattr(model, name) != needed:
            raise ConvertError(
                f"torchvision's FCOS needs model.{name} {needed!r}, got {getattr(model, name)!r}"
            )
    if not model.backbone.startswith("resne") or model.backbone == "resnet10_half":
        raise ConvertError(f"torchvision's FCOS is not made with {model.backbone}")
    if lacking := sorted(network_shapes(model).keys() - state.keys()):
        raise ConvertError(f"lacks {', '.join(lacking)}")
    counters = {key: value for key, value in state.items() if key.endswith(COUNTER)}
    return {**translate_back(state, NAMES, model), **counters}


def only_categories(
    state: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], Config]:
    """Our state dict and settings for the 80 categories of COCO, in the order of their ids.

    Output i of 91 is of the category with the id i: the first is of none, nor are ten whose ids are
    not used. Training has taught them to be near 0. What is left keeps its scores, each of which is
    a sigmoid of its own. With another number of outputs nothing changes.
    """
    if config.model.num_classes != _OUTPUTS:
        return dict(state), config
    rows = torch.tensor(coco.CATEGORY_IDS)
    selected = dict(state)
    for key in ("head.cls_logits.weight", "head.cls_logits.bias"):
        selected[key] = state[key][rows]
    return selected, replace(config, model=replace(config.model, num_classes=len(rows)))


def _with_new_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {OLD_NAMES.get(key, key): value for key, value in state.items()}
