"""Whole inference: images on the device to detections.

    python -m benchmarks.bench_inference [--quick] [--device cuda] [--output FILE]

Ours and torchvision's FCOS, both with a ResNet-50, channels_last, and on a GPU bfloat16 autocast;
images of 800 x 1344 there, one at a time and 16, and smaller ones on a CPU. "network alone" is ours
without post-processing. The weights are random and made to yield a usual number of candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fcos.cuda_graph import GraphedFunction
from fcos.detector import autocast
from fcos.inference import InferencePass
from fcos_ext import PostprocessOptions, postprocess_ref

from . import shapes
from .bench_train_step import Lazy
from .detectors import excite, our_config, our_network, torchvision_detector
from .harness import OURS, Case, Results, main

OP = "inference"
#: Of each image, compared with those of float32.
BEST = 5
Pass = Callable[..., Results]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    on_gpu = device.type == "cuda"
    size = (96, 128) if quick else shapes.IMAGE_SIZE if on_gpu else (320, 448)
    return [_case(device, n, size) for n in ((1,) if quick else (1, 16) if on_gpu else (1, 2))]


def _case(device: torch.device, images: int, size: tuple[int, int]) -> Case:
    on_gpu = device.type == "cuda"
    settings: dict[str, Any] = {"shape": [images, *size], "dtype": "bf16" if on_gpu else "float32"}
    if not on_gpu:
        settings["threads"] = 2 if size != (96, 128) else 1
    amp = "bf16" if on_gpu else "none"

    providers: dict[str, Pass] = {OURS: Lazy(lambda: _ours(device, amp, graph=on_gpu))}
    providers["network alone"] = Lazy(lambda: _network_alone(device, amp))
    providers["torchvision"] = Lazy(lambda: _torchvision(device, amp))
    if on_gpu:
        compiled = {"graph": True, "compile": True}
        providers["fcos_ext, without a graph"] = Lazy(lambda: _ours(device, amp))
        providers["fcos_ext, compiled"] = Lazy(lambda: _ours(device, amp, **compiled))
        providers["torchvision, compiled"] = Lazy(lambda: _torchvision(device, amp, compile=True))
    exact = Lazy(lambda: _torchvision(device, "none"))

    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(images, 3, *size, generator=generator)
        sizes = torch.tensor([size] * images)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        return pixels, sizes.to(device)

    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers=providers,
        reference=Lazy(lambda: _reference(device)),
        tolerance=5e-2 if on_gpu else 1e-4,
        own_reference={
            "network alone": Lazy(lambda: _network_alone(device, "none")),
            "torchvision": exact,
            "torchvision, compiled": exact,
        },
    )


def _ours(device: torch.device, amp: str, **switches: bool) -> Pass:
    config = our_config(device)
    network = our_network(config).to(device)
    excite(network.head.cls_logits)
    detect = InferencePass(network, config, device, amp=amp, **switches)
    return lambda images, sizes: (detect(images, sizes, sizes).scores[:, :BEST],)


def _reference(device: torch.device) -> Pass:
    """Of the same network in float32, by the reference of the post-processing."""
    config = our_config(device)
    network = our_network(config).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    excite(network.head.cls_logits)

    @torch.no_grad()
    def detect(images: Tensor, sizes: Tensor) -> Results:
        found = postprocess_ref(network(images), sizes, PostprocessOptions())
        assert int(found.counts.min()) >= BEST
        return (found.scores[:, :BEST].double(),)

    return detect


def _network_alone(device: torch.device, amp: str) -> Pass:
    config = our_config(device)
    network = our_network(config).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    excite(network.head.cls_logits)

    def forward(images: Tensor) -> tuple[Tensor]:
        with autocast(amp, device):
            predictions = network(images)
        return (torch.stack([level.float().mean() for part in predictions for level in part]),)

    run: Any = forward
    if device.type == "cuda" and amp != "none":
        run = GraphedFunction(forward, device, torch.channels_last)
    return torch.inference_mode()(lambda images, sizes: [x.double() for x in run(images)])


def _torchvision(device: torch.device, amp: str, compile: bool = False) -> Pass:
    model: Any = torchvision_detector().to(device, memory_format=torch.channels_last).eval()
    excite(model.head.classification_head.cls_logits)
    if compile:
        for name in ("backbone", "head"):
            setattr(model, name, torch.compile(getattr(model, name)))

    @torch.inference_mode()
    def detect(images: Tensor, sizes: Tensor) -> Results:
        with autocast(amp, device):
            found = model(list(images))
        return [image["scores"][:BEST].double() for image in found]

    return detect


if __name__ == "__main__":
    sys.exit(main(OP, cases))
