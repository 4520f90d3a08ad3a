"""Tensors of a layer, in our name and theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

CONV = ("weight",)
CONV_BIAS = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

#: Our key and theirs.
Rows = Iterator[tuple[str, str]]


def keys(ours: str, theirs: str, parts: Iterable[str]) -> Rows:
    """The keys of a module's tensors."""
    for part in parts:
        yield f"{ours}.{part}", f"{theirs}.{part}"
