"""A whole training step, from images and boxes on the device to new weights.

    python -m benchmarks.bench_train_step [--quick] [--device cuda] [--output FILE]

Ours and torchvision's FCOS, both with a ResNet-50, SGD, channels_last, and on a GPU bfloat16
autocast; 16 images of 800 x 1344 there, one smaller one on a CPU. "network alone" is our step with
a sum in place of the losses: no loss section can make a step faster than that. The learning rate
is 0, so that every step is the same and can be checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcos.cuda_graph import GraphedFunction
from fcos.data.batches import Batch
from fcos.detector import autocast
from fcos.distributed import Process
from fcos.losses import assign
from fcos.model import Predictions
from fcos.recorder import LOSSES
from fcos.training import Training
from fcos_ext import FCOSLossOptions, fcos_loss_ref

from . import shapes
from .bench_assign_targets import make_boxes
from .detectors import our_config, tame, torchvision_detector
from .harness import OURS, Case, Results, main

OP = "train_step"
BOXES = 7
Step = Callable[..., Results]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    on_gpu = device.type == "cuda"
    images = 16 if on_gpu and not quick else 1
    size = (96, 128) if quick else shapes.IMAGE_SIZE if on_gpu else (320, 448)
    settings: dict[str, Any] = {"shape": [images, *size], "dtype": "bf16" if on_gpu else "float32"}
    if not on_gpu:
        settings["threads"] = 1 if quick else 2

    providers: dict[str, Step] = {OURS: Lazy(lambda: _ours(device, graph=on_gpu))}
    providers["network alone"] = Lazy(lambda: _network_alone(device))
    providers["torchvision"] = Lazy(lambda: _torchvision(device))
    if on_gpu:
        providers["fcos_ext, without a graph"] = Lazy(lambda: _ours(device))
        providers["fcos_ext, compiled"] = Lazy(lambda: _ours(device, graph=True, compile=True))
        providers["torchvision, compiled"] = Lazy(lambda: _torchvision(device, compile=True))
    exact = Lazy(lambda: _torchvision(device, amp="none"))
    return [
        Case(
            settings=settings,
            device=device,
            make_inputs=lambda seed: _inputs(images, size, device, seed),
            providers=providers,
            reference=Lazy(lambda: _reference(device)),
            # bfloat16 has 8 bits; what sums up thousands of losses is far more exact
            tolerance=2e-2 if on_gpu else 1e-4,
            own_reference={
                "network alone": Lazy(lambda: _network_alone(device, amp="none")),
                "torchvision": exact,
                "torchvision, compiled": exact,
            },
        )
    ]


class Lazy:
    """A provider whose network is built when it first runs."""

    def __init__(self, build: Callable[[], Step]) -> None:
        self._build = build
        self._step: Step | None = None

    def __call__(self, *inputs: Tensor) -> Results:
        if self._step is None:
            self._step = self._build()
        return self._step(*inputs)


def _inputs(
    images: int, size: tuple[int, int], device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, *size, generator=generator)
    boxes = torch.stack([make_boxes(BOXES, size, generator) for _ in range(images)])
    labels = torch.randint(shapes.NUM_CLASSES, (images, BOXES), generator=generator)
    pixels = pixels.to(device, memory_format=torch.channels_last)
    return pixels, boxes.to(device), labels.to(device)


def _training(device: torch.device, **switches: bool) -> Training:
    """Of random weights, as the command line builds it."""
    torch.manual_seed(0)
    process = Process(0, 1, device)
    config = our_config(device, **switches)
    training = Training(config, process, None, None, fresh=False)  # type: ignore[arg-type]
    tame(training.network)
    return training


def _ours(device: torch.device, **switches: bool) -> Step:
    training = _training(device, **switches)

    def step(images: Tensor, boxes: Tensor, labels: Tensor) -> Results:
        count = len(images)
        sizes = torch.tensor([images.shape[2:]] * count)
        counts = torch.full((count,), boxes.shape[1])
        batch = Batch(images, sizes, boxes, labels, counts, [0] * count, sizes)
        return training.step(batch, 0.0).unbind()

    return step


def _reference(device: torch.device) -> Step:
    """The same losses in float32 by the reference of the loss section."""
    training = _training(device)
    config = training.config
    options = FCOSLossOptions(box_loss=config.loss.box_loss)

    def losses(images: Tensor, boxes: Tensor, labels: Tensor) -> Results:
        size = (images.shape[2], images.shape[3])
        counts = torch.full((len(images),), boxes.shape[1], device=device)
        targets = assign(size, config.model, boxes, labels, counts)
        with torch.no_grad():
            loss = fcos_loss_ref(training.network(images), targets, options)
        return [getattr(loss, name).double() for name in LOSSES]

    return losses


def _network_alone(device: torch.device, amp: str | None = None) -> Step:
    training = _training(device)
    network, amp = training.network, amp or training.config.train.amp

    def step(images: Tensor) -> tuple[Tensor]:
        training.optimizer.zero_grad(set_to_none=True)
        with autocast(amp, device):
            predictions: Predictions = network(images)
        total = torch.stack([level.float().mean() for part in predictions for level in part]).sum()
        total.backward()
        training.optimizer.step()
        return (total.detach(),)

    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    run: Any = step
    if device.type == "cuda" and amp != "none":
        run = GraphedFunction(step, device, torch.channels_last)
    return lambda images, boxes, labels: run(images)


def _torchvision(device: torch.device, compile: bool = False, amp: str = "bf16") -> Step:
    model: Any = torchvision_detector().to(device, memory_format=torch.channels_last).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
    amp = amp if device.type == "cuda" else "none"
    if compile:
        for name in ("backbone", "head"):
            compiled: nn.Module = torch.compile(getattr(model, name))
            setattr(model, name, compiled)

    def step(images: Tensor, boxes: Tensor, labels: Tensor) -> Results:
        optimizer.zero_grad(set_to_none=True)
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
        with autocast(amp, device):
            losses = list(model(list(images), targets).values())
        torch.stack(losses).sum().backward()
        optimizer.step()
        return [loss.detach().double() for loss in losses]

    return step


if __name__ == "__main__":
    sys.exit(main(OP, cases))
