"""The layouts of :mod:`foreign_checkpoints` that are published, or may be trained, and what the
settings of each must say."""

from dataclasses import replace
from typing import Any

from foreign_checkpoints import Layout

X101_32X8D: dict[str, Any] = {"depth": 101, "groups": 32, "group_width": 8}
X101_64X4D: dict[str, Any] = {"depth": 101, "groups": 64, "group_width": 4}
BGR = (102.9801, 115.9465, 122.7717)
D2 = (103.53, 116.28, 123.675)
RGB = (123.675, 116.28, 103.53)

ORIGINAL = Layout("original")
IMPRV = replace(ORIGINAL, dcn_stages=(2, 3, 4), dcn_tower=True)
ADELAIDET = Layout("adelaidet")
DETECTRON2 = Layout("detectron2", scales=False)
MMDET = Layout("mmdet", bias=False)
ROSINALITY = Layout("rosinality", other="V-57", bias=False, c5=True)

#: File name, layout, and what the converted settings must say; "model." where nothing is said.
PLAIN = {"activation": "exp", "normalize_ltrb": False, "centerness_branch": "cls"}
IMPROVED = {"activation": "relu", "normalize_ltrb": True, "centerness_branch": "box"}
CASES: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "original": (
        "FCOS_R_50_FPN_1x.pth",
        ORIGINAL,
        {**PLAIN, "stride_in": "1x1", "batch_norm_eps": 0.0, "data.mean": BGR},
    ),
    "original R-101": (
        "FCOS_R_101_FPN_2x.pth",
        replace(ORIGINAL, depth=101),
        {**PLAIN, "backbone": "resnet101", "stride_in": "1x1"},
    ),
    "original X-101-32x8d": (
        "fcos_X_101_32x8d_FPN_2x.pth",
        replace(ORIGINAL, **X101_32X8D),
        {**PLAIN, "backbone": "resnext101_32x8d", "stride_in": "3x3", "data.std": (1, 1, 1)},
    ),
    "imprv": (
        "FCOS_imprv_R_50_FPN_1x.pth",
        ORIGINAL,
        {**IMPROVED, "batch_norm_eps": 0.0, "data.mean": BGR, "data.color_order": "bgr"},
    ),
    "imprv dcnv2": (
        "any.pth",
        IMPRV,
        {**IMPROVED, "deformable_stages": (2, 3, 4), "tower_deformable": True},
    ),
    "imprv dcnv2 X-101-64x4d": (
        "any.pth",
        replace(ORIGINAL, dcn_stages=(3, 4), dcn_tower=True, **X101_64X4D),
        {**IMPROVED, "backbone": "resnext101_64x4d", "deformable_stages": (3, 4)},
    ),
    "original MobileNetV2": (
        "FCOS_bn_bs16_MNV2_FPN_1x.pth",
        replace(ORIGINAL, mobilenet=True),
        {**PLAIN, "backbone": "mobilenet_v2", "stride_in": "3x3", "batch_norm_eps": 1e-5},
    ),
    "original MobileNetV2 c128": (
        "FCOS_syncbn_bs32_c128_MNV2_FPN_1x.pth",
        replace(ORIGINAL, mobilenet=True, channels=128),
        {**PLAIN, "fpn_channels": 128},
    ),
    "original C5": ("FCOS_c5.pth", replace(ORIGINAL, c5=True), {"p6_source": "c5"}),
    "adelaidet": (
        "FCOS_R_50_1x.pth",
        ADELAIDET,
        {**IMPROVED, "stride_in": "1x1", "data.mean": D2, "postprocess.clip": "after_nms"},
    ),
    "adelaidet X-101-32x8d": (
        "any.pth",
        replace(ADELAIDET, dcn_stages=(3, 4), dcn_tower=True, **X101_32X8D),
        {"stride_in": "3x3", "data.std": (57.375, 57.12, 58.395)},
    ),
    "adelaidet X-101-64x4d": (
        "any.pth",
        replace(ADELAIDET, **X101_64X4D),
        {"stride_in": "3x3", "data.std": (1, 1, 1)},
    ),
    "adelaidet interval": (
        "any.pth",
        replace(ADELAIDET, depth=101, dcn_stages=(2, 3), dcn_interval=3),
        {"deformable_stages": (2, 3), "deformable_interval": 3},
    ),
    "adelaidet RT": (
        "any.pth",
        replace(ADELAIDET, levels=3),
        {"strides": (8, 16, 32), "data.max_size": 736, "tower_norm": "group"},
    ),
    "adelaidet RT BN": (
        "any.pth",
        replace(ADELAIDET, levels=3, norm="bn"),
        {"tower_norm": "level_batch", "shared_tower_convs": 0},
    ),
    "adelaidet RT shared towers": (
        "any.pth",
        replace(ADELAIDET, levels=3, shared=4, tower=0),
        {"tower_norm": "group", "shared_tower_convs": 4, "tower_convs": 0},
    ),
    "adelaidet RT shared towers BN": (
        "any.pth",
        replace(ADELAIDET, levels=3, shared=4, tower=0, norm="bn"),
        {"tower_norm": "level_batch", "shared_tower_convs": 4, "tower_bias": True},
    ),
    "adelaidet no norm, no scales": (
        "any.pth",
        replace(ADELAIDET, norm="none", scales=False, tower=2),
        {"tower_norm": "none", "trainable_scales": False, "tower_convs": 2},
    ),
    "detectron2": (
        "any.pth",
        DETECTRON2,
        {**IMPROVED, "trainable_scales": False, "boundary": "strict", "batch_norm_eps": 1e-5},
    ),
    "adelaidet RT DLA-34": (
        "FCOS_RT_MS_DLA_34_4x.pth",
        replace(ADELAIDET, other="DLA-34", levels=3),
        {"backbone": "dla34", "stride_in": "3x3", "frozen_stages": 0, "data.mean": D2,
         "data.max_size": 736, "batch_norm_eps": 1e-5},
    ),
    "adelaidet RT DLA-34 BN": (
        "any.pth",
        replace(ADELAIDET, other="DLA-34", levels=3, norm="bn"),
        {"backbone": "dla34", "tower_norm": "level_batch"},
    ),
    "adelaidet RT DLA-34 shared towers": (
        "any.pth",
        replace(ADELAIDET, other="DLA-34", levels=3, shared=4, tower=0),
        {"backbone": "dla34", "shared_tower_convs": 4},
    ),
    "adelaidet RT DLA-34 shared towers BN": (
        "any.pth",
        replace(ADELAIDET, other="DLA-34", levels=3, shared=4, tower=0, norm="bn"),
        {"backbone": "dla34", "shared_tower_convs": 4, "tower_norm": "level_batch"},
    ),
    "adelaidet V-39": (
        "FCOS_V_39_MS_3x.pth",
        replace(ADELAIDET, other="V-39-eSE"),
        {**IMPROVED, "backbone": "vovnet39_ese", "stride_in": "3x3", "frozen_stages": 0,
         "data.mean": D2, "data.std": (1, 1, 1)},
    ),
    "adelaidet V-57": (
        "any.pth",
        replace(ADELAIDET, other="V-57-eSE"),
        {**IMPROVED, "backbone": "vovnet57_ese"},
    ),
    "adelaidet V-99": (
        "any.pth",
        replace(ADELAIDET, other="V-99-eSE"),
        {**IMPROVED, "backbone": "vovnet99_ese"},
    ),
    "detectron2, no bias": ("any.pth", replace(DETECTRON2, bias=False), {"tower_bias": False}),
    "detectron2 BN": (
        "any.pth",
        replace(DETECTRON2, norm="cycle"),
        {"tower_norm": "level_batch", "tower_bias": True},
    ),
    "detectron2, one BN": ("any.pth", replace(DETECTRON2, norm="bn"), {"tower_norm": "batch"}),
    "detectron2, no norm": ("any.pth", replace(DETECTRON2, norm="none"), {"tower_norm": "none"}),
    "mmdet": (
        "any.pth",
        MMDET,
        {**PLAIN, "tower_bias": False, "data.mean": BGR, "stride_in": "1x1",
         "batch_norm_eps": 1e-5, "postprocess.score": "product", "postprocess.iou_threshold": 0.5},
    ),
    "mmdet old": ("any.pth", replace(MMDET, old=True), PLAIN),
    "mmdet tricks": (
        "any.pth",
        replace(MMDET, bias=True),
        {**IMPROVED, "tower_bias": True, "data.mean": D2, "postprocess.iou_threshold": 0.6},
    ),
    "mmdet tricks DCN": (
        "any.pth",
        replace(MMDET, bias=True, dcn_stages=(2, 3, 4), dcn_tower=True),
        {**IMPROVED, "deformable_stages": (2, 3, 4), "tower_deformable": True},
    ),
    "mmdet tricks DCN old": (
        "any.pth",
        replace(MMDET, bias=True, dcn_stages=(2, 3, 4), dcn_tower=True, old=True),
        {"deformable_stages": (2, 3, 4), "tower_deformable": True},
    ),
    "mmdet R-101": ("any.pth", replace(MMDET, depth=101), {**PLAIN, "backbone": "resnet101"}),
    "mmdet X-101-64x4d": (
        "any.pth",
        replace(MMDET, **X101_64X4D),
        {**PLAIN, "stride_in": "3x3", "data.mean": RGB, "data.color_order": "rgb"},
    ),
    "mmdet R-18 LSJ": (
        "any.pth",
        replace(MMDET, depth=18, bias=True),
        {**IMPROVED, "backbone": "resnet18", "data.pixel_range": 255},
    ),
    "mmdet R-50 LSJ": (
        "fcos_r50_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.pth",
        replace(MMDET, bias=True),
        {**IMPROVED, "stride_in": "3x3", "data.color_order": "rgb", "data.mean": RGB,
         "data.std": (58.395, 57.12, 57.375), "frozen_stages": 2},
    ),
    "mmdet R-101 LSJ": (
        "fcos_center-normbbox-centeronreg-giou_r101_fpn_gn-head_lsj_200e_8x8_fp16_coco.pth",
        replace(MMDET, depth=101, bias=True),
        {**IMPROVED, "backbone": "resnet101", "stride_in": "3x3", "data.mean": RGB},
    ),
    "mmdet HRNet W18": (
        "fcos_hrnetv2p_w18_gn-head_4x4_1x_coco_20201212_100710-4ad151de.pth",
        replace(MMDET, other="W18"),
        {**PLAIN, "backbone": "hrnet_w18", "stride_in": "3x3", "tower_bias": False,
         "data.mean": D2, "data.std": (57.375, 57.12, 58.395), "data.color_order": "bgr",
         "frozen_stages": 0},
    ),
    "mmdet HRNet W32": (
        "any.pth",
        replace(MMDET, other="W32"),
        {**PLAIN, "backbone": "hrnet_w32"},
    ),
    "mmdet HRNet W40": (
        "any.pth",
        replace(MMDET, other="W40"),
        {**PLAIN, "backbone": "hrnet_w40"},
    ),
    "rosinality": (
        "epoch-24.pt",
        ROSINALITY,
        {**PLAIN, "backbone": "vovnet57", "p6_source": "c5", "center_sampling_radius": 1.5,
         "tower_bias": False, "data.color_order": "rgb", "data.pixel_range": 1,
         "data.resize": "truncate", "loss.normalizer": "local"},
    ),
    "mmdet BN head": ("any.pth", replace(MMDET, norm="bn"), {"tower_norm": "batch"}),
}  # fmt: skip
