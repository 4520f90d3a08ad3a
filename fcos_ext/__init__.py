"""CUDA and CPU kernels for dense one-stage object detectors.

Every operator has a plain-PyTorch reference of the same signature, ``<op>_ref``: the
specification, the fallback where no kernel was built, and the baseline of the benchmarks.
"""

from .assign_targets import AssignedTargets, assign_targets, assign_targets_ref
from .box_and_centerness_loss import (
    BoxAndCenternessLoss,
    box_and_centerness_loss,
    box_and_centerness_loss_ref,
)
from .fcos_loss import FCOSLoss, fcos_loss, fcos_loss_ref
from .fcos_loss_options import FCOSLossOptions, GroundTruth
from .fcos_normalizers import fcos_normalizers, fcos_normalizers_ref
from .grids import Grid
from .iou_loss import iou_loss, iou_loss_ref
from .nms import batched_nms, batched_nms_ref, nms, nms_ref
from .padded_batched_nms import PaddedKeep, padded_batched_nms, padded_batched_nms_ref
from .postprocess import Postprocessed, postprocess, postprocess_ref
from .postprocess_options import PostprocessOptions
from .sigmoid_focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from .soft_nms import (
    PaddedSoftKeep,
    padded_soft_nms,
    padded_soft_nms_ref,
    soft_nms,
    soft_nms_ref,
)

__all__ = [
    "AssignedTargets",
    "BoxAndCenternessLoss",
    "FCOSLoss",
    "FCOSLossOptions",
    "Grid",
    "GroundTruth",
    "PaddedKeep",
    "PaddedSoftKeep",
    "PostprocessOptions",
    "Postprocessed",
    "assign_targets",
    "assign_targets_ref",
    "batched_nms",
    "batched_nms_ref",
    "box_and_centerness_loss",
    "box_and_centerness_loss_ref",
    "fcos_loss",
    "fcos_loss_ref",
    "fcos_normalizers",
    "fcos_normalizers_ref",
    "iou_loss",
    "iou_loss_ref",
    "nms",
    "nms_ref",
    "padded_batched_nms",
    "padded_batched_nms_ref",
    "padded_soft_nms",
    "padded_soft_nms_ref",
    "postprocess",
    "postprocess_ref",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_ref",
    "soft_nms",
    "soft_nms_ref",
]
