"""What a training run says while it runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the device's allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class TrainingProgress:
    """Reports on iterations start..total. A context manager; silent in all but one process."""

    def __init__(self, start: int, total: int, quiet: bool = False) -> None:
        self.console = Console(highlight=False, quiet=quiet)
        self._start, self._total = start, total
        self._began = time.perf_counter()
        self._live = self.console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("starting", total=total, completed=start)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, iteration: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=iteration)

    def report(
        self, iteration: int, losses: dict[str, float], images_per_second: float, memory: float
    ) -> None:
        """Averages since the last report."""
        elapsed = time.perf_counter() - self._began
        remaining = elapsed / max(1, iteration - self._start) * (self._total - iteration)
        terms = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        text = (
            f"{terms}  {images_per_second:.1f} images/s  {memory:.1f} GiB  "
            f"{timedelta(seconds=round(remaining))} left"
        )
        if self._live:
            self._bar.update(self._task, completed=iteration, description=text)
        else:
            self.say(f"{iteration:>7}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, soft_wrap=True)
