"""What each kernel may use, in ``budgets/<source>.json``, and the check against it.

A budget has two parts::

    "requirements"  written by hand: patterns of kernel names, what the machine code of each
                    kernel that matches must look like, and why
    "kernels"       written by ``python -m tests.cuda_gates --update``: registers and shared
                    memory of every kernel for every architecture

Limits of registers are the present figure rounded up to a multiple of 8: so many are given out at a
time, hence more within the same 8 cost nothing, and another release of the compiler may differ by
one or two. Shared memory has no such slack. What lives in memory of a thread (stack, spills, local
loads and stores) has no budget: the limit is 0. Growth is fine where it is meant: ``--update``, and
the change of the budget is seen in review.

Keys of a requirement:

    kernels           pattern (regular expression) of whole readable names; one must match
    reason            why, printed where it fails
    architectures     those it is required of; all, unless given
    wide_loads        least number of 16-byte loads in the streaming loop, that is in flight
    wide_stores       least number of 16-byte stores in it
    element_bytes     size of an element of those loads; for the two that follow
    instructions_per_element, mufu_per_element
                      most that the streaming loop may execute for each element it loads
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .compile import TESTED, Compiled
from .report import Usage, read_report
from .sass import Code, read_disassembly

BUDGETS = Path(__file__).resolve().parent / "budgets"
UPDATE = "python -m tests.cuda_gates --update"

_REGISTERS_AT_A_TIME = 8
_REQUIREMENT_KEYS = {
    *("kernels", "reason", "architectures", "wide_loads", "wide_stores", "element_bytes"),
    *("instructions_per_element", "mufu_per_element"),
}

Budget = dict[str, Any]


def budget_path(source: Path, folder: Path = BUDGETS) -> Path:
    return folder / f"{source.stem}.json"


def load_budget(path: Path) -> Budget:
    """Empty where there is no file.

    Raises:
        ValueError: a requirement has an unknown key or no reason.
    """
    if not path.exists():
        return {"requirements": [], "kernels": {}}
    budget: Budget = json.loads(path.read_text())
    for requirement in budget["requirements"]:
        if unknown := requirement.keys() - _REQUIREMENT_KEYS:
            raise ValueError(f"{path.name}: unknown keys of a requirement: {sorted(unknown)}")
        if not requirement.get("reason") or "kernels" not in requirement:
            raise ValueError(f"{path.name}: a requirement needs kernels and a reason")
        if _per_element(requirement) and "element_bytes" not in requirement:
            raise ValueError(f"{path.name}: figures per element need element_bytes")
    return budget


def save_budget(path: Path, budget: Budget) -> None:
    """One line for each requirement and each kernel."""
    requirements = [json.dumps(requirement) for requirement in budget["requirements"]]
    kernels = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(budget["kernels"].items())]
    text = (
        f'{{\n "requirements": [{_lines(requirements)}],\n "kernels": {{{_lines(kernels)}}}\n}}\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lines(items: list[str]) -> str:
    return "\n  " + ",\n  ".join(items) + "\n " if items else ""


def updated_budget(budget: Budget, compiled: Iterable[Compiled]) -> Budget:
    """With the present figures; architectures that were not compiled keep theirs."""
    kernels: dict[str, Any] = {}
    for each in compiled:
        for name, usage in read_report(each).items():
            entry = kernels.setdefault(name, budget["kernels"].get(name, {}))
            units = -(-usage.registers // _REGISTERS_AT_A_TIME)
            for what, limit in (
                ("registers", units * _REGISTERS_AT_A_TIME),
                ("shared_bytes", usage.shared_bytes),
            ):
                limits = entry.setdefault(what, {}) | {each.architecture: limit}
                entry[what] = dict(sorted(limits.items(), key=lambda item: int(item[0])))
    return {"requirements": budget["requirements"], "kernels": kernels}


def check(compiled: Compiled, budget: Budget) -> list[str]:
    """One line for each figure over its limit: kernel, figure, limit. Empty: all is well."""
    usages, codes = read_report(compiled), read_disassembly(compiled)
    failures: list[str] = []
    for name, usage in usages.items():
        code = codes.get(name, Code([]))
        failures += _check_memory(usage, code, name)
        failures += _check_usage(usage, budget["kernels"].get(name, {}), name, compiled)
    for name in budget["kernels"].keys() - usages.keys():
        failures.append(f"{name}: in the budget, but not in the source; run {UPDATE}")
    for requirement in budget["requirements"]:
        if compiled.architecture not in requirement.get("architectures", [compiled.architecture]):
            continue
        matching = [name for name in codes if re.fullmatch(requirement["kernels"], name)]
        if not matching:
            failures.append(
                f"no kernel matches {requirement['kernels']!r}, of which the budget requires: "
                f"{requirement['reason']}"
            )
        for name in matching:
            failures += _check_requirement(codes[name], requirement, name)
    where = f"{compiled.source.name} sm_{compiled.architecture}"
    return [f"{where}: {failure}" for failure in sorted(failures)]


def _check_memory(usage: Usage, code: Code, name: str) -> Iterable[str]:
    figures = {
        "bytes of stack": usage.stack_bytes,
        "bytes of spill stores": usage.spill_store_bytes,
        "bytes of spill loads": usage.spill_load_bytes,
        "local loads and stores (LDL, STL)": sum(i.is_local for i in code.instructions),
    }
    for what, figure in figures.items():
        if figure > 0:
            yield f"{name}: {figure} {what}, limit 0"
    if not code.instructions:
        yield f"{name}: no machine code was found"


def _check_usage(
    usage: Usage, limits: dict[str, Any], name: str, compiled: Compiled
) -> Iterable[str]:
    figures = {
        "registers": (usage.registers, "registers"),
        "shared_bytes": (usage.shared_bytes, "bytes of shared memory"),
    }
    found = {what: limits.get(what, {}).get(compiled.architecture) for what in figures}
    if None in found.values():
        update = UPDATE if compiled.architecture in TESTED else f"{UPDATE} --all"
        words = ", ".join(f"{figure} {unit}" for figure, unit in figures.values())
        yield f"{name}: {words}, no limit in the budget; run {update}"
        return
    for what, (figure, unit) in figures.items():
        if figure > found[what]:
            yield f"{name}: {figure} {unit}, limit {found[what]}"


def _per_element(requirement: dict[str, Any]) -> dict[str, float]:
    """Limit by opcode, "" for all."""
    keys = {"": "instructions_per_element", "MUFU": "mufu_per_element"}
    return {opcode: requirement[key] for opcode, key in keys.items() if key in requirement}


def _check_requirement(code: Code, requirement: dict[str, Any], name: str) -> Iterable[str]:
    loop, reason = code.streaming_loop(), requirement["reason"]
    for key, kind in (("wide_loads", "LDG"), ("wide_stores", "STG")):
        least, figure = int(requirement.get(key, 0)), loop.count_wide(kind)
        if figure < least:
            yield f"{name}: {figure} 16-byte {kind} in its loop, at least {least}: {reason}"
    limits = _per_element(requirement)
    if not limits:
        return
    elements = loop.wide_load_bytes() / requirement["element_bytes"]
    if elements == 0:
        yield f"{name}: no 16-byte loads to count its elements by: {reason}"
        return
    for opcode, limit in limits.items():
        total = loop.count(opcode) if opcode else len(loop.instructions)
        if total / elements > limit:
            what = opcode or "instructions"
            yield f"{name}: {total / elements:.1f} {what} an element, limit {limit}: {reason}"
