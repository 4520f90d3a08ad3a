"""Which images make up which batch, in an order that no worker, process or interruption changes.

Batch t and the augmentation of its images follow from the seed alone. So a run on W processes
sees the images of a run on one, and a resumed run those of an uninterrupted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class SampleIndex(NamedTuple):
    """What a training sampler asks a data set for: an image and its random stream."""

    position: int
    epoch: int = 0
    seed: int = 0

    def random_seed(self) -> int:
        """A seed for this image in this epoch of this run, unrelated to every other one."""
        state = np.random.SeedSequence([self.seed, self.epoch, self.position]).generate_state(2)
        return int(state[0]) << 32 | int(state[1])


class TrainingBatches(Sampler[list[SampleIndex]]):
    """The training batches of one process, as lists of `SampleIndex`.

    The images are shuffled anew each epoch and the epochs follow each other without a seam, so
    every image comes exactly once an epoch, whatever the batch size. With grouping, upright and
    wide images are two such streams, and batches are taken from both in proportion; when either
    kind would not fill one batch, all images are one group.

    Args:
        aspect_ratios (sequence of float): width / height of each image.
        batch_size (int): Images a batch, over all processes together.
        seed (int): Of order and augmentation.
        rank (int), world_size (int): Process `rank` gets the rank-th consecutive share.
        accumulation (int): Each share must also divide into this many parts.
        start_iteration (int): First batch to yield; batch t is the same whatever the start.
        iterations (int | None): Where the run ends: batches start_iteration..iterations - 1 are
            yielded. None: no end.
        group_by_aspect_ratio (bool): Whether to group.

    Raises:
        ValueError: There are no images, or an argument is out of its range.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | NDArray[np.float64],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_iteration: int = 0,
        iterations: int | None = None,
        group_by_aspect_ratio: bool = True,
    ) -> None:
        ratios = np.asarray(aspect_ratios)
        if not len(ratios):
            raise ValueError("TrainingBatches: aspect_ratios must hold at least one image")
        if seed < 0 or start_iteration < 0:
            raise ValueError(
                "TrainingBatches: seed and start_iteration must not be negative, "
                f"got {seed} and {start_iteration}"
            )
        check_rank(rank, world_size)
        if batch_size < 1 or accumulation < 1 or batch_size % (world_size * accumulation):
            raise ValueError(
                "TrainingBatches: batch_size must be a positive multiple of processes x "
                f"accumulation = {world_size} x {accumulation}, got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        self.iterations = iterations
        upright = np.flatnonzero(ratios < 1)
        wide = np.flatnonzero(ratios >= 1)
        grouped = group_by_aspect_ratio and min(len(upright), len(wide)) >= batch_size
        self._groups = [wide, upright] if grouped else [np.arange(len(ratios))]
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def global_batch(self, iteration: int) -> list[SampleIndex]:
        """The images of this iteration over all processes."""
        group, position = self._turn(iteration)
        size = len(self._groups[group])
        first = position * self.batch_size
        batch = []
        for place in range(first, first + self.batch_size):
            epoch, offset = divmod(place, size)
            batch.append(SampleIndex(int(self._order(group, epoch)[offset]), epoch, self.seed))
        return batch

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        share = self.batch_size // self.world_size
        first = self.rank * share
        for iteration in itertools.count(self.start_iteration):
            if self.iterations is not None and iteration >= self.iterations:
                return
            yield self.global_batch(iteration)[first : first + share]

    def __len__(self) -> int:
        if self.iterations is None:
            raise TypeError("TrainingBatches: without iterations it has no length")
        return max(0, self.iterations - self.start_iteration)

    def _turn(self, iteration: int) -> tuple[int, int]:
        """The group whose turn it is, and how many turns that group had before."""
        if len(self._groups) == 1:
            return 0, iteration
        # Of the first t batches, t * upright / all, rounded, are upright: evenly spread, and
        # known for any t without going through the ones before.
        upright = len(self._groups[1])
        total = upright + len(self._groups[0])
        before = (2 * iteration * upright + total) // (2 * total)
        after = (2 * (iteration + 1) * upright + total) // (2 * total)
        return (1, before) if after > before else (0, iteration - before)

    def _order(self, group: int, epoch: int) -> NDArray[np.int64]:
        key = (group, epoch)
        if key not in self._orders:
            if len(self._orders) >= 8:  # a batch needs few orders; keep only the latest
                self._orders.clear()
            random = np.random.default_rng([self.seed, group, epoch])
            self._orders[key] = random.permutation(self._groups[group])
        return self._orders[key]


def check_rank(rank: int, world_size: int) -> None:
    """Raises ValueError unless 0 <= rank < world_size."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank and world_size must satisfy 0 <= rank < world_size, got {rank} and {world_size}"
        )
