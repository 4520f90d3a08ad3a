"""Reads what the compiler says of each kernel: registers, shared memory, and memory of threads."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from .compile import Compiled, MissingTool


@dataclass
class Usage:
    """Of one function for one architecture; bytes are those of a thread but for shared memory."""

    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0


def read_report(compiled: Compiled) -> dict[str, Usage]:
    """By readable name: every kernel, and every function that was not inlined into one."""
    usages: dict[str, Usage] = {}
    usage = Usage()
    for line in compiled.report.splitlines():
        if found := re.search(r"Function properties for (\S+)", line):
            usage = usages.setdefault(found[1], Usage())
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes = map(
                int, found.groups()
            )
        elif found := re.search(r"Used (\d+) registers", line):
            usage.registers = int(found[1])
            if found := re.search(r"(\d+) bytes smem", line):
                usage.shared_bytes = int(found[1])
    return dict(zip(readable(usages), usages.values(), strict=True))


@functools.cache
def _filter() -> str:
    """c++filt first: its spelling is that of the checked-in budgets."""
    for name in ("c++filt", "cu++filt"):
        if path := shutil.which(name):
            return path
    raise MissingTool("neither c++filt nor cu++filt was found")


def readable(names: Iterable[str]) -> list[str]:
    """Names of functions without what does not tell them apart.

    ``void ns::(anonymous namespace)::kernel<(ns::Mode)2, c10::Half>(ns::Args)`` becomes
    ``kernel<(Mode)2, Half>``. Overloads keep their parameters.
    """
    names = list(names)
    if not names:
        return []
    done = subprocess.run(
        [_filter()], input="\n".join(names) + "\n", capture_output=True, text=True, check=True
    )
    full = [_without_namespaces(name) for name in done.stdout.splitlines()]
    short = [_without_parameters(name) for name in full]
    return [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]


def _without_namespaces(name: str) -> str:
    name = name.replace("(bool)1", "true").replace("(bool)0", "false")
    name = name.replace("(anonymous namespace)::", "")
    return re.sub(r"\b(?:[a-z_]\w*::)+", "", name).removeprefix("void ")


def _without_parameters(name: str) -> str:
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name
