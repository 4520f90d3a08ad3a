"""The benchmarks run, and give no time to a wrong result."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.__main__
from benchmarks import (
    bench_assign_targets,
    bench_iou_loss,
    bench_nms,
    bench_sigmoid_focal_loss,
    figures,
    harness,
    shapes,
    summary,
)
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.harness import (
    OURS,
    QUICK,
    Case,
    command,
    main,
    peak_extra_bytes,
    run_case,
    verify,
)
from fcos import cli

CPU = torch.device("cpu")
ZERO = torch.tensor([0])


def make_case(**providers: Any) -> Case:
    """Of a sum of 100,000 ones."""
    return Case(
        settings={"mode": "forward", "threads": 1},
        device=CPU,
        make_inputs=lambda seed: (torch.ones(100_000),),
        providers={OURS: lambda x: (x.sum(),)} | providers,
        reference=lambda x: (x.double().sum(),),
        tolerance=1e-6,
        bytes_moved=400_000,
    )


@pytest.mark.parametrize(
    "module, num_rows, baseline",
    [
        (bench_iou_loss, 8, "torch.compile of reference"),
        (bench_sigmoid_focal_loss, 22, "torch.compile of reference"),
    ],
)
def test_quick_run(
    module: Any, num_rows: int, baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two. All of them: `make bench`."""
    output = tmp_path / "new" / "rows.json"
    arguments = ["--quick", "--output", str(output)]
    assert main(module.OP, module.cases, arguments) == 0
    rows = json.loads(output.read_text())
    assert len(rows) == num_rows
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["op"] == module.OP
        assert {"device", "torch", "commit", "date", "instruction_set", "threads"} <= row.keys()
        assert (row["ratio_to_ours"] == 1) or row["provider"] != OURS
    printed = capsys.readouterr().out
    assert printed.count("x ours") == num_rows and baseline in printed
    if module is bench_sigmoid_focal_loss:
        # logits, and the gradient beside them
        (row,) = (
            r
            for r in rows
            if r["provider"] == OURS
            and r["form"] == "levels"
            and (r["mode"] == "forward + backward")
        )
        assert row["peak_bytes_per_logit"] == pytest.approx(2, rel=0.1)


def test_row_is_repeated_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its case runs, and no results are overwritten."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    case = bench_nms.cases(CPU, quick=True)[-1]
    repeat = shlex.split(command(bench_nms.OP, case))
    assert repeat[:5] == ["python", "-m", "benchmarks", "nms", "--only"]
    assert benchmarks_main([*repeat[3:], "--quick"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  $ python -m benchmarks nms --only ") == 1
    assert shlex.split(printed.partition("  $ ")[2].splitlines()[0]) == repeat
    assert list(tmp_path.iterdir()) == []


def test_command_works_in_any_folder(tmp_path: Path) -> None:
    """The installed command, of a checkout that is not the working folder."""
    fcos_command = Path(sys.executable).with_name("fcos")
    case = bench_nms.cases(CPU, quick=True)[0].name
    arguments = [str(fcos_command), "bench", "nms", "--quick", "--only", case]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert case in done.stdout and "x ours" in done.stdout


def test_command_of_a_row_holds_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCOS_CPU_ISA", "avx2")
    case = replace(make_case(), environment="FCOS_COCO_BOXES=coco.json")
    expected = "FCOS_COCO_BOXES=coco.json FCOS_CPU_ISA=avx2 python -m benchmarks sum --only "
    assert command("sum", case) == f"{expected}'mode forward, threads 1'"


@pytest.mark.parametrize(
    "arguments, rule",
    [
        (["nms", "--only", "no such thing"], "no case of nms has it in its name"),
        (["--only", "threads 1"], "--only needs the name of one benchmark before it"),
    ],
)
def test_unknown_case(arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks_main(arguments)
    assert rule in capsys.readouterr().err


def test_names_of_cases_are_different() -> None:
    """So that a command names one case."""
    for name in benchmarks.__main__.NAMES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        names = [case.name for case in module.cases(CPU)]
        assert len(set(names)) == len(names), name


def test_boxes_of_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized with their image; crowds and upright images are left out."""
    images = [(1, 480, 640), (2, 640, 480), (3, 100, 400)]
    boxes = [(1, [0, 48, 64, 96], 0), (1, [0, 0, 640, 480], 1), (2, [1, 1, 9, 9], 0)]
    content = {
        "images": [{"id": i, "height": h, "width": w} for i, h, w in images],
        "annotations": [{"image_id": i, "bbox": b, "iscrowd": c} for i, b, c in boxes],
    }
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(content))
    of_first, of_third = bench_assign_targets.coco_boxes(file)
    assert torch.allclose(of_first, torch.tensor([[0, 48, 64, 144]]) * 800 / 480)
    assert of_third.shape == (0, 4)
    monkeypatch.setattr(bench_assign_targets, "COCO_BATCHES", (2,))
    monkeypatch.setenv("FCOS_COCO_BOXES", str(file))
    case = bench_assign_targets.cases(CPU)[-1]
    assert case.settings["boxes"] == "COCO"
    for name in case.providers:
        assert "refused" not in verify(case, name, case.make_inputs(0)), name


def test_indices_have_to_be_equal() -> None:
    case = bench_nms.cases(CPU, quick=True)[-1]
    inputs, ours = case.make_inputs(0), case.providers[OURS]
    for name in case.providers:
        assert "refused" not in verify(case, name, inputs), name
    case.providers["one wrong"] = lambda *inputs: (ours(*inputs)[0].index_fill(0, ZERO, -1),)
    assert "refused" in verify(case, "one wrong", inputs)


@pytest.mark.parametrize(
    "result",
    [
        lambda x: (x.sum() + 1,),
        lambda x: (x.sum() * float("nan"),),
        lambda x: (x.sum().view(1),),
    ],
    ids=["wrong value", "nan", "wrong shape"],
)
def test_wrong_result_is_refused(
    result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    cases = lambda device, quick: [make_case(planted=result)]  # noqa: E731
    assert main("sum", cases, ["--quick", "--output", str(output)]) == 1
    good, bad = json.loads(output.read_text())
    assert good["median_ms"] > 0
    assert "wrong result: relative error" in bad["refused"]
    assert not {"median_ms", "ratio_to_ours", "gb_per_s"} & bad.keys()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "planted" in line)
    assert "wrong result" in line and " ms" not in line


def test_times_are_of_the_providers() -> None:
    def slow(x: Tensor) -> tuple[Tensor]:
        time.sleep(0.02)
        return (x.sum(),)

    before = torch.get_num_threads()
    ours, theirs = run_case(make_case(slow=slow), QUICK)
    assert torch.get_num_threads() == before
    assert theirs["median_ms"] == pytest.approx(20, rel=0.5)
    assert theirs["ratio_to_ours"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1)
    assert ours["gb_per_s"] == pytest.approx(400_000 / ours["median_ms"] / 1e6)


def test_peak_memory() -> None:
    """Two tensors of 400 kB at a time, though three are made."""
    case = make_case(chain=lambda x: (x.mul(2).mul(2).mul(0.25).sum(),))
    assert peak_extra_bytes(case, "chain", case.make_inputs(0)) == pytest.approx(800_000, rel=0.01)


def test_shapes() -> None:
    # P3 to P7 of 800 x 1344: 100 x 168, 50 x 84, 25 x 42, 13 x 21, 7 x 11
    assert shapes.num_locations() == 16_800 + 4_200 + 1_050 + 273 + 77
    labels = shapes.make_labels(50_000, 80, torch.Generator().manual_seed(0))
    assert labels.min() == -1 and labels.max() == 79
    assert (labels >= 0).float().mean().item() == pytest.approx(shapes.POSITIVE_SHARE, rel=0.3)


def test_summary_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """README's table, docs/benchmarks.md and the plots are those of the committed rows."""
    assert summary.main(["--check"]) == 0, capsys.readouterr().out


def test_goals_name_rows_that_exist(tmp_path: Path) -> None:
    """A goal whose settings no benchmark has would be "not measured" for ever."""
    for goal in figures.GOALS:
        if (harness.RESULTS / f"{goal.op}-cpu{goal.suffix}.json").exists():
            assert figures.Figures().ratios(goal), goal


def test_summary_of_other_results(tmp_path: Path) -> None:
    settings = {"op": "nms", "mode": "keep all", "shape": [5000, 4], "boxes": "random"}
    settings |= {"groups": 80, "dtype": "float32", "threads": 2}
    rows = [
        settings | {"provider": OURS, "median_ms": 2.0},
        settings | {"provider": "torchvision", "median_ms": 7.0},
    ]
    (tmp_path / "nms-cpu.json").write_text(json.dumps(rows))
    table = summary.table(figures.Figures(folder=tmp_path))
    assert table.splitlines()[2:] == [
        "| `batched_nms`, 5,000 boxes, 80 classes | 2 ms | 3.5 x | | |"
    ]
    goals = [g for g in figures.GOALS if g.op == "nms" and g.where.get("groups") == 80]
    lines = [summary._goal_line(g, figures.Figures(folder=tmp_path).ratios(g)) for g in goals]
    assert (
        "| `batched_nms`, 5,000 random boxes | torchvision | 4 x | 3.50 x | **missed** |" in lines
    )
    assert sum("not measured" in line for line in lines) == len(lines) - 1


def test_rows_that_lose_are_shown(tmp_path: Path) -> None:
    settings = {"op": "nms", "shape": [9, 4], "command": "python -m benchmarks nms --only 'a, b'"}
    settings |= dict.fromkeys(("device", "torch", "commit", "date"), "x")
    rows = [
        settings | {"provider": OURS, "median_ms": 2.0, "ratio_to_ours": 1},
        settings | {"provider": f"{OURS}, otherwise", "median_ms": 1.0, "ratio_to_ours": 0.5},
        settings | {"provider": "torchvision", "median_ms": 1.9, "ratio_to_ours": 0.95},
        settings | {"provider": "apex", "median_ms": 3.0, "ratio_to_ours": 1.5},
    ]
    (tmp_path / "nms-cpu.json").write_text(json.dumps(rows))
    text = summary.page(figures.Figures(folder=tmp_path))
    assert "| nms | a, b | torchvision | 0.95 x |" in text
    assert "otherwise |" not in text and "apex |" not in text
    assert "No GPU has been timed yet" in text
    rows = [row | {"device": "NVIDIA H200"} for row in rows]
    (tmp_path / "nms-cuda.json").write_text(json.dumps(rows))
    assert "Rows of NVIDIA H200, x are" not in text
    assert "Rows of NVIDIA H200 are" in summary.page(figures.Figures(folder=tmp_path))


def test_text_between_marks() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n"
    new = summary.between_marks(text, {"x": "new\n", "y": "more\n"})
    assert new.replace("<!-- ", "").replace(" -->", "").splitlines() == [
        "a", "x: begin", "new", "x: end", "b", "y: begin", "more", "y: end",
    ]  # fmt: skip


def test_all_of_them_by_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def note(op: str, cases: Any, arguments: list[str]) -> int:
        calls.append((op, arguments))
        return int(op == "nms")

    monkeypatch.setattr(harness, "main", note)
    assert cli.main(["bench", "--quick"]) == 1
    files = Path(harness.__file__).parent.glob("bench_*.py")
    assert {op for op, _ in calls} == {file.stem.removeprefix("bench_") for file in files}
    assert all(arguments == ["--device", "cpu", "--quick"] for _, arguments in calls)
    assert cli.main(["bench", "iou_loss"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["bench", "iou"])
    assert "unknown benchmark iou; known are accelerate, " in capsys.readouterr().err
