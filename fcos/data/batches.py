"""Samples into batches, and the loaders that yield them."""

from __future__ import annotations

import atexit
import multiprocessing.process
import os
import signal
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcos.config import DataConfig
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
    """N samples; the boxes of all images in one tensor, image after image."""

    images: Tensor
    """float32 [N, 3, H, W], zero padded at the right and the bottom."""
    image_sizes: Tensor
    """int64 [N, 2] (height, width) of each image inside the padding."""
    boxes: Tensor
    """float32 [sum M, 4] xyxy pixels."""
    labels: Tensor
    """int64 [sum M], 0..C-1."""
    offsets: Tensor
    """int64 [N + 1]: image i has boxes offsets[i] to offsets[i + 1]."""
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
        return Batch(
            self.images.to(device, non_blocking=non_blocking, memory_format=memory_format),
            self.image_sizes.to(device, non_blocking=non_blocking),
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.offsets.to(device, non_blocking=non_blocking),
            self.image_ids,
            self.original_sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; DataLoader calls this."""
        return Batch(
            self.images.pin_memory(),
            self.image_sizes.pin_memory(),
            self.boxes.pin_memory(),
            self.labels.pin_memory(),
            self.offsets.pin_memory(),
            self.image_ids,
            self.original_sizes.pin_memory(),
        )

    def split(self, parts: int) -> list[Batch]:
        """Equal consecutive parts, with the padding of the whole (for gradient accumulation).

        Call it before moving the batch to a GPU: it reads the offsets.

        Raises:
            ValueError: The number of images is not a multiple of `parts`.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"split: {len(self)} images do not make {parts} equal parts")
        step = len(self) // parts
        offsets = self.offsets.tolist()
        batches = []
        for first in range(0, len(self), step):
            last = first + step
            boxes = slice(offsets[first], offsets[last])
            batches.append(
                Batch(
                    self.images[first:last],
                    self.image_sizes[first:last],
                    self.boxes[boxes],
                    self.labels[boxes],
                    self.offsets[first : last + 1] - offsets[first],
                    self.image_ids[first:last],
                    self.original_sizes[first:last],
                )
            )
        return batches


def pad_images(images: Sequence[Tensor], size_divisor: int = 32) -> tuple[Tensor, Tensor]:
    """Puts images of different sizes into one tensor.

    Args:
        images (sequence of Tensor[3, H_i, W_i]): At least one.
        size_divisor (int): Height and width of the result are multiples of this.

    Returns:
        (Tensor[N, 3, H, W], Tensor[N, 2]): The images, zero at the right and the bottom, and
        the int64 (height, width) of each, on the CPU.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("pad_images: images must hold at least one image, got none")
    sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64)
    height, width = (-(-int(side) // size_divisor) * size_divisor for side in sizes.amax(0))
    padded = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for slot, image in zip(padded, images, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]].copy_(image)
    return padded, sizes


def collate(samples: Sequence[Sample], size_divisor: int = 32) -> Batch:
    """Makes a batch of samples; see `pad_images` for the padding."""
    images, sizes = pad_images([sample.image for sample in samples], size_divisor)
    counts = torch.tensor([0] + [len(sample.boxes) for sample in samples], dtype=torch.int64)
    return Batch(
        images=images,
        image_sizes=sizes,
        boxes=torch.cat([sample.boxes for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        offsets=counts.cumsum(0),
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
) -> DataLoader[Sample]:
    """Yields the `Batch` of this process for iterations start_iteration..iterations - 1.

    With `accumulation`, call `Batch.split` on each; see `TrainingBatches` for the arguments.

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
        collate_fn=collate,
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
) -> DataLoader[Sample]:
    """Yields this process's consecutive share of all images in order, each image once.

    Args:
        dataset (CocoDataset): The images.
        config (DataConfig): For the number of workers.
        batch_size (int): Images a batch of this process; the last batch may be smaller.
        rank (int), world_size (int): Which share; shares differ by at most one image.

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
        collate_fn=collate,
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
