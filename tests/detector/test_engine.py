"""Training: what a run does, leaves behind, survives, and refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fcos import engine, training
from fcos.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fcos.config import Config, ConfigError
from fcos.config_files import load_yaml
from fcos.distributed import Process
from fcos.engine import train
from fcos.interrupt import Interrupted
from fcos.recorder import NonFiniteLossError

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training does here: only where the pictures are looked at."""
    if request.function not in (test_run_folder_contents, test_without_validation):
        for name in ("write_start", "draw_training_batch", "plot_training_curves"):
            monkeypatch.setattr(engine.report, name, lambda *arguments: None)


def changed(config: Config, section: str = "train", **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def with_validation(config: Config, shapes: Path) -> Config:
    return changed(config, "data", val_annotations=shapes / "val.json")


def stop_after(iteration: int, patch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Send a signal in the middle of that iteration."""
    step = training.Training.step

    def stepping(self: Any, *arguments: Any) -> Tensor:
        if self.iteration + 1 == iteration:
            signal.raise_signal(number)
        return step(self, *arguments)

    patch.setattr(training.Training, "step", stepping)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_one(
    workers: int, short_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(changed(short_run, iterations=12), "data", workers=workers, photometric=True)
    if workers:  # its average is a state, too
        config = changed(config, "loss", normalizer="moving")
    whole = train(config, HERE)
    config = changed(config, output=tmp_path / "parts")
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Interrupted, match="stopped after iteration 5 and saved") as caught:
            train(config, HERE)
    assert caught.value.exit_code == 143
    parts = tmp_path / "parts"
    assert f"fcos train --resume {parts}" in str(caught.value)
    assert load_checkpoint(parts / "last.pt")["iteration"] == 5
    resumed = load_checkpoint(parts / "last.pt")["config"]
    assert train(resumed, HERE, resume=parts) == parts

    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(parts / "last.pt")
    assert a["iteration"] == b["iteration"] == 12
    assert {"network", "optimizer", "average_started", "random"} <= set(a["training"])
    assert len(a["training"]["optimizer"]["state"]) > 50
    assert_same(a["model"], b["model"], "model")
    assert_same(a["training"], b["training"], "training")
    assert not torch.equal(a["model"]["head.scales"], a["training"]["network"]["head.scales"]), (
        "the average is the weights themselves, and its state is not tested"
    )
    iterations = [int(row["iteration"]) for row in rows(parts)]
    assert iterations == [2, 4, 5, 6, 8, 10, 12]
    last = [{k: row[k] for k in ("cls", "box", "lr")} for row in (rows(whole)[-1], rows(parts)[-1])]
    assert last[0] == last[1]


def test_metrics_after_a_crash(
    short_run: Config, monkeypatch: pytest.MonkeyPatch, shapes: Path
) -> None:
    """Rows written after the last checkpoint are written again, not twice."""
    config = with_validation(changed(short_run, iterations=8, eval_every=4, log_every=1), shapes)
    step = training.Training.step

    def crash(self: Any, *arguments: Any) -> Tensor:
        if self.iteration == 6:
            raise MemoryError
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "step", crash)
        with pytest.raises(MemoryError):
            train(config, HERE)
    run = config.train.output
    assert run is not None
    assert [int(row["iteration"]) for row in rows(run)] == [1, 2, 3, 4, 4, 5, 6]
    train(load_checkpoint(run / "last.pt")["config"], HERE, resume=run)
    losses = [int(row["iteration"]) for row in rows(run) if row["cls"]]
    assert losses == list(range(1, 9))
    assert [int(row["iteration"]) for row in rows(run) if row["ap"]] == [4, 8]


def test_run_folder_contents(short_run: Config, shapes: Path) -> None:
    config = with_validation(changed(short_run, iterations=4, eval_every=2), shapes)
    run = train(config, HERE, "shapes")
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "env.json",
        "best.pt",
        "last.pt",
        "results.png",
        "train_batch.jpg",
        "val_predictions.jpg",
        "precision_recall.png",
        "confusion.png",
        "labels.png",
        "evaluation.json",
    }
    resolved = changed(config, "model", num_classes=6)
    assert load_yaml(run / "config.yaml") == resolved
    assert json.loads((run / "env.json").read_text())["device"] == "cpu"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["images"] == 5 and 0 <= evaluation["AP"] <= 1
    for picture in (*run.glob("*.png"), *run.glob("*.jpg")):
        with Image.open(picture) as image:
            assert min(image.size) > 60, picture.name
    best = load_checkpoint(run / "best.pt")
    assert best["config"] == resolved and "training" not in best
    assert best["class_names"] == load_checkpoint(run / "last.pt")["class_names"]
    assert len(best["class_names"]) == 6
    evaluated = [row for row in rows(run) if row["ap"]]
    assert [row["iteration"] for row in evaluated] == ["2", "4"]
    assert float(evaluated[-1]["ap"]) == pytest.approx(evaluation["AP"], abs=1e-6)
    rates = [float(row["lr"]) for row in rows(run) if row["lr"]]
    expected = [training.optim.learning_rate(i, config.train) for i in (1, 3)]
    assert rates == pytest.approx(expected, rel=1e-5)  # written with six digits

    with pytest.raises(ConfigError, match="holds a run already: continue it with --resume"):
        train(config, HERE)


def test_without_validation(short_run: Config) -> None:
    run = train(changed(short_run, iterations=2), HERE)
    names = {path.name for path in run.iterdir()}
    assert {"last.pt", "results.png", "train_batch.jpg", "labels.png"} <= names
    assert not names & {"best.pt", "evaluation.json", "confusion.png"}


def test_best_is_the_moving_average(
    short_run: Config, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_validation(changed(short_run, iterations=4, eval_every=4), shapes)
    step = training.Training.step
    expected: dict[str, Tensor] = {}

    def noting(self: Any, *arguments: Any) -> Tensor:
        losses = step(self, *arguments)
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                old = expected.get(name, value)
                expected[name] = 0.9 * old + 0.1 * value
        return losses

    monkeypatch.setattr(training.Training, "step", noting)
    run = train(config, HERE)
    best = load_checkpoint(run / "best.pt")["model"]
    last = load_checkpoint(run / "last.pt")
    for name, value in expected.items():
        torch.testing.assert_close(best[name], value, rtol=1e-4, atol=1e-6)
    assert_same(best, last["model"])
    weight = "head.cls_logits.weight"
    assert (best[weight] - last["training"]["network"][weight]).abs().max() > 1e-4


def test_best_is_kept_when_the_ap_falls(
    short_run: Config, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_validation(changed(short_run, iterations=4, eval_every=1), shapes)
    aps = iter([0.1, 0.3, 0.2, 0.3])
    monkeypatch.setattr(engine.report, "write_evaluation", lambda *a: None)
    evaluate = training.evaluate_coco
    monkeypatch.setattr(
        training, "evaluate_coco", lambda *a, **k: replace(evaluate(*a, **k), AP=next(aps))
    )
    run = train(config, HERE)
    assert load_checkpoint(run / "best.pt")["iteration"] == 2
    last = load_checkpoint(run / "last.pt")
    assert last["iteration"] == 4 and last["training"]["best_ap"] == 0.3


@pytest.mark.parametrize("term", training.LOSSES)
def test_non_finite_loss(
    term: str, short_run: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = changed(short_run, iterations=9, eval_every=3, log_every=20)
    losses, batches = training.fcos_losses, []

    def poisoned(*arguments: Any) -> dict[str, Tensor]:
        result = losses(*arguments)
        if len(batches) == 5:
            result[term] = result[term] * torch.nan
        return result

    step = training.Training.step

    def noting(self: Any, batch: Any, rate: float) -> Tensor:
        batches.append(batch.image_ids)
        return step(self, batch, rate)

    monkeypatch.setattr(training, "fcos_losses", poisoned)
    monkeypatch.setattr(training.Training, "step", noting)
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, HERE)
    message = str(caught.value)
    assert f"the {term} loss is not finite at iteration 5, images {batches[4]}" in message
    run = config.train.output
    assert run is not None and f"{run / 'last.pt'} is from before" in message
    last = load_checkpoint(run / "last.pt")
    assert last["iteration"] == 3
    assert all(v.isfinite().all() for v in last["training"]["network"].values())
    # and training can go on from it
    monkeypatch.undo()
    train(changed(last["config"], iterations=4), HERE, resume=run)


def test_non_finite_weights_are_not_saved(
    short_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss whose gradient is not: the next loss would tell, but too late."""
    config = changed(short_run, iterations=4, eval_every=2)
    step = training.Training.step

    def overflowing(self: Any, *arguments: Any) -> Tensor:
        losses = step(self, *arguments)
        if self.iteration == 3:
            with torch.no_grad():
                self.network.head.scales[1] = torch.nan
        return losses

    monkeypatch.setattr(training.Training, "step", overflowing)
    with pytest.raises(NonFiniteLossError, match="head.scales"):
        train(config, HERE)
    run = config.train.output
    assert run is not None
    assert load_checkpoint(run / "last.pt")["iteration"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True, "optimizer": "sgd", "learning_rate": 0.01, "ema_decay": 0.0},
        {"amp": "bf16", "clip_gradient_norm": 0.0},
        {"accumulation": 2},
    ],
)
def test_settings_give_about_the_same_start(changes: dict[str, Any], short_run: Config) -> None:
    run = train(changed(short_run, iterations=2, log_every=1, **changes), HERE)
    plain = train(changed(short_run, iterations=2, log_every=1, output=run / "plain"), HERE)
    first, reference = rows(run)[0], rows(plain)[0]
    for name in training.LOSSES:
        # accumulation halves what batch norm sees
        tolerance = 0.2 if "accumulation" in changes else 0.05
        assert float(first[name]) == pytest.approx(float(reference[name]), rel=tolerance)


def test_accumulation_gives_the_same_weights(short_run: Config) -> None:
    config = changed(short_run, "model", frozen_batch_norm=True)
    config = changed(config, "data", min_sizes=(64,))
    config = changed(config, iterations=3, batch_size=4, optimizer="sgd", learning_rate=0.01)
    one = train(config, HERE)
    two = train(changed(config, accumulation=2, output=one / "two"), HERE)
    a, b = (load_checkpoint(run / "last.pt")["training"]["network"] for run in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    initial = training.FCOS(load_checkpoint(one / "last.pt")["config"].model).state_dict()
    assert any(not torch.equal(initial[name], a[name]) for name in a)


def test_resume_with_more_iterations(short_run: Config) -> None:
    run = train(changed(short_run, iterations=3), HERE)
    loaded = load_checkpoint(run / "last.pt")["config"]
    train(changed(loaded, iterations=5, weight_decay=0.125), HERE, resume=run)
    last = load_checkpoint(run / "last.pt")
    assert last["iteration"] == 5
    assert load_yaml(run / "config.yaml").train.iterations == 5
    # a changed setting of the optimiser is obeyed
    groups = last["training"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]


def test_resume_can_start_an_average(short_run: Config) -> None:
    run = train(changed(short_run, iterations=2, ema_decay=0.0), HERE)
    loaded = load_checkpoint(run / "last.pt")["config"]
    train(changed(loaded, iterations=4, ema_decay=0.5), HERE, resume=run)
    assert load_checkpoint(run / "last.pt")["training"]["average_started"] is True


def test_resume_refuses_another_network(short_run: Config, shapes: Path, tmp_path: Path) -> None:
    run = train(changed(short_run, iterations=1), HERE)
    loaded = load_checkpoint(run / "last.pt")["config"]
    for section, changes, message in (
        ("model", {"tower_convs": 3}, r"model.tower_convs cannot change .* it is \d, got 3"),
        ("model", {"activation": "exp"}, "model.activation cannot change"),
        ("train", {"optimizer": "sgd"}, "train.optimizer cannot change .* it is adamw, got sgd"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(changed(loaded, section, **changes), HERE, resume=run)
    document = json.loads((shapes / "train.json").read_text())
    document["categories"][0]["name"] = "blob"
    (tmp_path / "other.json").write_text(json.dumps(document))
    other = changed(
        loaded, "data", train_annotations=tmp_path / "other.json", train_images=shapes / "images"
    )
    with pytest.raises(CheckpointError, match="was trained on the classes .*, the annotations"):
        train(other, HERE, resume=run)
    with pytest.raises(CheckpointError, match="no such file"):
        train(loaded, HERE, resume=tmp_path / "nowhere")
    plain = torch.load(run / "last.pt", weights_only=True)
    del plain["training"], plain["format"]
    save_checkpoint(run / "last.pt", {**plain, "config": loaded})
    with pytest.raises(CheckpointError, match="holds no training state to resume from"):
        train(loaded, HERE, resume=run)


def test_resume_does_not_need_the_backbone_weights(short_run: Config, tmp_path: Path) -> None:
    trunk = training.FCOS(replace(short_run.model, num_classes=6)).backbone.body
    torch.save(trunk.state_dict(), tmp_path / "trunk.pt")
    config = changed(short_run, "model", backbone_weights=str(tmp_path / "trunk.pt"))
    run = train(changed(config, iterations=1), HERE)
    (tmp_path / "trunk.pt").unlink()
    loaded = load_checkpoint(run / "last.pt")["config"]
    train(changed(loaded, iterations=2), HERE, resume=run)


def test_errors(short_run: Config, shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "train.json").read_text())
    document["categories"][0]["name"] = "blob"
    (tmp_path / "other.json").write_text(json.dumps(document))
    for section, changes, message in (
        ("data", {"train_annotations": None}, "data.train_annotations must name a COCO JSON"),
        ("model", {"num_classes": 3}, "model.num_classes is 3, but .*train.json has 6 categories"),
        (
            "data",
            {"val_annotations": tmp_path / "other.json", "val_images": shapes / "images"},
            "other.json has the categories blob, .*, the training annotations",
        ),
        ("train", {"batch_size": 3, "accumulation": 2}, "train.batch_size must be a .* = 2, got 3"),
        ("train", {"output": shapes / "train.json"}, "train.output .* cannot be written to"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(changed(short_run, section, **changes), HERE)
    run = short_run.train.output
    assert run is not None and not run.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes(number: int, short_run: Config, shapes: Path) -> None:
    """As Ctrl-C in a terminal, torchrun and schedulers send it: the loader's processes get it."""
    run = short_run.train.output
    assert run is not None
    command = [sys.executable, "-m", "fcos", "train", "tiny"]
    command += ["--train.output", run, "--data.train-annotations", shapes / "train.json"]
    command += ["--data.min-sizes", "64", "--data.workers", "2", "--train.batch-size", "2"]
    command += ["--train.log-every", "1", "--train.device", "cpu", "--train.threads", "1"]
    started = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.csv").exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(started.pid, number)
        _, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 128 + number, errors
    last = load_checkpoint(run / "last.pt")
    expected = (
        f"fcos: stopped after iteration {last['iteration']} and saved. "
        f"Go on with: fcos train --resume {run}\n"
    )
    assert errors == expected
