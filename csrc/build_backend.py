"""Build backend that compiles against the torch the user already has.

An isolated build sees none of the installed packages, and asking for torch as a build requirement
would download a second, different one. But pip runs isolated builds with the environment's own
interpreter, whose ``sysconfig`` still names the real site-packages: torch is imported from there.
"""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change

MINIMUM_TORCH = "torch>=2.11"


def _site_packages() -> Iterator[Path]:
    yield Path(sysconfig.get_path("purelib"))
    yield Path(sysconfig.get_path("platlib"))
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # uv builds with an interpreter of its own
        if prefix := os.environ.get(variable):
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            yield Path(prefix, "lib", python, "site-packages")


def _expose_torch() -> bool:
    """Make torch importable. At the end of the path: the build's own packages come first."""
    if importlib.util.find_spec("torch"):
        return True
    for folder in _site_packages():
        if (folder / "torch" / "version.py").is_file():
            sys.path.append(str(folder))
            return True
    return False


_torch_requirement = [] if _expose_torch() else [MINIMUM_TORCH]


# setup.py needs torch; where there is none yet, it cannot be run to ask what else is required.
def get_requires_for_build_wheel(config_settings=None):
    return _torch_requirement or build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _torch_requirement or build_meta.get_requires_for_build_editable(config_settings)


def get_requires_for_build_sdist(config_settings=None):
    return _torch_requirement or build_meta.get_requires_for_build_sdist(config_settings)
