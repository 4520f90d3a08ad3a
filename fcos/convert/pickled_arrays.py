"""Pickles of numpy arrays, read without running anything that they name.

A pickle is a program: it names functions and has them called. The unpickler here knows the few
names that arrays are pickled with, and has its own functions for them, so that neither numpy's nor
anyone else's are ever called with what a file says. Any other name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConvertError

_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def read_pickle(path: Path) -> Any:
    """Dicts, lists, text, numbers and numpy arrays of a pickle.

    Raises:
        ConvertError: it names something else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            # Caffe2's models were pickled by Python 2: latin1 keeps the bytes of its strings
            return _plain(_Unpickler(file, encoding="latin1").load())
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from error
    except Exception as error:  # whatever the bytes lead to: EOFError, IndexError, MemoryError
        raise ConvertError(
            f"{path}: not a pickle of arrays, or a truncated one ({type(error).__name__})"
        ) from error


class _DType:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        if str(code) not in _CODES:
            raise ConvertError(f"refused: it holds arrays of the type {str(code)!r}")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for numpy.ndarray while it is put together."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _from_bytes(data, kind, shape, "F" if fortran else "C")


def _from_bytes(data: Any, kind: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if isinstance(data, str):
        data = data.encode("latin1")
    sizes = tuple(int(size) for size in shape)
    if not isinstance(kind, _DType) or min(sizes, default=0) < 0:
        raise ConvertError("refused: an array without a type or with a negative size")
    if len(data) != prod(sizes) * kind.dtype.itemsize:
        raise ConvertError(f"damaged: {len(data)} bytes for an array of shape {sizes}")
    flat = np.frombuffer(data, kind.dtype)
    return flat.reshape(sizes, order="F" if order == "F" else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise ConvertError("refused: an array of no plain type")
    return _Array()


def _scalar(kind: _DType, data: Any) -> Any:
    return _from_bytes(data, kind, (), "C").item()


def _frombuffer(data: Any, kind: _DType, shape: Any, order: str) -> np.ndarray[Any, Any]:
    return _from_bytes(bytes(data), kind, shape, order)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 holds bytes."""
    if encoding != "latin1":
        raise ConvertError(f"refused: text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 holds bytes that are none."""
    return b""


# numpy.core became numpy._core with numpy 2
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ConvertError(
                f"refused: it names {module}.{name}, which could run code when loaded. Only numpy "
                "arrays, dicts, lists, text and numbers are read"
            )
        return _KNOWN[module, name]


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The same with arrays in place of what stood for them; what is shared stays shared."""
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    plain = value
    if isinstance(value, dict):
        plain = {key: _plain(item, done) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        plain = [_plain(item, done) for item in value]
    elif isinstance(value, _Array):
        if value.value is None:
            raise ConvertError("damaged: an array without values")
        plain = value.value
    done[id(value)] = plain
    return plain
