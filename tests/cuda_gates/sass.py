"""Reads disassembled kernels: memory accesses, and what one pass of the streaming loop executes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .compile import Compiled
from .report import readable

_WIDTHS = {".64": 8, ".128": 16, ".256": 32}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    """With its modifiers, such as ``LDG.E.EF.128``."""
    target: int | None
    """Address that a branch goes to."""

    @property
    def is_local(self) -> bool:
        """Whether it accesses a thread's own memory: spilled registers, or an indexed array."""
        return self.opcode.split(".")[0] in ("LDL", "STL")

    def wide_bytes(self, kind: str) -> int:
        """Bytes of a global ``LDG`` or ``STG`` of at least 16; 0 of any other instruction."""
        if self.opcode.split(".")[0] != kind:
            return 0
        width = next((w for suffix, w in _WIDTHS.items() if suffix in self.opcode), 4)
        return width if width >= 16 else 0


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel in the order of their addresses."""

    instructions: list[Instruction]

    def count_wide(self, kind: str) -> int:
        return sum(i.wide_bytes(kind) > 0 for i in self.instructions)

    def count(self, opcode: str) -> int:
        return sum(i.opcode.split(".")[0] == opcode for i in self.instructions)

    def loops(self) -> list[Code]:
        """From the target of each backward branch to the branch; the trap at the end is none."""
        found = []
        for branch in self.instructions:
            if branch.target is not None and branch.target < branch.address:
                inside = range(branch.target, branch.address + 1)
                found.append(Code([i for i in self.instructions if i.address in inside]))
        return found

    def streaming_loop(self) -> Code:
        """The innermost loop with 16-byte loads, and of several the one with the most.

        The whole kernel, up to its end, where there is none: a block then has one tile of work.
        """
        with_loads = [loop for loop in self.loops() if loop.count_wide("LDG")]
        innermost = [
            loop
            for loop in with_loads
            if not any(_contains(loop, other) for other in with_loads if other is not loop)
        ]
        if innermost:
            return max(innermost, key=lambda loop: loop.count_wide("LDG"))
        ends = [i.address for i in self.instructions if i.opcode == "EXIT"]
        last = max(ends, default=0)
        return Code([i for i in self.instructions if i.address <= last])

    def wide_load_bytes(self) -> int:
        return sum(i.wide_bytes("LDG") for i in self.instructions)


def _contains(outer: Code, inner: Code) -> bool:
    first, last = inner.instructions[0].address, inner.instructions[-1].address
    return (
        outer.instructions[0].address <= first
        and last <= outer.instructions[-1].address
        and len(inner.instructions) < len(outer.instructions)
    )


_INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);")


def read_disassembly(compiled: Compiled) -> dict[str, Code]:
    """By readable name."""
    functions: dict[str, Code] = {}
    for line in compiled.disassembly.splitlines():
        if line.startswith("Function : "):
            code = functions.setdefault(line.removeprefix("Function : "), Code([]))
        elif found := _INSTRUCTION.match(line):
            address, opcode, operands = int(found[1], 16), found[2], found[3]
            target = None
            if opcode.split(".")[0] == "BRA" and (hexes := re.findall(r"0x[0-9a-f]+", operands)):
                target = int(hexes[-1], 16)
            if opcode != "NOP":  # padding
                code.instructions.append(Instruction(address, opcode, target))
    return dict(zip(readable(functions), functions.values(), strict=True))
