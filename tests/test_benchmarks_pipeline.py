"""Benchmarks of what surrounds the network: loading, evaluation, processes; candidates of NMS."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    bench_data_loading,
    bench_evaluation,
    bench_nms,
    bench_padded_batched_nms,
    bench_processes,
    bench_soft_nms,
    candidates,
)
from benchmarks.harness import OURS, main, verify
from fcos.checkpoint import save_checkpoint
from fcos.config import DataConfig
from fcos.evaluate import EvaluationError
from fcos.model import FCOS
from fcos.presets import tiny
from fcos_ext import batched_nms

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "module, providers",
    [
        (
            bench_data_loading,
            [
                OURS,
                "torchvision, transforms in workers",
                "torchvision, in the model",
                "fcos_ext, torchvision's resize",
            ]
            * 2,
        ),
        (bench_evaluation, [OURS, "pycocotools"]),
        (bench_processes, [OURS, "1 process", "gradients not exchanged"] * 2),
    ],
)
def test_quick_run(module: Any, providers: list[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert main(module.OP, module.cases, ["--quick", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert [row["provider"] for row in rows] == providers
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["op"] == module.OP and row["ratio_to_ours"] > 0
        assert {"device", "torch", "commit", "date", "shape", "errors"} <= row.keys()


@pytest.mark.parametrize("module", [bench_data_loading, bench_evaluation, bench_processes])
@pytest.mark.parametrize("quick", [False, True])
def test_cases_differ_in_their_names(module: Any, quick: bool) -> None:
    names = [case.name for case in module.cases(CPU, quick)]
    assert len(set(names)) == len(names) > 0
    assert module.cases(torch.device("cuda"), quick) == []


# ---- data loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", bench_data_loading.MODES)
def test_wrong_loading_is_refused(mode: str, workers: int) -> None:
    case = bench_data_loading.make_case(bench_data_loading.BATCH, 576, mode, workers)
    assert "refused" not in verify(case, OURS, ())
    data = DataConfig(min_sizes=(576,), max_size=960, workers=workers, flip_probability=1.0)
    wrong = {
        "flipped or not": (data, mode == "evaluation"),
        "a pixel larger": (replace(data, min_sizes=(577,)), mode == "training"),
        "another mean": (replace(data, mean=(0.48, 0.456, 0.406)), mode == "training"),
    }
    for name, arguments in wrong.items():
        case.providers[name] = bench_data_loading.pass_over(
            lambda a=arguments: bench_data_loading.ours(bench_data_loading.BATCH, *a)
        )
        assert "refused" in verify(case, name, ()), name


def test_pictures_are_as_large_as_cocos() -> None:
    folder = bench_data_loading.pictures(bench_data_loading.BATCH)
    sizes = [path.stat().st_size for path in (folder / "images").iterdir()]
    assert len(sizes) == bench_data_loading.BATCH
    assert 120_000 < np.mean(sizes) < 200_000


# ---- evaluation ---------------------------------------------------------------------------------


def test_made_up_boxes_are_like_cocos() -> None:
    truth = bench_evaluation.made_up(400)
    boxes = np.array([a["bbox"] for a in truth["annotations"]])
    assert 6 < len(boxes) / 400 < 9
    roots = np.sqrt(boxes[:, 2] * boxes[:, 3])
    assert 45 < np.median(roots) < 75
    categories = np.array([a["category_id"] for a in truth["annotations"]])
    assert 0.25 < (categories == 1).mean() < 0.4
    assert len(np.unique(categories)) > 60


def test_boxes_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(bench_evaluation.made_up(9)))
    monkeypatch.setenv(bench_evaluation.VARIABLE, str(path))
    case = bench_evaluation.make_case(6)
    assert case.settings["boxes"] == "COCO's"
    truth = bench_evaluation.beginning_of(path, 6)
    assert len(truth["images"]) == 6
    results = bench_evaluation.detections_for(truth)
    assert len(results) == 600
    numbers = bench_evaluation.ours(truth, results)
    assert 0.1 < numbers[0] < 0.9  # neither hopeless nor perfect
    assert "refused" not in verify(case, OURS, ())
    with pytest.raises(EvaluationError):
        bench_evaluation.ours(truth, [{**results[0], "image_id": 9}])


# ---- processes ----------------------------------------------------------------------------------


def test_figures_of_processes() -> None:
    def row(scaling: str, provider: str, time: float) -> dict[str, Any]:
        known = {"scaling": scaling, "shape": [4, 3, 192, 256], "provider": provider}
        return known | {"median_ms": time, "ratio_to_ours": time / 100}

    rows = [
        row(scaling, *line)
        for scaling in ("strong", "weak")
        for line in ((OURS, 100.0), ("1 process", 80.0), ("gradients not exchanged", 90.0))
    ]
    strong, weak = bench_processes.figures(rows)
    assert (strong["images_per_s"], weak["images_per_s"]) == pytest.approx((40, 80))
    assert (strong["images_per_s_of_one"], weak["images_per_s_of_one"]) == pytest.approx((50, 50))
    assert (strong["efficiency"], weak["efficiency"]) == pytest.approx((0.4, 0.8))
    assert strong["exchange_share"] == pytest.approx(0.1)


# ---- candidates ---------------------------------------------------------------------------------


def test_committed_candidates() -> None:
    """Of crowded images: most of them go, in one group and by class."""
    found = candidates.load()
    images, count = found.scores.shape
    assert images >= 2 and count >= 2000
    assert candidates.FILE.stat().st_size <= 100_000
    assert (found.scores.diff(dim=1) <= 0).all() and found.scores.min() > 0
    assert (found.boxes[..., 2:] > found.boxes[..., :2]).all()
    for image in zip(*found, strict=True):
        assert 10 < len(batched_nms(*image, 0.5)) < count / 2
        assert len(image[2].unique()) == 3


def test_cases_from_a_model() -> None:
    cases = [c for c in bench_nms.cases(CPU) if c.settings["boxes"] == bench_nms.FROM_MODEL]
    assert {c.settings["groups"] for c in cases} == {1, 3}
    for case in cases:
        if case.settings["threads"] == 1:
            for name in case.providers:
                assert "refused" not in verify(case, name, case.make_inputs(3)), (case.name, name)


@pytest.mark.parametrize("module", [bench_padded_batched_nms, bench_soft_nms])
@pytest.mark.parametrize("quick", [False, True])
def test_padded_cases_from_a_model(module: Any, quick: bool) -> None:
    cases = [c for c in module.cases(CPU, quick) if c.settings.get("boxes") == bench_nms.FROM_MODEL]
    assert cases
    for case in cases:
        if case.settings["threads"] == 1:
            for name in case.providers:
                assert "refused" not in verify(case, name, case.make_inputs(3)), (case.name, name)


def test_candidates_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = replace(tiny(), model=replace(tiny().model, num_classes=2))
    config = replace(config, data=replace(config.data, min_sizes=(64,), max_size=64))
    network = FCOS(config.model, pretrained_backbone=False)
    with torch.no_grad():
        network.head.cls_logits.bias.fill_(-1.0)
        network.head.ltrb.bias.fill_(2.0)
    content = {"config": config, "class_names": ("cat", "dog"), "category_ids": (1, 2)}
    save_checkpoint(tmp_path / "best.pt", content | {"model": network.state_dict()})
    pictures = [str(tmp_path / f"{number}.png") for number in range(2)]
    for picture in pictures:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            picture
        )
    output = tmp_path / "found.npz"
    command = [str(tmp_path / "best.pt"), *pictures, "--output", str(output)]
    assert candidates.main(command) == 0
    found = candidates.load(output)
    # 64 + 16 + 4 + 1 locations of two classes
    assert found.boxes.shape == (2, 170, 4) and found.labels.unique().tolist() == [0, 1]
    assert torch.equal(found.boxes, found.boxes.round())
    assert torch.equal(found.scores[0], found.scores[1])
    assert "170 candidates of each of 2 images" in capsys.readouterr().out
