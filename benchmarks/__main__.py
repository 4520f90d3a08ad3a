"""Runs benchmarks by name, or all: ``python -m benchmarks [NAME ...] [--quick] [--device cuda]``.

Each verifies before it times, and writes its rows to benchmarks/results; see ``harness.main``. A
quick run is for seeing that everything works: it is small, and leaves no rows.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from . import __path__ as _FOLDER
from . import harness

NAMES = tuple(
    module.name.removeprefix("bench_")
    for module in pkgutil.iter_modules(_FOLDER)
    if module.name.startswith("bench_")
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Returns the number of benchmarks with a wrong result."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--only", metavar="TEXT", help="cases of one benchmark, by their names")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known are {', '.join(NAMES)}")
    if options.only is not None and len(options.names) != 1:
        parser.error("--only needs the name of one benchmark before it")
    passed_on = ["--device", options.device, *(["--quick"] if options.quick else [])]
    passed_on += [] if options.only is None else ["--only", options.only]
    wrong = 0
    for name in options.names or NAMES:
        print(f"\n== {name}", flush=True)
        module = importlib.import_module(f".bench_{name}", __package__)
        wrong += harness.main(module.OP, module.cases, passed_on)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
