"""Settings to nested dicts and YAML, and back."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import Config, ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as nested dicts of plain values, for YAML and checkpoints."""
    return {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(data: Any, source: str, cls: type = Config, path: str = "") -> Any:
    """The inverse of :func:`to_dict`. Settings that are not given keep their default.

    Args:
        data: nested dicts.
        source: where they come from, for the messages.

    Raises:
        ConfigError: a name is unknown (with the nearest known one), or a value has another type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: {path or 'the settings'} must be a mapping, got {data!r}")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        full_name = f"{path}.{name}" if path else str(name)
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(types)}"
            raise ConfigError(f"{source}: unknown setting {full_name}{hint}")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            values[name] = from_dict(value, source, typing.cast(type, kind), full_name)
        else:
            try:
                values[name] = _convert(value, kind)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{source}: {full_name} must be {_describe(kind)}, got {value!r}"
                ) from error
    return cls(**values)


def save_yaml(config: Config, path: Path) -> None:
    """Write all settings."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load_yaml(path: Path) -> Config:
    """Read settings; those not in the file keep their default. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    config: Config = from_dict({} if data is None else data, str(path))
    return config


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _convert(value: Any, kind: Any) -> Any:
    """``value``, as YAML gave it, as the type ``kind``. Raises TypeError or ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        if arguments[-1] is Ellipsis:
            return tuple(_convert(v, arguments[0]) for v in value)
        return tuple(_convert(v, k) for v, k in zip(value, arguments, strict=True))
    if type(None) in arguments:  # X | None
        return None if value is None else _convert(value, arguments[0])
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    # YAML takes 1e-3, without a point, for text
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:  # exactly: a bool is an int to isinstance
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
