"""The ``fcos`` command. Options are the fields of dataclasses; their text is the help."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from . import __version__
from .cli_options import EnvOptions, EvalOptions, PredictOptions
from .config import ConfigError
from .train_options import parse_train

if TYPE_CHECKING:
    from .predict import Predictor

# Torch takes over a second to import, so that each command imports it for itself.

USAGE = f"""fcos {__version__}: anchor-free object detection

usage: fcos COMMAND [options]; fcos COMMAND --help

  train     train a detector
  eval      measure a checkpoint on annotated images
  predict   draw detections on images and videos
  convert   checkpoints of other FCOS code bases, to ours and back
  analyze   what can be learned of your boxes, before training
  targets   pictures of what each location learns
  bench     time the kernels and the detector against PyTorch's and torchvision's
  env       what is installed, what is missing and why
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code; errors of the user's go to stderr in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name}{hint}")
    try:
        if name != "env" and not {"-h", "--help"} & set(rest):
            _check_torchvision()
        return COMMANDS[name](rest)
    except ConfigError as error:
        return _fail(str(error))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, _user_errors()):
            return _fail(str(error))
        raise
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("fcos: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _check_torchvision() -> None:
    """Raises ConfigError unless torchvision can be used with the installed torch."""
    import torch

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision cannot be used ({error}). Install the one that belongs to torch "
            f"{torch.__version__}, from where that torch came: "
            "https://github.com/pytorch/vision#installation has the table"
        ) from error


def _user_errors() -> tuple[type[Exception], ...]:
    """What a person can mend: reported without a traceback."""
    from .checkpoint import CheckpointError
    from .convert.errors import ConvertError
    from .data.annotations import AnnotationError
    from .data.images import ImageError
    from .evaluate import EvaluationError
    from .recorder import NonFiniteLossError
    from .sources import SourceError

    return (
        CheckpointError,
        ConvertError,
        AnnotationError,
        ImageError,
        NonFiniteLossError,
        EvaluationError,
        SourceError,
    )


def _fail(message: str) -> int:
    print(f"fcos: {message}", file=sys.stderr)
    return 2


def _train(arguments: list[str]) -> int:
    name, config, resume = parse_train(arguments)
    from .distributed import start_process, stop_process
    from .engine import train
    from .interrupt import Interrupted

    process = start_process(config.train.device)
    try:
        folder = train(config, process, name, resume)
    except Interrupted as interruption:
        if process.is_main:
            print(f"fcos: {interruption}", file=sys.stderr)
        return interruption.exit_code
    finally:
        stop_process()
    if process.is_main:
        best = folder / "best.pt"
        kept = best if best.exists() else folder / "last.pt"
        print(f"done. Next: fcos predict {kept} YOUR_IMAGES")
    return 0


def _eval(arguments: list[str]) -> int:
    options = tyro.cli(EvalOptions, prog="fcos eval", args=arguments)
    _check_batch_size(options.batch_size)
    import json

    from rich.console import Console

    from . import report
    from .data.coco import CocoDataset
    from .data.transforms import eval_transforms
    from .distributed import start_process, stop_process
    from .evaluate import evaluate_coco
    from .inference import detect_dataset

    process = start_process(options.device)
    try:
        predictor = _load(options, str(process.device))
        config = predictor.config
        annotations, images = options.annotations, options.images
        if annotations is None:
            annotations, images = config.data.val_annotations, images or config.data.val_images
        if annotations is None:
            raise ConfigError(
                f"{options.checkpoint}: was trained without validation annotations; give "
                "--annotations"
            )
        dataset = CocoDataset(
            annotations, images, eval_transforms(config.data, config.model.corners)
        )
        if dataset.class_names != predictor.class_names:
            raise ConfigError(
                f"{annotations} has the categories {', '.join(dataset.class_names)}, but "
                f"{options.checkpoint} was trained on {', '.join(predictor.class_names)}"
            )
        results = detect_dataset(predictor.inference, dataset, config, process, options.batch_size)
        if not process.is_main:
            return 0
        metrics = evaluate_coco(annotations, results, image_ids=dataset.image_ids)
        Console().print(metrics.table())
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            report.write_evaluation(options.output, metrics, results, dataset, annotations)
            (options.output / "detections.json").write_text(json.dumps(results))
            print(f"written to {options.output}")
    finally:
        stop_process()
    return 0


def _predict(arguments: list[str]) -> int:
    options = tyro.cli(PredictOptions, prog="fcos predict", args=arguments)
    from .distributed import choose_device
    from .predict_files import predict_files

    _check_batch_size(options.batch_size)
    if not options.sources:
        raise ConfigError("predict needs at least one image, video, folder or pattern")
    result = predict_files(
        _load(options, str(choose_device(options.device))),
        options.sources,
        options.output,
        score_threshold=options.score_threshold,
        batch_size=options.batch_size,
        report=print,
    )
    return result.exit_code


def _load(options: EvalOptions | PredictOptions, device: str) -> Predictor:
    from . import load

    return load(
        options.checkpoint,
        device,
        amp=options.amp,
        compile=options.compile,
        graph=options.graph,
    )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be >= 1, got {batch_size}")


def _env(arguments: list[str]) -> int:
    options = tyro.cli(EnvOptions, prog="fcos env", args=arguments)
    import json

    from rich.console import Console

    from .environment import environment, environment_table

    if options.json:
        print(json.dumps(environment(), indent=2))
    else:
        Console().print(environment_table())
    return 0


def _convert(arguments: list[str]) -> int:
    from .convert.commands import convert

    return convert(arguments)


def _analyze(arguments: list[str]) -> int:
    from .analysis.commands import analyze

    return analyze(arguments)


def _targets(arguments: list[str]) -> int:
    from .analysis.commands import targets

    return targets(arguments)


def _bench(arguments: list[str]) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise ConfigError(
            "the benchmarks are in the repository, not in the package: fcos bench needs a "
            "checkout, installed with pip install -e ."
        )
    sys.path.insert(0, str(checkout))
    from benchmarks.__main__ import main as run

    return run(arguments, "fcos bench")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "convert": _convert,
    "analyze": _analyze,
    "targets": _targets,
    "bench": _bench,
    "env": _env,
}
