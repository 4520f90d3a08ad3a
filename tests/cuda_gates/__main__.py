"""Compiles the CUDA sources and holds each kernel to its budget; see ``budget.py``.

python -m tests.cuda_gates                   what the tests check: sm_80 and sm_90
python -m tests.cuda_gates --all             every supported architecture
python -m tests.cuda_gates --update [--all]  the present figures become the budget
python -m tests.cuda_gates --show nms        print the figures of the sources that match
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .budget import BUDGETS, budget_path, check, load_budget, save_budget, updated_budget
from .compile import ALL, SOURCES, TESTED, Compiled, CompileError, MissingTool, compile_all
from .report import read_report
from .sass import read_disassembly


def show(compiled: Compiled) -> None:
    """A line for each kernel; figures of its streaming loop in brackets."""
    codes = read_disassembly(compiled)
    print(f"\n{compiled.source.name} sm_{compiled.architecture}")
    for name, usage in sorted(read_report(compiled).items()):
        loop = codes[name].streaming_loop()
        print(
            f"  {usage.registers:3d} registers {usage.shared_bytes:6d} B shared "
            f"{len(codes[name].instructions):6d} instructions "
            f"[{len(loop.instructions)}: {loop.wide_load_bytes():4d} B by "
            f"{loop.count_wide('LDG')} wide loads, {loop.count_wide('STG')} wide stores, "
            f"{loop.count('MUFU')} MUFU]  {name}"
        )


def main(arguments: Sequence[str] | None = None, sources: Sequence[Path] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help=f"sm_{', sm_'.join(ALL)}")
    parser.add_argument("--update", action="store_true", help="rewrite the budgets")
    parser.add_argument("--show", action="store_true", help="print the figures")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, help=argparse.SUPPRESS)
    parser.add_argument("match", nargs="*", help="sources whose name contains one of these")
    options = parser.parse_args(arguments)

    chosen = [
        source
        for source in (SOURCES if sources is None else sources)
        if not options.match or any(match in source.stem for match in options.match)
    ]
    failures: list[str] = []
    for source in chosen:
        try:
            compiled = compile_all([source], ALL if options.all else TESTED)
        except (CompileError, MissingTool) as error:
            failures.append(f"{source.name}: {error}")
            continue
        path = budget_path(source, options.budgets)
        budget = load_budget(path)
        if options.update:
            budget = updated_budget(budget, compiled)
            if budget["kernels"] or path.exists():
                save_budget(path, budget)
        for each in compiled:
            if options.show:
                show(each)
            failures += check(each, budget)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(chosen)} sources, {'all well' if not failures else f'{len(failures)} failures'}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
