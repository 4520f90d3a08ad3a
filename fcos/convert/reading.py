"""Foreign files to tensors by name. Nothing in a file is ever run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcos.checkpoint import CheckpointError, is_ours, read_plain, read_safetensors

from .errors import ConvertError
from .pickled_arrays import read_pickle

# Where code bases keep the weights among the state of their optimisers.
_CONTAINERS = ("model", "state_dict")


class ForeignFile(NamedTuple):
    """A checkpoint as it was found."""

    state: dict[str, Tensor]
    """The weights, floating ones as float32; without the ``module.`` of a network that was trained
    on several GPUs."""
    class_names: tuple[str, ...]
    """If the file says."""
    notes: str = ""
    """mmdetection's configuration, a text in a language of its own; "" elsewhere."""


def read_foreign(path: Path) -> ForeignFile:
    """The weights in a ``.pth``, ``.pkl`` or ``.safetensors`` file.

    Raises:
        ConvertError: it is missing, damaged, or holds something that could run code when loaded.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    if path.suffix == ".pkl":
        return parse(read_pickle(path), path)
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_plain(path)
    except CheckpointError as error:
        raise ConvertError(_explain(error)) from error
    return parse(content, path)


def parse(content: Any, path: Path) -> ForeignFile:
    """The weights among what a file holds. Raises ConvertError where there are none."""
    if is_ours(content):
        raise ConvertError(
            f"{path}: is a checkpoint of this project already; --to writes it for another"
        )
    state = content
    if isinstance(content, dict):
        found = [content[name] for name in _CONTAINERS if isinstance(content.get(name), dict)]
        state = found[0] if found else content
    if not isinstance(state, dict) or not state:
        raise ConvertError(
            f"{path}: holds no weights, neither by name nor under {' or '.join(_CONTAINERS)}"
        )
    tensors = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            native = value.astype(value.dtype.newbyteorder("="))
            value = torch.from_numpy(np.array(native, order="C"))
        if not isinstance(key, str):
            raise ConvertError(f"{path}: weights must have names, got {key!r}")
        if not isinstance(value, Tensor):
            raise ConvertError(f"{path}: {key!r} is {type(value).__name__}, not a tensor")
        if value.is_floating_point():
            value = value.detach().float()
        tensors[key] = value
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return ForeignFile(tensors, _class_names(content), _notes(content))


def _class_names(content: Any) -> tuple[str, ...]:
    """mmdetection's: meta.CLASSES, or meta.dataset_meta.classes."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return ()
    deeper = meta.get("dataset_meta")
    for place in (meta, deeper if isinstance(deeper, dict) else {}):
        for name in ("CLASSES", "classes"):
            names = place.get(name)
            if isinstance(names, list | tuple) and all(isinstance(n, str) for n in names):
                return tuple(names)
    return ()


def _notes(content: Any) -> str:
    """mmdetection's: meta.config, or meta.cfg from version 3 on."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return ""
    return next((meta[name] for name in ("config", "cfg") if isinstance(meta.get(name), str)), "")


def _explain(error: CheckpointError) -> str:
    """The message, and what was refused if torch says so."""
    names = re.findall(r"GLOBAL (\S+)", str(error.__cause__))
    return f"{error}; it names {names[0]}" if names else str(error)
