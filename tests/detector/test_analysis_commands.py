"""``fcos analyze`` from the command line: options, files and errors in one line."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fcos import cli
from fcos.analysis.conventions import conventions_of, paper_conventions
from fcos.analysis.options import ConventionOptions
from fcos.config import ConfigError
from fcos.config_files import save_yaml
from fcos.presets import improved, paper, tiny
from tests.detector.analysis_oracle import random_document


def test_options_resolve(tmp_path: Path) -> None:
    data = tmp_path / "x.json"
    assert ConventionOptions(data=data).resolve() == conventions_of(improved())
    assert ConventionOptions(data=data, preset="tiny").resolve() == conventions_of(tiny())
    assert ConventionOptions(data=data, conventions="paper").resolve() == paper_conventions()
    some = ConventionOptions(
        data=data, conventions="paper", levels=("P4",), min_size=600, crowd=True, corners="edges"
    ).resolve()
    assert some == replace(
        paper_conventions().only(["P4"]), min_size=600, crowd=True, corners="edges"
    )
    mixed = ConventionOptions(data=data, conventions="paper", preset="tiny").resolve()
    assert mixed.strides == tiny().model.strides and mixed.min_size == 800
    config = replace(paper(), data=replace(paper().data, min_sizes=(640, 704), max_size=900))
    save_yaml(config, tmp_path / "config.yaml")
    read = ConventionOptions(data=data, config=tmp_path / "config.yaml").resolve()
    assert read == replace(conventions_of(paper()), min_size=704, max_size=900)
    with pytest.raises(ConfigError, match="unknown preset tinny; .*did you mean tiny"):
        ConventionOptions(data=data, preset="tinny").resolve()
    with pytest.raises(ConfigError, match="not both"):
        ConventionOptions(data=data, preset="tiny", config=data).resolve()


def test_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "--data", str(shapes / "train.json"), "--preset", "tiny"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out" / "here")]) == 0
    text = capsys.readouterr().out
    assert "best possible recall" in text and "written to" in text
    content = json.loads((tmp_path / "out" / "here" / "analysis.json").read_text())
    assert (tmp_path / "out" / "here" / "analysis.png").stat().st_size > 10_000
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content
    options = ["--strides", "4", "8", "--size-ranges", "0", "20", "20", "inf", "--levels", "P2"]
    options += ["--resize", "none", "--boundary", "strict", "--center-sampling-radius", "0"]
    assert cli.main([*arguments, *options, "--json"]) == 0
    conventions = json.loads(capsys.readouterr().out)["conventions"]
    assert conventions["strides"] == [4] and conventions["size_ranges"] == [[0, None]]
    assert conventions["boundary"] == "strict" and conventions["center_sampling_radius"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--preset", "papper"],
            "unknown preset papper; known are improved, .*did you mean paper?",
        ),
        (["--levels", "P9"], "unknown level P9; known are P3, P4, P5, P6, P7"),
        (["--strides", "8"], "size_ranges must be a pair low <= high for each of the 1 strides"),
        (["--min-size", "0"], "min_size must be >= 1, got 0"),
        (["--listed", "-1"], "--listed must be >= 0, got -1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--data", "nowhere.json"], "nowhere.json: no such annotation file"),
    ],
)
def test_command_errors(
    options: list[str], message: str, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyze", *options]
    if "--data" not in options:
        arguments += ["--data", str(shapes / "train.json")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fcos: ") and error.count("\n") == 1
    assert message.split(".*")[0] in error and message.split(".*")[-1] in error


def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = random_document(random.Random(0))
    del document["images"][0]["height"]
    for content, message in (
        ("{", "not JSON"),
        (json.dumps({"images": []}), "key 'categories' is missing"),
        (json.dumps(document), "image 1: height or width is missing and cannot be read"),
    ):
        path = tmp_path / "broken.json"
        path.write_text(content)
        assert cli.main(["analyze", "--data", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith(f"fcos: {path}: ") and error.count("\n") == 1


def test_help_is_quick() -> None:
    code = (
        "import sys\nfrom fcos.cli import main\n"
        "try: main(['analyze', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules]\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--center-sampling-radius" in done.stdout
