"""Two processes over gloo do what one does with all the images."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from fcos.checkpoint import load_checkpoint
from fcos.config import Config, ConfigError, LossConfig, TrainConfig
from fcos.data.batches import Batch, Sample, collate
from fcos.data.coco import CocoDataset
from fcos.data.transforms import eval_transforms
from fcos.distributed import Process, choose_device, start_process, stop_process
from fcos.engine import _new_folder
from fcos.inference import InferencePass, detect_dataset
from fcos.losses import assign
from fcos.model import FCOS
from fcos.presets import tiny
from fcos.training import Training

HERE = Process(0, 1, torch.device("cpu"))
FROZEN = replace(tiny().model, num_classes=3, frozen_batch_norm=True)
MANY = [[[4, 4, 40, 40], [8, 8, 60, 50], [0, 20, 63, 62]]] * 2
ONE = [[[10, 10, 30, 36]], []]
NONE: list[list[list[int]]] = [[], []]
CASES = {
    "positives in both": MANY + ONE,
    "positives in one": NONE + ONE,
    "positives in the other": ONE + NONE,
    # 1 in all: fewer than one in each process, on the average
    "a single one": [[[2, 2, 8, 8]], [], [], []],
    "none": NONE + NONE,
}

LOCAL = ("positives in both", "positives in one", "none")


def batch_of(truths: list[list[list[int]]], rank: int = 0, world_size: int = 1) -> Batch:
    """The share of one process."""
    torch.manual_seed(1)
    samples = []
    for number, boxes in enumerate(truths):
        image = torch.randn(3, 64, 64)
        truth = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        samples.append(Sample(image, truth, torch.arange(len(boxes)), number, (64, 64)))
    share = len(samples) // world_size
    return collate(samples[rank * share : (rank + 1) * share])


def step(
    process: Process,
    truths: list[list[list[int]]],
    accumulation: int,
    normalizer: Any = "all_reduced",
    share: Batch | None = None,
) -> dict[str, Any]:
    """Losses and gradients of an optimiser step on four images, over all processes."""
    train = TrainConfig(learning_rate=0.01, accumulation=accumulation)
    config = Config(FROZEN, LossConfig(normalizer=normalizer), train=train)
    training = Training(config, process, None, None)  # type: ignore[arg-type]
    if share is None:
        share = batch_of(truths, process.rank, process.world_size)
    losses = process.sum(training.step(share, 0.01))
    gradients = {name: p.grad for name, p in training.network.named_parameters()}
    return {"losses": losses, **gradients}


def detections(process: Process, shapes: Path) -> list[dict[str, Any]]:
    config = tiny()
    config = replace(config, data=replace(config.data, min_sizes=(64,), max_size=96, workers=0))
    torch.manual_seed(0)
    network = FCOS(replace(config.model, num_classes=6)).eval()
    with torch.no_grad():
        network.head.cls_logits.bias.fill_(0.0)
        network.head.ltrb.bias.fill_(2.0)
    dataset = CocoDataset(shapes / "val.json", transforms=eval_transforms(config.data))
    detect = InferencePass(network, config, process.device)
    return detect_dataset(detect, dataset, config, process, batch_size=1)


def two_processes(rank: int, folder: Path, shapes: Path) -> None:
    """One of them; runs everything, as starting processes takes the longest."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    process = start_process("cpu")
    steps = {name: step(process, truths, 1) for name, truths in CASES.items()}
    steps["accumulated"] = step(process, CASES["positives in both"], 2)
    for name in LOCAL:
        steps[f"local, {name}"] = step(process, CASES[name], 1, "local")
    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 5)
    process.share_buffers(norm)
    seen = {
        "process": (process.rank, process.world_size, process.is_main, str(process.device)),
        "sum": process.sum(torch.tensor([1.0 + rank])).item(),
        "any": [process.any(flag) for flag in (False, rank == 0, rank == 1, True)],
        "gather": process.gather({"rank": rank}),
        "broadcast": process.broadcast([rank, "a"]),
        "buffer": norm.running_mean.tolist(),
        "steps": steps,
        "detections": detections(process, shapes),
    }
    taken = folder / "taken"
    config = replace(Config(), train=TrainConfig(output=taken))
    seen["folder"] = str(_new_folder(config, process, "x").path)
    process.barrier()
    (taken / "metrics.csv").touch()
    process.barrier()
    try:
        _new_folder(config, process, "x")
    except ConfigError as error:
        seen["refused"] = str(error)
    torch.save(seen, folder / f"{rank}.pt")
    stop_process()
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(two_processes, (folder, shapes), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, "accumulated"])
def test_step_equals_that_of_one_process(
    case: str, seen: list[dict[str, Any]], one_thread: None
) -> None:
    expected = step(HERE, CASES["positives in both" if case == "accumulated" else case], 1)
    assert expected["losses"][0] > 0
    assert (expected["losses"][1] > 0) == (case != "none")
    for rank in range(2):
        found = seen[rank]["steps"][case]
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", LOCAL)
def test_local_normalizers(case: str, seen: list[dict[str, Any]], one_thread: None) -> None:
    """The step is the average of those that each process would take alone."""
    alone = [step(HERE, [], 1, "local", batch_of(CASES[case], rank, 2)) for rank in range(2)]
    for rank in range(2):
        found = seen[rank]["steps"][f"local, {case}"]
        for name in alone[0]:
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    if case == "positives in both":  # the halves have unequal numbers
        both = step(HERE, CASES[case], 1)["losses"]
        assert not torch.allclose((alone[0]["losses"] + alone[1]["losses"]) / 2, both, rtol=1e-3)


def test_a_single_positive(one_thread: None) -> None:
    """The case above is what it says."""
    one = batch_of(CASES["a single one"])
    targets = assign((64, 64), FROZEN, one.boxes, one.labels, one.counts)
    assert targets.num_pos.sum() == 1


def test_evaluation_equals_that_of_one_process(
    seen: list[dict[str, Any]], shapes: Path, one_thread: None
) -> None:
    expected = detections(HERE, shapes)
    assert len({result["image_id"] for result in expected}) == 5  # 2 and 3 of them
    assert seen[1]["detections"] == []
    assert len(seen[0]["detections"]) == len(expected)
    for found, result in zip(seen[0]["detections"], expected, strict=True):
        assert found["image_id"] == result["image_id"]
        assert found["category_id"] == result["category_id"]
        assert found["bbox"] == pytest.approx(result["bbox"], rel=1e-4, abs=1e-3)
        assert found["score"] == pytest.approx(result["score"], rel=1e-4)


def test_communication(seen: list[dict[str, Any]]) -> None:
    assert [s["process"] for s in seen] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    for s in seen:
        assert s["sum"] == 3
        assert s["any"] == [False, True, True, True]
        assert s["broadcast"] == [0, "a"]
        assert s["buffer"] == [5, 5]
    assert [s["gather"] for s in seen] == [[{"rank": 0}, {"rank": 1}], []]


def test_all_processes_agree_on_the_run_folder(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["folder"] == seen[1]["folder"]
    assert "holds a run already" in seen[0]["refused"]
    assert seen[0]["refused"] == seen[1]["refused"]


def test_one_process_needs_no_group() -> None:
    process = start_process("cpu")
    assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
    assert process.sum(torch.ones(1)).item() == 1
    assert process.any(True) and not process.any(False)
    assert process.gather(3) == [3] and process.broadcast(3) == 3
    process.barrier()
    stop_process()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "hpu"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device {name} ") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_auto_device() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_torchrun(shapes: Path, tmp_path: Path) -> None:
    """The command from end to end, with batch norm, averages, workers and evaluation."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "fcos", "train", "tiny"]
    command += ["--data.train-annotations", str(shapes / "train.json")]
    command += ["--data.val-annotations", str(shapes / "val.json")]
    command += ["--data.min-sizes", "64", "--data.workers", "1", "--train.device", "cpu"]
    command += ["--train.iterations", "4", "--train.eval-every", "4", "--train.log-every", "1"]
    command += ["--train.batch-size", "4", "--train.accumulation", "2", "--train.threads", "1"]
    path = str(Path(__file__).parents[2])
    started = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = started.communicate(timeout=120)
    finally:
        started.terminate()  # with its processes, should it hang
    assert started.returncode == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    assert {"best.pt", "last.pt", "val_predictions.jpg"} <= {path.name for path in run.iterdir()}
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows if row["cls"]] == ["1", "2", "3", "4"]
    assert [row["iteration"] for row in rows if row["ap"]] == ["4"]
    assert load_checkpoint(run / "last.pt")["iteration"] == 4
    assert output.count("done. Next: fcos predict") == 1
    assert "Warning" not in errors, errors
