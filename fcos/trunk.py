"""What a backbone is made from: a network of a library, and the weights that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .checkpoint import CheckpointError, read_plain, read_safetensors
from .config import ConfigError, ModelConfig

# Counts the batches that a norm has seen, which nothing uses.
_COUNTER = "num_batches_tracked"

# Names of the modules of each stage.
Stages = tuple[tuple[str, ...], ...]


class MissingPackageError(ConfigError):
    """A network needs a package that is not installed."""


class Trunk(NamedTuple):
    """A network for classification without what classifies."""

    body: nn.Module
    stages: Stages
    """In the order in which they can be frozen: the stem, then four more."""
    channels: tuple[int, ...]
    """Of the feature maps that it gives."""
    taps: tuple[str, ...] = ()
    """The children of ``body`` whose outputs are C3, C4 and C5. (): its own output is a list of
    feature maps, which a pyramid for such networks takes."""


def load_weights(
    trunk: nn.Module,
    state: dict[str, Tensor],
    config: ModelConfig,
    library: str,
    ignored: tuple[str, ...],
) -> None:
    """Fill a trunk; all that it has must be there.

    Args:
        trunk: as the library that it is from makes it.
        state: weights by that library's names.
        config, library: for messages.
        ignored: beginnings of names on either side that do not matter: what classifies.

    Raises:
        ConfigError: the weights are not this network's.
    """
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    try:
        missing, unexpected = trunk.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a shape differs
        raise ConfigError(
            f"backbone weights {config.backbone_weights}: do not fit {config.backbone}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    missing = [k for k in missing if not k.startswith(ignored) and _COUNTER not in k]
    unexpected = [k for k in unexpected if _COUNTER not in k]
    if missing or unexpected:
        raise ConfigError(
            f"backbone weights {config.backbone_weights}: not a state dict of {library}'s "
            f"{config.backbone}; missing {missing[:5]}, unexpected {unexpected[:5]}"
        )


def weights_from_file(path: Path) -> dict[str, Tensor]:
    """A state dict in a file of torch's, or a ``.safetensors`` file. Raises ConfigError."""
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_plain(path)
    except CheckpointError as error:
        raise ConfigError(f"backbone weights {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"backbone weights {path}: must be a state dict, names to tensors")
    return state
