"""Losses of a training run: averaged, checked and reported now and then."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .distributed import Process
from .progress import TrainingProgress, memory_gib
from .run_folder import RunFolder

LOSSES = ("cls", "box", "centerness")


class NonFiniteLossError(RuntimeError):
    """A loss or a weight became NaN or infinite. No checkpoint was written with it."""

    def __init__(self, what: str, run: RunFolder) -> None:
        kept = f"{run.last} is from before" if run.last.exists() else "no checkpoint had been saved"
        super().__init__(
            f"{what}. Training stopped; {kept}. A lower train.learning_rate, a longer "
            "train.warmup_iterations or train.clip_gradient_norm may help"
        )


class Recorder:
    """Losses since the last flush. They stay on the device, which is not waited for until then."""

    def __init__(self, process: Process, run: RunFolder, bar: TrainingProgress) -> None:
        self._process, self._run, self._bar = process, run, bar
        self._steps: list[tuple[int, Tensor, list[int]]] = []
        self._since = time.perf_counter()

    def add(self, iteration: int, losses: Tensor, image_ids: list[int]) -> None:
        self._steps.append((iteration, losses, image_ids))

    def flush(self, rate: float, batch_size: int) -> None:
        """Report the averages. Raises NonFiniteLossError if any loss is not finite."""
        if not self._steps:
            return
        own = torch.stack([losses for _, losses, _ in self._steps])
        self._check(own)
        mean = self._process.sum(own).mean(0).tolist()
        iteration = self._steps[-1][0]
        now = time.perf_counter()
        speed = len(self._steps) * batch_size / (now - self._since)
        memory = memory_gib(self._process.device)
        losses = dict(zip(LOSSES, mean, strict=True)) | {"total": sum(mean)}
        if self._process.is_main:
            self._run.add_row(
                iteration=iteration, lr=rate, images_per_second=speed, memory_gib=memory, **losses
            )
        self._bar.report(iteration, losses, speed, memory)
        self._steps.clear()
        self._since = time.perf_counter()

    def _check(self, own: Tensor) -> None:
        finite = own.isfinite().tolist()
        bad = next((i for i, row in enumerate(finite) if not all(row)), None)
        if not self._process.any(bad is not None):
            return
        message = "a loss of another process is not finite"
        if bad is not None:
            iteration, _, image_ids = self._steps[bad]
            terms = [name for name, ok in zip(LOSSES, finite[bad], strict=True) if not ok]
            message = (
                f"the {' and '.join(terms)} loss is not finite at iteration {iteration}, images "
                f"{image_ids}"
            )
        raise NonFiniteLossError(message, self._run)
