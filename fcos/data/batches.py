"""Samples into batches, and the loaders that yield them."""

from __future__ import annotations

import atexit
import multiprocessing.process
import os
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcos.config import DataConfig
from fcos.data.padding import Padding, Shape, fixed_shapes, pad_images
from fcos.data.sampling import SampleIndex, TrainingBatches, check_rank

if TYPE_CHECKING:
    from fcos.data.coco import CocoDataset


__all__ = [
    "Batch",
    "Sample",
    "SampleIndex",
    "TrainingBatches",
    "collate",
    "eval_loader",
    "pad_images",
    "training_loader",
]


class Sample(NamedTuple):
    """One image with its true boxes, as a data set returns it."""

    image: Tensor
    """float32 [3, H, W], resized and normalised."""
    boxes: Tensor
    """float32 [M, 4] xyxy pixels of `image`."""
    labels: Tensor
    """int64 [M], 0..C-1."""
    image_id: int
    """Id in the JSON."""
    original_size: tuple[int, int]
    """(height, width) of the file, after EXIF rotation."""


@dataclass
class Batch:
    """N samples; the boxes of all images in one tensor, padded to M each."""

    images: Tensor
    """float32 [N, 3, H, W], zero padded at the right and the bottom."""
    image_sizes: Tensor
    """int64 [N, 2] (height, width) of each image inside the padding."""
    boxes: Tensor
    """float32 [N, M, 4] xyxy pixels; 0 in the padding."""
    labels: Tensor
    """int64 [N, M], 0..C-1; -1 in the padding."""
    counts: Tensor
    """int64 [N]: how many of the M boxes are those of the image."""
    image_ids: list[int]
    """Ids in the JSON."""
    original_sizes: Tensor
    """int64 [N, 2] (height, width) of each file."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(
        self,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.contiguous_format,
        non_blocking: bool = True,
    ) -> Batch:
        """A copy on `device`, its images in `memory_format`."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        moved.images = moved.images.contiguous(memory_format=memory_format)
        return moved

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            function(self.images),
            function(self.image_sizes),
            function(self.boxes),
            function(self.labels),
            function(self.counts),
            self.image_ids,
            function(self.original_sizes),
        )


def collate(
    samples: Sequence[Sample],
    shapes: Sequence[Shape] = (),
    max_boxes: int | None = None,
    padding: Padding = "multiple",
) -> Batch:
    """Makes a batch of samples.

    Args:
        samples: At least one.
        shapes, padding: What the images are padded to; see `pad_images`.
        max_boxes: M of the batch; None: as many as the image with the most boxes has.

    Raises:
        ValueError: There is no sample, or one has more boxes than `max_boxes`.
    """
    images, sizes = pad_images([sample.image for sample in samples], shapes, padding)
    counts = [len(sample.boxes) for sample in samples]
    if max_boxes is None:
        max_boxes = max(counts)
    boxes = torch.zeros(len(samples), max_boxes, 4)
    labels = torch.full((len(samples), max_boxes), -1)
    for i, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        if count > max_boxes:
            raise ValueError(
                f"collate: image {sample.image_id} must have at most max_boxes = {max_boxes} "
                f"boxes, got {count}"
            )
        boxes[i, :count] = sample.boxes
        labels[i, :count] = sample.labels
    return Batch(
        images=images,
        image_sizes=sizes,
        boxes=boxes,
        labels=labels,
        counts=torch.tensor(counts),
        image_ids=[sample.image_id for sample in samples],
        original_sizes=torch.tensor([s.original_size for s in samples], dtype=torch.int64),
    )


def training_loader(
    dataset: CocoDataset,
    config: DataConfig,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    iterations: int | None = None,
    accumulation: int = 1,
    fixed: bool = False,
) -> DataLoader[Sample]:
    """Yields the `Batch` of this process for iterations start_iteration..iterations - 1.

    Args:
        dataset: The images.
        config: For the number of workers and the shapes.
        batch_size, seed, rank, world_size, accumulation, start_iteration, iterations: See
            `TrainingBatches`.
        fixed: Batches have few shapes, as CUDA graphs need them: images those of `fixed_shapes`,
            and boxes as many rows as the image of the data set with the most.

    Raises:
        ValueError: As `TrainingBatches` does.
    """
    batches = TrainingBatches(
        dataset.aspect_ratios,
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        start_iteration=start_iteration,
        iterations=iterations,
        group_by_aspect_ratio=config.group_by_aspect_ratio,
    )
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=_workers(config, iterations),
        collate_fn=partial(
            collate,
            shapes=fixed_shapes(config) if fixed else config.image_shapes,
            max_boxes=max(1, dataset.max_boxes) if fixed else None,
            padding=config.padding,
        ),
        worker_init_fn=_leave_signals_to_training,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from the global one
    )


def eval_loader(
    dataset: CocoDataset,
    config: DataConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    shapes: Sequence[Shape] = (),
) -> DataLoader[Sample]:
    """Yields this process's consecutive share of all images in order, each image once.

    Args:
        dataset (CocoDataset): The images.
        config (DataConfig): For the number of workers and the padding.
        batch_size (int): Images a batch of this process; the last batch may be smaller.
        rank (int), world_size (int): Which share; shares differ by at most one image.
        shapes: That the images may be padded to; see `pad_images`.

    Raises:
        ValueError: `batch_size`, `rank` or `world_size` is out of its range.
    """
    check_rank(rank, world_size)
    if batch_size < 1:
        raise ValueError(f"eval_loader: batch_size must be positive, got {batch_size}")
    share = range(
        rank * len(dataset) // world_size,
        (rank + 1) * len(dataset) // world_size,
    )
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=share,
        num_workers=_workers(config, -(-len(share) // batch_size)),
        collate_fn=partial(collate, shapes=shapes, padding=config.padding),
        worker_init_fn=_leave_signals_to_training,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


class _Loader(DataLoader[Sample]):
    """A loader whose workers end with Python, although they ignore the signal that asks them to."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        _running_workers.update(getattr(iterator, "_workers", ()))
        return iterator


_running_workers: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Python sends SIGTERM to the workers of a loader that was not run to its end, and waits."""
    workers = [worker for worker in _running_workers if worker.is_alive()]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a killed worker for an error
    for worker in workers:
        worker.kill()


def _leave_signals_to_training(worker: int) -> None:
    """Ctrl-C, torchrun and schedulers signal the loader's processes as well as training itself.

    Training finishes its step and saves, for which it needs them; they end when it does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _workers(config: DataConfig, batches: int | None) -> int:
    """As many as configured, but no more than there are CPUs or batches."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers, cpus or 1)
    return workers if batches is None else min(workers, batches)
