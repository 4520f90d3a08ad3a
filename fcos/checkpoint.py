"""Checkpoints: plain dicts of tensors and values, which load without running any code.

One file holds everything that prediction needs (weights, settings, class names) and everything
that training needs to go on.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from .config import Config, ConfigError
from .config_files import from_dict, to_dict

FORMAT = "fcos-1"
_KEYS = ("config", "class_names", "category_ids", "model")


class CheckpointError(ValueError):
    """A file is not a checkpoint of this project, is damaged, or does not fit."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that ``path`` is at any moment the old file or the new one, whole.

    Args:
        path: the file to make or to replace.
        content: "config" (Config), "class_names", "category_ids", "model" (state dict) and any
            further tensors, numbers, strings, lists and dicts.

    Raises:
        CheckpointError: it could not be written, as on a full disk; an earlier file is untouched.
    """
    content = {
        "format": FORMAT,
        **content,
        "config": to_dict(content["config"]),
        "class_names": list(content["class_names"]),
        "category_ids": list(content["category_ids"]),
    }
    save_plain(path, content)


def save_plain(path: Path, content: dict[str, Any]) -> None:
    """As :func:`save_checkpoint`, of any tensors and plain values."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        temporary.unlink(missing_ok=True)
        kept = "; the previous file is unchanged" if path.exists() else ""
        raise CheckpointError(f"{path}: could not be saved ({error}){kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; "config" comes back as a Config.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    return check_content(read_plain(path), path)


def is_ours(content: Any) -> bool:
    """Whether a file that holds this is a checkpoint of this project."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_content(content: Any, path: Path) -> dict[str, Any]:
    """What a checkpoint holds, with "config" as a Config. Raises CheckpointError."""
    if not is_ours(content):
        raise CheckpointError(f"{path}: not a checkpoint of this project (no format {FORMAT!r})")
    if absent := [key for key in _KEYS if key not in content]:
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(absent)}")
    try:
        config: Config = from_dict(content["config"], str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    names = content["class_names"]
    if config.model.num_classes != len(names):
        raise CheckpointError(
            f"{path}: model.num_classes is {config.model.num_classes}, but the file names "
            f"{len(names)} classes"
        )
    return {**content, "config": config}


def read_plain(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is nothing but tensors and plain values.

    Raises:
        CheckpointError: it is something else, or damaged.
    """
    try:
        with warnings.catch_warnings():
            # of what the first bytes of a file that is none would mean in one
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused. Either it is no PyTorch file, or it holds something other than "
            "tensors and plain values, which could run code when loaded"
        ) from error
    # torch raises whatever the bytes lead it to, IndexError and KeyError too
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not a PyTorch file, or a truncated one ({first_line})"
        ) from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: needs the package safetensors (pip install safetensors)"
        ) from error
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:  # its own error is no ValueError or OSError
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not a safetensors file, or damaged ({first_line})"
        ) from error
    return tensors


def load_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must all agree. Raises CheckpointError."""
    own = network.state_dict()
    wrong = [f"missing {key}" for key in own.keys() - state.keys()]
    wrong += [f"unexpected {key}" for key in state.keys() - own.keys()]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, the network's is {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{source}: the weights do not fit the network: {'; '.join(sorted(wrong)[:5])}{more}"
        )
    network.load_state_dict(state)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
