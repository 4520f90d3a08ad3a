"""What FCOS can learn of a data set, before anything is trained: recall, ambiguity, levels.

Everything is counted from the compiled assignment that training uses, under any conventions, from
the annotations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.annotations import Annotations
from ..locations import feature_sizes
from .assignment import assign, network_boxes
from .conventions import Conventions

Integers = NDArray[np.int64]

REASONS = ("", "between locations", "wrong level", "off centre", "covered", "outside")
"""Why a box has no location; the place of a reason is its number in ``Analysis.reasons``.

- "between locations": it is too small: no location of the finest level lies inside it.
- "wrong level": locations of the finest level lie inside, but no location that lies inside is of a
  level whose size range it meets there.
- "off centre": it would have locations, but none close enough to its centre for center sampling.
- "covered": it would have locations, but smaller boxes have taken all of them.
- "outside": it has no area left when it ends at its last pixel (``corners="pixels"``).
"""
LEARNED, BETWEEN, WRONG_LEVEL, OFF_CENTER, COVERED, OUTSIDE = range(6)

_PAIRS_AT_ONCE = 1 << 21  # (box, location) pairs of a call: some 75 MB of results
_TWIN_IOU = 0.8


@dataclass(frozen=True)
class Analysis:
    """What was counted. K boxes, D levels; boxes in the order of ``annotations``.

    A location is positive if it lies in at least one box that may have it. Where several boxes may,
    the smallest has it, and the location is ambiguous.
    """

    annotations: Annotations
    conventions: Conventions
    sizes: NDArray[np.float32]
    """[K, 2] (height, width) of each box in the resized picture."""
    positives: Integers
    """[K, D]: locations of each level that learn the box."""
    candidates: Integers
    """[K, D]: locations of each level that might, if there were no other box."""
    reasons: NDArray[np.int8]
    """[K]: why no location learns the box, see REASONS; 0 where one does."""
    twins: NDArray[np.bool_]
    """[K]: covered, and another box of the picture nearly coincides with it (IoU of 0.8)."""
    locations: Integers
    """[D]: all locations of each level, over all pictures."""
    level_positives: Integers
    """[D]: those of them that are positive."""
    level_ambiguous: Integers
    """[D]: those of the positives that lie in more than one box."""
    level_ambiguous_classes: Integers
    """[D]: those of the positives that lie in boxes of more than one class."""

    @property
    def boxes(self) -> int:
        """K."""
        return len(self.reasons)

    @property
    def learned(self) -> NDArray[np.bool_]:
        """[K]: whether at least one location learns the box."""
        return self.reasons == LEARNED

    @property
    def recall(self) -> float:
        """Best possible recall: share of the boxes that at least one location learns."""
        return _share(self.learned.sum(), self.boxes)

    @property
    def ambiguous(self) -> float:
        """Share of the positives, of all levels together, that lie in more than one box."""
        return _share(self.level_ambiguous.sum(), self.level_positives.sum())

    @property
    def ambiguous_classes(self) -> float:
        """Share of the positives that lie in boxes of more than one class."""
        return _share(self.level_ambiguous_classes.sum(), self.level_positives.sum())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def analyze(
    annotations: Annotations,
    conventions: Conventions,
    on_picture: Callable[[int], None] | None = None,
) -> Analysis:
    """Count which boxes can be learned, by how many locations, and how many are ambiguous.

    Exact: a location is a candidate of a box if the compiled assignment gives it to the box when
    the box is alone in the picture, and the box has it if the assignment of the whole picture gives
    it to the box. Some 5 seconds for COCO's 5,000 validation pictures.

    Args:
        annotations: Of ``read_annotations``.
        conventions: Levels, resizing and the rest.
        on_picture: Called after each picture with the number of those that are done.

    Raises:
        ConfigError: A picture is resized beyond 10^9 pixels.
    """
    count, depth = len(annotations.boxes), len(conventions.strides)
    analysis = Analysis(
        annotations=annotations,
        conventions=conventions,
        sizes=np.zeros((count, 2), dtype=np.float32),
        positives=np.zeros((count, depth), dtype=np.int64),
        candidates=np.zeros((count, depth), dtype=np.int64),
        reasons=np.zeros(count, dtype=np.int8),
        twins=np.zeros(count, dtype=np.bool_),
        **{
            name: np.zeros(depth, dtype=np.int64)
            for name in (
                "locations",
                "level_positives",
                "level_ambiguous",
                "level_ambiguous_classes",
            )
        },
    )
    with _one_thread():
        for index in range(len(annotations.image_ids)):
            _count_picture(analysis, index)
            if on_picture is not None:
                on_picture(index + 1)
    return analysis


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of short calls: on a busy machine, threads would wait for one another in each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Picture:
    """One picture of the data set, resized."""

    boxes: NDArray[np.float32]
    labels: Integers
    size: tuple[int, int]
    conventions: Conventions
    starts: Integers = field(init=False)
    """[D + 1]: level d has the locations starts[d] to starts[d + 1]."""

    def __post_init__(self) -> None:
        sizes = feature_sizes(self.size, self.conventions.strides)
        starts = np.cumsum([0, *(height * width for height, width in sizes)])
        object.__setattr__(self, "starts", starts)

    def levels_of(self, locations: Integers) -> Integers:
        return np.searchsorted(self.starts, locations, side="right") - 1

    def winners(self) -> tuple[Integers, Integers]:
        """The positive locations, and the box that has each."""
        one = np.array([0, len(self.boxes)])
        assigned = assign(self.boxes, self.labels, one, self.size, self.conventions)
        matched = assigned.matched[0].numpy()
        locations = np.flatnonzero(matched >= 0)
        return locations, matched[locations]

    def candidates(self) -> tuple[Integers, Integers]:
        """All (box, location) pairs in which the location might learn the box."""
        step = max(1, _PAIRS_AT_ONCE // int(self.starts[-1]))
        parts = list(self._candidates(step))
        return (
            np.concatenate([boxes for boxes, _ in parts]),
            np.concatenate([locations for _, locations in parts]),
        )

    def _candidates(self, step: int) -> Iterator[tuple[Integers, Integers]]:
        for first in range(0, len(self.boxes), step):
            some = slice(first, first + step)
            boxes, labels = self.boxes[some], self.labels[some]
            # Every box is alone in a picture of its own, so that no other can take a location.
            alone = np.arange(len(boxes) + 1)
            assigned = assign(boxes, labels, alone, self.size, self.conventions)
            box, location = (assigned.matched >= 0).nonzero(as_tuple=True)
            yield box.numpy() + first, location.numpy()

    def reach(self, chosen: Integers, conventions: Conventions) -> NDArray[np.bool_]:
        """Whether each of these boxes would have candidates under other conventions."""
        some = replace(
            self, boxes=self.boxes[chosen], labels=self.labels[chosen], conventions=conventions
        )
        found = np.zeros(len(chosen), dtype=np.bool_)
        found[some.candidates()[0]] = True
        return found


def _count_picture(analysis: Analysis, index: int) -> None:
    """Adds a picture to the counts."""
    annotations, conventions = analysis.annotations, analysis.conventions
    height, width = annotations.sizes[index].tolist()
    mine = slice(*annotations.offsets[index : index + 2].tolist())
    boxes, size = network_boxes(annotations.boxes[mine], (height, width), conventions)
    picture = _Picture(boxes, annotations.labels[mine], size, conventions)
    analysis.locations[:] += np.diff(picture.starts)
    if not len(boxes):
        return
    analysis.sizes[mine] = np.maximum(boxes[:, 3:1:-1] - boxes[:, 1::-1], 0)

    depth = len(conventions.strides)
    locations, owners = picture.winners()
    levels = picture.levels_of(locations)
    analysis.positives[mine] = _table(owners, levels, len(boxes), depth)
    analysis.level_positives[:] += np.bincount(levels, minlength=depth)

    pair_boxes, pair_locations = picture.candidates()
    pair_levels = picture.levels_of(pair_locations)
    analysis.candidates[mine] = _table(pair_boxes, pair_levels, len(boxes), depth)

    boxes_at = np.bincount(pair_locations, minlength=picture.starts[-1])
    ambiguous = np.flatnonzero(boxes_at > 1)
    analysis.level_ambiguous[:] += np.bincount(picture.levels_of(ambiguous), minlength=depth)
    in_question = boxes_at[pair_locations] > 1
    classes = len(annotations.class_names)
    of_class = np.unique(
        pair_locations[in_question] * classes + picture.labels[pair_boxes[in_question]]
    )
    classes_at = np.bincount(of_class // classes, minlength=picture.starts[-1])
    mixed = np.flatnonzero(classes_at > 1)
    analysis.level_ambiguous_classes[:] += np.bincount(picture.levels_of(mixed), minlength=depth)

    lost = np.flatnonzero(analysis.positives[mine].sum(axis=1) == 0)
    if len(lost):
        covered = analysis.candidates[mine][lost].sum(axis=1) > 0
        analysis.reasons[mine][lost] = _reasons(picture, lost, covered)
        analysis.twins[mine][lost[covered]] = _twins(boxes, lost[covered])


def _table(boxes: Integers, levels: Integers, count: int, depth: int) -> Integers:
    """[count, depth]: how often each box and level occur together."""
    return np.bincount(boxes * depth + levels, minlength=count * depth).reshape(count, depth)


def _reasons(picture: _Picture, lost: Integers, covered: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Why each of these boxes has no location; those that have candidates are covered."""
    whole = replace(picture.conventions, center_sampling_radius=0.0)
    finest = replace(whole, strides=(min(whole.strides),), size_ranges=((0.0, np.inf),))
    sides = picture.boxes[lost, 2:] - picture.boxes[lost, :2]
    reasons = np.select(
        [
            covered,
            (sides <= 0).any(axis=1),
            picture.reach(lost, whole),
            picture.reach(lost, finest),
        ],
        [COVERED, OUTSIDE, OFF_CENTER, WRONG_LEVEL],
        default=BETWEEN,
    )
    return reasons.astype(np.int8)


def _twins(boxes: NDArray[np.float32], chosen: Integers) -> NDArray[np.bool_]:
    """Whether another box overlaps each of these by an IoU of at least 0.8."""
    a, b = boxes[chosen, None].astype(np.float64), boxes[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.maximum(sides, 0).prod(axis=-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(axis=1)
    union = areas[chosen, None] + areas[None] - overlap
    overlap[np.arange(len(chosen)), chosen] = 0  # with itself
    return (overlap >= _TWIN_IOU * union).any(axis=1)
