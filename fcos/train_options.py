"""The command line of ``fcos train``: a preset, a file or a run, and changes to it."""

from __future__ import annotations

import difflib
from pathlib import Path

import tyro

from .config import Config, ConfigError
from .config_files import load_yaml
from .presets import PRESETS


def parse_train(arguments: list[str]) -> tuple[str, Config, Path | None]:
    """``[PRESET] [--config FILE | --resume RUN] [options]`` to a name, settings, and the run.

    Options are applied on top of the preset, the file, or the settings of the run. Exits with
    tyro's message (and its suggestions) if one of them is unknown or malformed.
    """
    arguments = list(arguments)
    config_file, resume = _take(arguments, "--config"), _take(arguments, "--resume")
    preset = None
    if arguments and not arguments[0].startswith("-"):
        preset = arguments.pop(0)
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown preset {preset}; known are {', '.join(PRESETS)}{hint}")
    if sum(x is not None for x in (preset, config_file, resume)) > 1:
        raise ConfigError("train takes one of a preset, --config and --resume, not several")
    if resume is not None:
        from .checkpoint import load_checkpoint

        default = load_checkpoint(Path(resume) / "last.pt")["config"]
        name, described = Path(resume).name, f"--resume {resume}"
    elif config_file is not None:
        default, name, described = load_yaml(Path(config_file)), Path(config_file).stem, config_file
    else:
        name = described = preset or "improved"
        default = PRESETS[name]()
    config = tyro.cli(
        Config,
        prog=f"fcos train {described}",
        description=(
            f"Train a detector: fcos train [{'|'.join(PRESETS)} | --config FILE | --resume RUN] "
            f"[options]. Defaults shown are those of {described}."
        ),
        default=default,
        args=arguments,
    )
    return name, config, Path(resume) if resume is not None else None


def _take(arguments: list[str], option: str) -> str | None:
    """Remove ``option VALUE`` or ``option=VALUE`` from the arguments. Returns the value."""
    for i, argument in enumerate(arguments):
        if argument.startswith(option + "="):
            del arguments[i]
            return argument.split("=", 1)[1]
        if argument == option:
            if i + 1 == len(arguments):
                raise ConfigError(f"{option} needs a value")
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
    return None
