"""The command: help, the way through a project, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fcos
from fcos import cli
from fcos.checkpoint import load_checkpoint
from fcos.config import ConfigError
from fcos.config_files import load_yaml
from fcos.presets import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--data.min-sizes", "64", "--data.workers", "0", "--train.device", "cpu"]
SMALL += ["--train.iterations", "2", "--train.batch-size", "2", "--train.log-every", "1"]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run."""
    output = tmp_path_factory.mktemp("runs") / "shapes run"
    arguments = ["train", "tiny", "--train.output", str(output), *SMALL]
    arguments += ["--data.train-annotations", str(shapes / "train.json")]
    arguments += ["--data.val-annotations", str(shapes / "val.json")]
    assert cli.main(arguments) == 0
    return output


def fails(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr, when it fails as it should."""
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as stop:  # tyro's
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def one_line(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    message = fails(arguments, capsys)
    assert message.startswith("fcos: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "tiny", "-h"]])
def test_help_is_quick(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fcos.cli import main\n"
        f"try: code = main({arguments})\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = [m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules]\n"
        "sys.exit(code or (f'imports {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        usage = capsys.readouterr().out
        assert all(f"\n  {name} " in usage for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == fcos.__version__ + "\n"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"fcos {command}" in capsys.readouterr().out


def test_help_of_train_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "tiny", "--help"])
    text = capsys.readouterr().out
    assert "--model.backbone" in text and tiny().model.backbone in text
    assert "Peak learning rate" in text  # the text under the field


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["zzz"], "unknown command zzz; known are train, eval, predict, "),
        (["train", "tinny"], "did you mean tiny?"),
        (["train", "qqq"], "unknown preset qqq; known are improved, paper, tiny"),
        (["train", "tiny", "--resume", "x"], "one of a preset, --config and --resume"),
        (["train", "--config"], "--config needs a value"),
        (["train", "--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (["train", "--resume", "nowhere"], "nowhere/last.pt: no such file"),
        (["train", "tiny"], "data.train_annotations must name a COCO JSON"),
        (["train", "tiny", "--train.device", "gpu"], "device gpu cannot be used"),
        (["train", "tiny", "--train.iterations", "0"], "train.iterations must be >= 1, got 0"),
        (["eval", "missing.pt"], "missing.pt: no such file"),
        (["predict", "missing.pt", "a.jpg"], "missing.pt: no such file"),
        (["eval", "missing.pt", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
    ],
)
def test_errors(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert expected in one_line(arguments, capsys)


def test_unknown_options_have_suggestions(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(["train", "tiny", "--train.iteration", "3"], capsys)
    assert "--train.iterations" in message
    assert "--score-threshold" in fails(["predict", "a.pt", "b.jpg", "--score", "1"], capsys)
    message = fails(["train", "tiny", "--train.iterations", "many"], capsys)
    assert "many" in message and "int" in message.lower()
    fails(["train", "tiny", "--model.activation", "elu"], capsys)
    fails(["predict", "a.pt"], capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "annotations.json: "),
        ("[]", "annotations.json: "),
        ('{"images": []}', "annotations.json: "),
        (None, "annotations.json: "),
    ],
)
def test_bad_annotations(
    content: str | None, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "annotations.json"
    if content is not None:
        path.write_text(content)
    output = tmp_path / "run"
    arguments = ["train", "tiny", "--data.train-annotations", path, "--train.output", output]
    assert expected in one_line(arguments, capsys)
    assert not output.exists()


def test_train(run: Path, capsys: pytest.CaptureFixture[str], shapes: Path) -> None:
    best = load_checkpoint(run / "best.pt")
    assert best["config"].train.iterations == 2
    assert best["config"].data.min_sizes == (64,)
    again = ["train", "tiny", "--train.output", run, *SMALL]
    again += ["--data.train-annotations", shapes / "train.json"]
    assert "holds a run already" in one_line(again, capsys)


def test_eval(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    assert cli.main(["eval", str(run / "best.pt"), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "5 images" in text and "AP" in text and str(output) in text
    # the same numbers that training found
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation == json.loads((run / "evaluation.json").read_text())
    assert isinstance(json.loads((output / "detections.json").read_text()), list)
    assert (output / "confusion.png").exists()


def test_eval_on_other_annotations(
    run: Path, shapes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = json.loads((shapes / "val.json").read_text())
    document["categories"][0]["name"] = "blob"
    (tmp_path / "foreign.json").write_text(json.dumps(document))
    arguments: list[Any] = ["eval", run / "best.pt", "--annotations", tmp_path / "foreign.json"]
    message = one_line([*arguments, "--images", shapes / "images"], capsys)
    assert "has the categories blob, " in message and "was trained on " in message

    arguments = ["eval", run / "best.pt", "--annotations", shapes / "train.json"]
    assert cli.main(list(map(str, arguments))) == 0
    assert "8 images" in capsys.readouterr().out
    message = one_line(["eval", run / "best.pt", "--annotations", tmp_path / "no.json"], capsys)
    assert "no.json: " in message


def test_predict(
    run: Path, shapes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pictures = sorted((shapes / "images").glob("val-*.png"))[:2]
    arguments = ["predict", run / "best.pt", *pictures, "--output", tmp_path / "out"]
    arguments += ["--score-threshold", "0.99"]
    assert cli.main(list(map(str, arguments))) == 0
    # nothing is found, and that is no error
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(entry["file"]).name for entry in entries] == [p.name for p in pictures]
    assert all(entry["detections"] == [] for entry in entries)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [p.name for p in pictures]
    assert "val-00000.png" in capsys.readouterr().out


def test_predict_errors(
    run: Path, shapes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    best = run / "best.pt"
    assert "missing.jpg" in one_line(["predict", best, tmp_path / "missing.jpg"], capsys)
    picture = shapes / "images" / "val-00000.png"
    (tmp_path / "file").write_text("")
    blocked = ["predict", best, picture, "--output", tmp_path / "file" / "out"]
    assert f"{tmp_path / 'file' / 'out'}: Not a directory" in one_line(blocked, capsys)
    assert "graph needs a GPU" in one_line(["predict", best, picture, "--graph"], capsys)
    assert "device gpu" in one_line(["predict", best, picture, "--device", "gpu"], capsys)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = ["predict", best, picture, tmp_path / "broken.png", "--output", tmp_path / "out"]
    assert cli.main(list(map(str, broken))) == 1  # the other one is done all the same
    assert "broken.png" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "CPU kernels" in text and "GPU" in text
    assert cli.main(["env", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["packages"]["torch"] and set(info["kernels"]) == {"cpu", "cuda"}


def test_sources_of_settings(run: Path, tmp_path: Path) -> None:
    name, config, resume = cli.parse_train([])
    assert (name, resume) == ("improved", None)
    name, config, resume = cli.parse_train(["tiny", "--train.learning-rate", "0.5"])
    assert (name, config.train.learning_rate, resume) == ("tiny", 0.5, None)
    assert config.model == tiny().model

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"train": {"iterations": 7, "seed": 3}}))
    path = tmp_path / "mine.yaml"
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        name, config, resume = cli.parse_train([*arguments, "--train.seed", "4"])
        assert (name, config.train.iterations, config.train.seed) == ("mine", 7, 4)

    name, config, resume = cli.parse_train(["--resume", str(run), "--train.iterations", "9"])
    assert (name, resume, config.train.iterations) == (run.name, run, 9)
    assert config.data == load_yaml(run / "config.yaml").data
    with pytest.raises(ConfigError, match="one of a preset"):
        cli.parse_train(["--resume", str(run), "--config", str(path)])


def test_nested_settings_on_the_command_line() -> None:
    arguments = ["tiny", "--model.strides", "8", "16", "32"]
    arguments += ["--model.size-ranges", "0", "64", "64", "128", "128", "inf"]
    arguments += ["--data.flip-probability", "0", "--train.amp", "bf16", "--train.compile"]
    _, config, _ = cli.parse_train(arguments)
    assert config.model.strides == (8, 16, 32)
    assert config.model.size_ranges == ((0, 64), (64, 128), (128, float("inf")))
    assert (config.train.amp, config.train.compile) == ("bf16", True)


@pytest.mark.parametrize("command", ["train", "predict"])
def test_interrupted_before_there_is_anything_to_save(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupted)
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "fcos: interrupted\n"


def test_errors_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(arguments: list[str]) -> int:
        raise ValueError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "train", wrong)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])
