"""The build backend finds the torch that is there, and asks for one only where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# What pip gives to an isolated build: this interpreter, but of its packages only setuptools.
ISOLATED = """
import importlib.util, os, sys, sysconfig
import setuptools.build_meta
hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path[:] = [path for path in sys.path if path not in hidden]
assert importlib.util.find_spec("torch") is None
%s
sys.path.insert(0, "csrc")
import build_backend
print(build_backend._torch_requirement, importlib.util.find_spec("torch") is not None)
print(sys.path[-1])
for hook in ("wheel", "editable", "sdist"):
    if build_backend._torch_requirement:
        print(getattr(build_backend, "get_requires_for_build_" + hook)())
"""
NO_TORCH = "sysconfig.get_path = lambda name: os.path.join(os.sep, 'nowhere')"


def isolated_backend(preparation: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED % preparation],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_backend_uses_the_torch_that_is_there() -> None:
    found, last = isolated_backend("")
    assert found == "[] True"
    # Last, so that the build's own packages go before those of the environment.
    assert Path(last, "torch").samefile(Path(torch.__file__).parent)


def test_backend_asks_for_torch_where_there_is_none() -> None:
    found, _, *requirements = isolated_backend(NO_TORCH)
    assert found == "['torch>=2.11'] False"
    assert requirements == ["['torch>=2.11']"] * 3


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_backend_looks_into_the_active_environment(tmp_path: Path, variable: str) -> None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "lib" / python / "site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "torch" / "version.py").touch()
    (packages / "torch" / "__init__.py").touch()
    found, last = isolated_backend(NO_TORCH, **{variable: str(tmp_path)})
    assert found == "[] True"
    assert last == str(packages)
