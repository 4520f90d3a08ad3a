"""A training step in one process and in two, which share the work over gloo, of one thread each.

    python -m benchmarks.bench_processes [--quick] [--output FILE]

``tiny``'s network with frozen norms, images of 192 x 256, the losses' normalisers summed over the
processes. "fcos_ext" is the step in two processes, "1 process" what it is compared with, and of
"gradients not exchanged" each process steps by its own gradients, which tells what their exchange
takes. Under "strong" scaling ``shape`` is that of the whole batch in all of them, so that 2 would
be the ideal ratio of one process to two; under "weak" scaling it is that of each process, and 1 the
ideal. :func:`figures` makes images a second, efficiency and the share of the exchange of them.

Losses and weights after a step are compared with those of one process that has all images.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.process
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fcos.config import Config, TrainConfig
from fcos.data.batches import Batch
from fcos.distributed import Process, start_process, stop_process
from fcos.presets import tiny
from fcos.training import Training

from .bench_assign_targets import make_boxes
from .harness import OURS, Case, Results, main

OP = "processes"
PROCESSES = 2
SIZE, CLASSES, BOXES = (192, 256), 3, 7
#: Of the step that is checked; that of those that are timed is 0, so that all are alike.
RATE = 0.01
ONE, ALONE = "1 process", "gradients not exchanged"


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    """None on a GPU: it takes several to share work."""
    if device.type == "cuda":
        return []
    group = functools.cache(Group)
    size = (64, 96) if quick else SIZE
    batches = (2,) if quick else (4, 16)
    return [make_case(group, kind, n, size) for kind in ("strong", "weak") for n in batches]


def make_case(
    group: Callable[[int], Group], scaling: str, images: int, size: tuple[int, int]
) -> Case:
    total = images if scaling == "strong" else images * PROCESSES

    def exact(count: int, seed: int) -> Results:
        change, losses = checked_step(_training(Process(0, 1, torch.device("cpu"))), count, seed)
        return losses.double(), *[change.double()] * PROCESSES

    return Case(
        settings={"scaling": scaling, "shape": [images, 3, *size], "threads": 1},
        device=torch.device("cpu"),
        make_inputs=lambda seed: (seed, size),
        providers={
            OURS: Provider(group, PROCESSES, total),
            ONE: Provider(group, 1, images),
            ALONE: Provider(group, PROCESSES, total, exchange=False),
        },
        reference=lambda *inputs: exact(total, inputs),
        tolerance=1e-4,
        own_reference={
            ONE: lambda *inputs: exact(images, inputs)[:2],
            ALONE: lambda *inputs: exact(total, inputs)[:1],
        },
    )


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of each case: step times, images a second, efficiency, share of the exchange."""
    found = []
    by_case: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        by_case.setdefault((row["scaling"], row["shape"][0]), {})[row["provider"]] = row
    for (scaling, images), of_case in by_case.items():
        strong = scaling == "strong"
        both, one, alone = (of_case[name] for name in (OURS, ONE, ALONE))
        total = images if strong else images * PROCESSES
        found.append(
            {
                "scaling": scaling,
                "images": images,
                "step_ms": both["median_ms"],
                "step_ms_of_one": one["median_ms"],
                "images_per_s": total / both["median_ms"] * 1e3,
                "images_per_s_of_one": images / one["median_ms"] * 1e3,
                "efficiency": one["ratio_to_ours"] / (PROCESSES if strong else 1),
                "exchange_share": max(0.0, 1 - alone["ratio_to_ours"]),
            }
        )
    return found


# ---- in this process ----------------------------------------------------------------------------


class Provider:
    """A step of so many images, in all processes of a group together."""

    def __init__(
        self, group: Callable[[int], Group], processes: int, images: int, exchange: bool = True
    ) -> None:
        self.group, self.processes = group, processes
        self.images, self.exchange = images, exchange
        self.checked = False

    def __call__(self, *inputs: Any) -> Results:
        check, self.checked = not self.checked, True
        answers = self.group(self.processes).step(self.images, inputs, self.exchange, check)
        losses = torch.stack([losses for _, losses in answers]).sum(dim=0)
        return (losses, *(change for change, _ in answers)) if self.exchange else (losses,)


class Group:
    """Processes that wait for steps to do. They end when nobody needs the group any more."""

    def __init__(self, processes: int) -> None:
        context: Any = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])  # torch is imported once for all
        folder = tempfile.TemporaryDirectory(prefix="processes-")
        self._pipes: list[Connection] = []
        children = []
        for rank in range(processes):
            here, there = context.Pipe()
            arguments = (rank, processes, folder.name, there)
            child = context.Process(target=work, args=arguments, daemon=True)
            child.start()
            there.close()  # so that the end of the child is the end of the pipe
            self._pipes.append(here)
            children.append(child)
        weakref.finalize(self, _end, self._pipes, children, folder)

    def step(self, *order: Any) -> list[tuple[Tensor, Tensor]]:
        """Change of the weights (where asked for) and losses, by rank."""
        for pipe in self._pipes:
            pipe.send(order)
        return [tuple(map(torch.tensor, pipe.recv())) for pipe in self._pipes]  # type: ignore[misc]


def _end(
    pipes: Sequence[Connection],
    children: Sequence[multiprocessing.process.BaseProcess],
    folder: tempfile.TemporaryDirectory[str],
) -> None:
    for pipe in pipes:
        pipe.close()
    for child in children:
        child.join(timeout=10)
    folder.cleanup()


# ---- in each of them ----------------------------------------------------------------------------


def work(rank: int, processes: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    if processes > 1:
        meeting = (Path(folder) / "meeting").as_uri()
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=processes
        )
    training = _training(start_process("cpu"))
    while True:
        try:
            images, inputs, exchange, check = pipe.recv()
        except EOFError:
            break
        alone = contextlib.nullcontext()
        if not exchange and isinstance(training.forward, DistributedDataParallel):
            alone = training.forward.no_sync()
        with alone:
            if check:
                answer = checked_step(training, images, inputs)
            else:
                batch = share(training.process, images, *inputs)
                answer = torch.empty(0), training.step(batch, 0.0)
        pipe.send(tuple(x.tolist() for x in answer))
    stop_process()


def _training(process: Process) -> Training:
    preset = tiny()
    model = replace(preset.model, num_classes=CLASSES, frozen_batch_norm=True)
    train = TrainConfig(learning_rate=RATE, channels_last=True)
    return Training(Config(model=model, train=train), process, None, None, fresh=False)  # type: ignore[arg-type]


def checked_step(training: Training, images: int, inputs: Any) -> tuple[Tensor, Tensor]:
    """The step that changes the weights most, of all parameters but two in a hundred numbers.

    Returns:
        How they change, and the losses. The weights are as before then.
    """
    training.optimizer.state.clear()
    before = [p.detach().clone() for p in training.network.parameters()]
    losses = training.step(share(training.process, images, *inputs), RATE)
    changes = []
    with torch.no_grad():
        for parameter, old in zip(training.network.parameters(), before, strict=True):
            changes.append((parameter - old).flatten()[::50])
            parameter.copy_(old)
    return torch.cat(changes), losses


@functools.lru_cache(maxsize=64)
def share(process: Process, images: int, seed: int, size: tuple[int, int]) -> Batch:
    """What a process has of a batch."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, *size, generator=generator)
    boxes = torch.stack([make_boxes(BOXES, size, generator) for _ in range(images)])
    labels = torch.randint(CLASSES, (images, BOXES), generator=generator)
    count = images // process.world_size
    mine = slice(process.rank * count, (process.rank + 1) * count)
    sizes = torch.tensor([size] * count)
    counts = torch.full((count,), BOXES)
    ids = list(range(count))
    return Batch(pixels[mine], sizes, boxes[mine], labels[mine], counts, ids, sizes)


if __name__ == "__main__":
    sys.exit(main(OP, cases))
