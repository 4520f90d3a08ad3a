"""What accelerated post-processing calls, waits for and holds in memory."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Case, peak_extra_bytes
from tests.integrations.torchvision_models import (
    MODELS,
    accelerated_copy,
    make_model,
    make_outputs,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
#: What changes no memory and starts nothing.
VIEWS = {"transpose", "unsqueeze", "select", "slice", "view", "lift_fresh", "promote_types"}


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def arguments_of(model: Any, device: str = "cpu") -> tuple[Any, ...]:
    padded, images = (256, 320), 4
    outputs, anchors, counts = make_outputs(model, padded, images)
    levels = {
        name: list(output.to(device).split(counts, dim=1)) for name, output in outputs.items()
    }
    split = [list(of_image.to(device).split(counts)) for of_image in anchors]
    return levels, split, [padded] * images


@pytest.mark.parametrize("cls", MODELS)
def test_one_operator_for_the_batch(cls: type) -> None:
    """And nothing else that reads or writes tensors, but the sizes of the images."""
    model = make_model(cls, 20)
    arguments = arguments_of(model)
    counts = []
    for each in (accelerated_copy(model), model):
        with Calls() as calls:
            each.postprocess_detections(*arguments)
        counts.append(calls.counts)
    ours, theirs = counts
    rest = {name: count for name, count in ours.items() if name not in VIEWS}
    assert rest == {"postprocess": 1}
    assert theirs.total() > 6 * ours.total()


@pytest.mark.parametrize("cls", MODELS)
def test_peak_memory(cls: type) -> None:
    """Nothing of the size of the logits."""
    model = make_model(cls, 20)
    twin = accelerated_copy(model)
    arguments = arguments_of(model)
    logits = sum(level.nbytes for level in arguments[0]["cls_logits"])

    def extra(model: Any) -> int:
        def run() -> list[Tensor]:
            return [x for found in model.postprocess_detections(*arguments) for x in found.values()]

        run()
        return peak_extra_bytes(
            Case({}, torch.device("cpu"), lambda seed: (), {"": run}, run, 0, 0), "", ()
        )

    assert extra(twin) <= logits / 40 < extra(model)


@NO_GPU
@pytest.mark.parametrize("cls", MODELS)
def test_the_host_waits_once(cls: type) -> None:
    """For the numbers of detections."""
    model = make_model(cls, 20)
    twin = accelerated_copy(model)
    arguments = arguments_of(model, "cuda")
    twin.postprocess_detections(*arguments)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            twin.postprocess_detections(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1
