"""What the numbers of an analysis mean for the person whose boxes they are, in sentences."""

from __future__ import annotations

import math

import numpy as np

from .analyze import BETWEEN, COVERED, OFF_CENTER, OUTSIDE, WRONG_LEVEL, Analysis

_FEW_BOXES = 20  # of a class: a share of fewer says little
_RARELY = 0.005  # share of the boxes that a level learns
_MOSTLY = 0.85  # as above


def advice(analysis: Analysis) -> list[str]:
    """Sentences, the most important first."""
    if not analysis.boxes:
        return ["There are no boxes, and so nothing to be learned."]
    lost = int((~analysis.learned).sum())
    if lost:
        verdict = (
            f"{_count(lost, 'box', 'boxes')} of {analysis.boxes:,} ({percent(1 - analysis.recall)})"
            " cannot be learned, whatever the network: no location is told to predict them."
        )
    else:
        verdict = "Every box has a location that learns it."
    return [
        verdict,
        *_small(analysis),
        *_wrong_level(analysis),
        *_off_center(analysis),
        *_covered(analysis),
        *_outside(analysis),
        *_ambiguous(analysis),
        *_levels(analysis),
        *_imbalance(analysis),
        *_classes(analysis),
    ]


def percent(share: float) -> str:
    """Two digits that matter; what is not nothing is not called nothing."""
    if math.isnan(share):
        return "-"
    value = 100 * share
    if 0 < value < 0.1 or 99.9 < value < 100:
        return "<0.1 %" if value < 1 else ">99.9 %"
    return f"{value:.1f} %"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _boxes(number: int) -> str:
    return _count(number, "box", "boxes")


def _verb(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _share_of_boxes(analysis: Analysis, number: int) -> str:
    return percent(number / analysis.boxes)


def _small(analysis: Analysis) -> list[str]:
    stride = min(analysis.conventions.strides)
    small = int((analysis.sizes.min(axis=1) < stride).sum())
    if not small:
        return []
    lost = int((analysis.reasons == BETWEEN).sum())
    resized = "" if analysis.conventions.resize == "none" else " after resizing"
    text = (
        f"{_share_of_boxes(analysis, small)} of your boxes ({small:,}) are smaller than stride "
        f"{stride} can see: a side of less than {stride} pixels{resized}. "
    )
    if lost:
        text += f"{lost:,} of them {_verb(lost, 'lies', 'lie')} between its locations, unlearned. "
    else:
        text += "Each of them happens to contain a location, but another crop or size may not. "
    larger = "resizing" if resized == "" else "a larger --min-size and --max-size"
    return [text + f"Remedies: {larger}, or a level of a smaller stride (--strides)."]


def _wrong_level(analysis: Analysis) -> list[str]:
    chosen = analysis.reasons == WRONG_LEVEL
    number = int(chosen.sum())
    if not number:
        return []
    shorter = float(np.median(analysis.sizes[chosen].min(axis=1)))
    longer = float(np.median(analysis.sizes[chosen].max(axis=1)))
    text = (
        f"{_boxes(number)} ({_share_of_boxes(analysis, number)}) with sides of {longer:.0f} and "
        f"{shorter:.0f} pixels in the median {_verb(number, 'contains', 'contain')} locations, but "
        "none of a level that learns this size: "
    )
    gaps = _gaps(analysis)
    if gaps:
        return [text + f"no size range holds {' or '.join(gaps)} pixels (--size-ranges)."]
    return [
        text + "long and thin ones slip through the wide strides of the levels for large boxes. "
        "Remedy: size ranges that overlap, so that a finer level learns them too (--size-ranges)."
    ]


def _gaps(analysis: Analysis) -> list[str]:
    """What no size range contains, from 0 to infinity."""
    gaps, reached = [], 0.0
    for low, high in sorted(analysis.conventions.size_ranges):
        if low > reached:
            gaps.append(f"{reached:g} to {low:g}")
        reached = max(reached, high)
    return gaps if math.isinf(reached) else [*gaps, f"more than {reached:g}"]


def _off_center(analysis: Analysis) -> list[str]:
    number = int((analysis.reasons == OFF_CENTER).sum())
    if not number:
        return []
    radius = analysis.conventions.center_sampling_radius
    return [
        f"{_boxes(number)} ({_share_of_boxes(analysis, number)}) would have locations, but none "
        f"within {radius:g} strides of the centre, where center sampling looks. Remedy: a larger "
        "--center-sampling-radius."
    ]


def _covered(analysis: Analysis) -> list[str]:
    number, twins = int((analysis.reasons == COVERED).sum()), int(analysis.twins.sum())
    if not number:
        return []
    text = (
        f"{_boxes(number)} ({_share_of_boxes(analysis, number)}) would have locations, but smaller "
        "or equal boxes have taken all of them."
    )
    if twins:
        text += (
            f" {twins:,} of these nearly {_verb(twins, 'coincides', 'coincide')} with another box "
            "(IoU 0.8 or more): perhaps an object that was annotated twice."
        )
    return [text]


def _outside(analysis: Analysis) -> list[str]:
    number = int((analysis.reasons == OUTSIDE).sum())
    if not number:
        return []
    return [
        f"No area is left of {_boxes(number)} with a width or height of at most one pixel, as "
        "boxes end at their last pixel."
    ]


def _ambiguous(analysis: Analysis) -> list[str]:
    if not analysis.level_positives.sum():
        return []
    text = (
        f"{percent(analysis.ambiguous)} of the positive locations lie in more than one box, "
        f"{percent(analysis.ambiguous_classes)} in boxes of different classes; each learns the "
        "smallest box."
    )
    if analysis.ambiguous > 0.05 and not analysis.conventions.center_sampling_radius:
        text += " Center sampling makes them fewer (--center-sampling-radius 1.5)."
    if analysis.ambiguous > 0.1 and len(analysis.conventions.strides) == 1:
        text += " So do more levels, which tell boxes of different sizes apart."
    return [text]


def _levels(analysis: Analysis) -> list[str]:
    names = analysis.conventions.level_names
    if len(names) == 1:
        return []
    shares = ((analysis.positives > 0).sum(axis=0) / analysis.boxes).tolist()
    sentences = []
    idle = [name for name, share in zip(names, shares, strict=True) if share == 0]
    rare = [
        f"{name} ({percent(share)})"
        for name, share in zip(names, shares, strict=True)
        if 0 < share < _RARELY
    ]
    if idle:
        sentences.append(
            f"{_list(idle)} {_verb(len(idle), 'learns', 'learn')} nothing: no box has the size. "
            "The network is faster without (--levels), or other size ranges give the level work."
        )
    if rare:
        sentences.append(
            f"{_list(rare)} {_verb(len(rare), 'learns', 'learn')} hardly any of the boxes, and "
            "will be trained on little."
        )
    for name, share in zip(names, shares, strict=True):
        if share > _MOSTLY:
            longer = float(np.median(analysis.sizes.max(axis=1)))
            sentences.append(
                f"{name} learns {percent(share)} of the boxes, whose longer side has a median of "
                f"{longer:.0f} pixels: narrower size ranges around it would use the other levels."
            )
    return sentences


def _imbalance(analysis: Analysis) -> list[str]:
    """A sentence on the smaller boxes, where they hardly count in the loss."""
    each = analysis.positives.sum(axis=1)
    side = np.sqrt(analysis.sizes.astype(np.float64).prod(axis=1))
    for limit in (32, 64):
        small = side < limit
        boxes, positives = float(small.mean()), float(each[small].sum() / max(1, each.sum()))
        if boxes >= 0.1 and positives < boxes / 3:
            return [
                f"Boxes under {limit} x {limit} pixels are {percent(boxes)} of all, but have "
                f"{percent(positives)} of the positive locations: the loss is mostly about the "
                "larger ones."
            ]
    return []


def _classes(analysis: Analysis) -> list[str]:
    labels, names = analysis.annotations.labels, analysis.annotations.class_names
    boxes = np.bincount(labels, minlength=len(names))
    recall = np.bincount(labels[analysis.learned], minlength=len(names)) / np.maximum(boxes, 1)
    poor = [
        k
        for k in np.argsort(recall, kind="stable").tolist()
        if boxes[k] >= _FEW_BOXES and recall[k] < analysis.recall - 0.01
    ]
    if not poor:
        return []
    worst = _list([f"{names[k]} ({percent(float(recall[k]))})" for k in poor[:3]])
    return [f"Best possible recall is lowest for {worst}."]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
