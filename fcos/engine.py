"""The training loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from . import limits, report
from .config import Config, ConfigError
from .config_files import save_yaml
from .data.coco import CocoDataset, shared_image_files
from .data.transforms import eval_transforms, train_transforms
from .distributed import Process
from .progress import TrainingProgress
from .run_folder import RunFolder
from .training import Training


def train(config: Config, process: Process, name: str = "run", resume: Path | None = None) -> Path:
    """Train a detector, evaluating on the way.

    Args:
        config: all settings. With ``resume``, those of the run, of which ``iterations`` and the
            like may have been changed.
        process: this process, and its device.
        name: part of the run folder's name.
        resume: folder of a run to continue: its weights, optimiser, averages and place in the
            stream of images are restored, and the result is that of a run never interrupted.

    Returns:
        The run folder.

    Raises:
        ConfigError, CheckpointError, AnnotationError: the settings, the run or the data are wrong.
        NonFiniteLossError: a loss or weight is not finite; it names the iteration and the images.
        Interrupted: SIGINT or SIGTERM; last.pt has been saved.
    """
    limits.check(config, process.world_size, process.device.type)
    if config.data.train_annotations is None:
        raise ConfigError("data.train_annotations must name a COCO JSON to train on")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    dataset = CocoDataset(
        config.data.train_annotations,
        config.data.train_images,
        train_transforms(config.data, config.model.corners),
    )
    validation = None
    if config.data.val_annotations is not None:
        validation = CocoDataset(
            config.data.val_annotations,
            config.data.val_images,
            eval_transforms(config.data, config.model.corners),
        )
    config = _with_classes(config, dataset, validation)
    training = Training(config, process, dataset, validation, fresh=resume is None)
    if resume is None:
        run = _new_folder(config, process, name)
    else:
        run = RunFolder(resume)
        training.restore(run.last)
        if process.is_main:
            run.forget_after(training.iteration)
            save_yaml(config, run.path / "config.yaml")
    if process.is_main:
        report.write_start(run.path, config, dataset, process.device)
    with TrainingProgress(training.iteration, config.train.iterations, not process.is_main) as bar:
        bar.say(f"training on {dataset.report}")
        if validation is not None:
            bar.say(f"evaluating on {validation.report}")
            if shared := shared_image_files(dataset, validation):
                bar.say(f"warning: {shared} image files are in both: the AP will flatter")
        bar.say(f"run folder {run.path}")
        training.run(run, bar)
    return run.path


def _new_folder(config: Config, process: Process, name: str) -> RunFolder:
    """The run folder, made by the main process. Raises ConfigError, in all processes."""
    path, failure = None, None
    if process.is_main:
        try:
            path = RunFolder.create(config, name).path
        except ConfigError as error:
            failure = str(error)
    path, failure = process.broadcast((path, failure))
    if path is None:
        raise ConfigError(failure)
    return RunFolder(path)


def _with_classes(config: Config, dataset: CocoDataset, validation: CocoDataset | None) -> Config:
    """The settings with ``num_classes`` of the annotations."""
    names = dataset.class_names
    if config.model.num_classes not in (None, len(names)):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but "
            f"{config.data.train_annotations} has {len(names)} categories: {', '.join(names)}"
        )
    if validation is not None and validation.class_names != names:
        raise ConfigError(
            f"{config.data.val_annotations} has the categories "
            f"{', '.join(validation.class_names)}, the training annotations {', '.join(names)}"
        )
    return replace(config, model=replace(config.model, num_classes=len(names)))
