"""The run folder by itself: names, rows, and what is never overwritten."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fcos.config import Config, ConfigError, TrainConfig
from fcos.config_files import load_yaml
from fcos.presets import tiny
from fcos.run_folder import METRICS, RunFolder


def config_for(path: Path | None) -> Config:
    return replace(tiny(), train=TrainConfig(output=path))


def read(run: RunFolder) -> list[dict[str, str]]:
    with open(run.metrics, newline="") as file:
        return list(csv.DictReader(file))


def test_create(tmp_path: Path) -> None:
    run = RunFolder.create(config_for(tmp_path / "a" / "b"), "name")
    assert run.path == tmp_path / "a" / "b"
    assert load_yaml(run.path / "config.yaml") == config_for(run.path)
    assert (run.best.name, run.last.name) == ("best.pt", "last.pt")


def test_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(config_for(None), "tiny")
    assert re.fullmatch(r"runs/tiny-\d{8}-\d{6}", run.path.as_posix())
    assert run.path.is_dir()


@pytest.mark.parametrize("name", ["last.pt", "metrics.csv"])
def test_a_run_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"continue it with --resume {tmp_path}"):
        RunFolder.create(config_for(tmp_path), "name")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_start_that_failed_can_be_repeated(tmp_path: Path) -> None:
    RunFolder.create(config_for(tmp_path), "name")
    RunFolder.create(config_for(tmp_path), "name")


def test_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run: cannot be written to"):
        RunFolder.create(config_for(tmp_path / "file" / "run"), "name")


def test_rows(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_row(iteration=20, cls=1 / 3, lr=1e-5)
    run.add_row(iteration=40, ap=0.25)
    assert run.metrics.read_text().splitlines()[0] == ",".join(METRICS)
    first, second = read(run)
    assert (first["iteration"], first["cls"], first["lr"]) == ("20", "0.333333", "1e-05")
    assert first["ap"] == "" and second["cls"] == ""
    assert (second["iteration"], second["ap"]) == ("40", "0.25")


def test_forget_after(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.forget_after(10)  # nothing there yet
    assert not run.metrics.exists()
    for iteration in (5, 10, 10, 15, 20):
        run.add_row(iteration=iteration, total=0.5)
    run.forget_after(10)
    assert [row["iteration"] for row in read(run)] == ["5", "10", "10"]
    run.add_row(iteration=15, total=0.25)
    assert [row["total"] for row in read(run)] == ["0.5", "0.5", "0.5", "0.25"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_row_cut_off_by_a_crash(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_row(iteration=5, total=0.5)
    with open(run.metrics, "a") as file:
        file.write("\n\x00\x00")
    run.forget_after(10)
    assert [row["iteration"] for row in read(run)] == ["5"]
