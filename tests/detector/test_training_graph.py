"""Training by CUDA graphs: the same weights as without, and nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fcos import engine, training
from fcos.checkpoint import load_checkpoint
from fcos.config import Config, ConfigError
from fcos.data.batches import Batch, training_loader
from fcos.data.coco import CocoDataset
from fcos.data.transforms import train_transforms
from fcos.distributed import Process
from fcos.engine import train
from fcos.training import Training
from tests.detector.stand_in_graph import StandInGraph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """On a CPU, the stand-in instead of graphs."""
    monkeypatch.setattr(engine.report, "write_start", lambda *arguments: None)
    monkeypatch.setattr(engine.report, "draw_training_batch", lambda *arguments: None)
    monkeypatch.setattr(engine.report, "plot_training_curves", lambda *arguments: None)
    if device == "cpu":
        monkeypatch.setattr(training, "GraphedFunction", StandInGraph)
        monkeypatch.setattr(engine.limits, "check", lambda *arguments: None)
    StandInGraph.recordings = StandInGraph.replays = 0
    yield


def changed(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "learning_rate": 0.01, "ema_decay": 0.0},
        {"accumulation": 2, "clip_gradient_norm": 0.0},
    ],
    ids=["adamw", "sgd", "accumulated"],
)
def test_weights_are_those_without_graphs(
    changes: dict[str, Any], device: str, short_run: Config, graphs: None
) -> None:
    shapes = ((96, 96),)  # the same padding for both
    config = replace(short_run, data=replace(short_run.data, image_shapes=shapes))
    config = changed(config, device=device, iterations=8, schedule="cosine", **changes)
    process = Process(0, 1, torch.device(device))
    assert config.train.output is not None
    eager = train(config, process)
    graph = train(changed(config, graph=True, output=eager.parent / "graph"), process)
    if device == "cpu":
        assert StandInGraph.recordings == 1 and StandInGraph.replays == 5
    a, b = (load_checkpoint(run / "last.pt") for run in (eager, graph))
    assert b["iteration"] == 8
    # A graph's rate is rounded to float32, and AdamW makes much of little; the rate or the batch of
    # another step would change weights by 1e-3.
    tolerance = {"rtol": 1e-3, "atol": 1e-4 if device == "cpu" else 3e-4}
    for name, value in a["model"].items():
        torch.testing.assert_close(
            b["model"][name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def test_resume(short_run: Config, device: str, graphs: None) -> None:
    """A run with graphs goes on without, and the other way round."""
    process = Process(0, 1, torch.device(device))
    config = changed(short_run, device=device, iterations=5, graph=True)
    run = train(config, process)
    train(changed(config, iterations=10, graph=False), process, resume=run)
    train(changed(config, iterations=15), process, resume=run)
    last = load_checkpoint(run / "last.pt")
    assert last["iteration"] == 15
    assert all(value.isfinite().all() for value in last["model"].values())


def test_needs_one_process_on_a_gpu(short_run: Config) -> None:
    message = r"train.graph needs one process on a GPU, got 1 on cpu; train.compile works anywhere"
    with pytest.raises(ConfigError, match=message):
        train(changed(short_run, graph=True), Process(0, 1, torch.device("cpu")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_step_waits_for_nothing(graph: bool, amp: str, short_run: Config) -> None:
    config = changed(short_run, device="cuda", graph=graph, amp=amp, channels_last=True)
    config = replace(config, model=replace(config.model, num_classes=6))
    dataset = CocoDataset(
        config.data.train_annotations,
        None,
        train_transforms(config.data),  # type: ignore[arg-type]
    )
    training = Training(config, Process(0, 1, torch.device("cuda")), dataset, None)
    batches: list[Batch] = list(training_loader(dataset, config.data, 2, iterations=8, fixed=True))
    for batch in batches[:5]:
        training.step(batch, 0.001)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [training.step(batch, 0.001) for batch in batches[5:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite().all() for loss in losses)
