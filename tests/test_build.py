"""The build keeps its promises: stable ABI only, and reasons are given for what is not built."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fcos_ext import _library

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("_C", "_C_cuda", "_host")


def load(path: Path) -> ModuleType:
    """A Python file that is no part of a package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load(ROOT / "setup.py")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """setup.py tells torch's tools what it found by setting variables."""
    before = dict(os.environ)
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


# ---- what was built -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARIES)
def test_only_stable_symbols(name: str) -> None:
    """No C++ of torch: only the C functions that it keeps from one version to the next."""
    found = list((ROOT / "fcos_ext").glob(f"{name}.*so"))
    skipped = _library.build_info().get("cuda", {}).get("skipped")
    if name == "_C_cuda" and not found and skipped:
        pytest.skip(f"no CUDA library: {skipped}")
    (library,) = found
    nm = subprocess.run(["nm", "-uC", library], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1] for line in nm.stdout.splitlines()]
    assert symbols
    unstable = [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", s)]
    assert not unstable
    torch_symbols = [s for s in symbols if "torch" in s]
    assert all(re.match(r"(aoti_)?torch_\w+$", s) for s in torch_symbols), torch_symbols
    # _host also answers where neither torch nor CUDA can be loaded.
    assert bool(torch_symbols) == (name != "_host")
    if name != "_host":
        assert library.name == f"{name}.abi3.so"


def test_cuda_library_has_every_kernel() -> None:
    """Where the CUDA half is built, each operator with a CPU kernel has a CUDA one."""
    if reason := _library.why_missing("cuda"):
        pytest.skip(f"no CUDA library: {reason}")
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fcos_ext::")]
    assert names
    for name in names:
        assert _library.kernels(name.removeprefix("fcos_ext::")) == {"cpu", "cuda"}, name


# ---- what setup.py decides ----------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc is a script."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    script = home / "bin" / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 12.8, V12.8.93';;\n"
        "  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_100\\n';;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return home


def test_cuda_home(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert setup.find_cuda_home() == toolkit
    # A wrapper outside the toolkit does not lead to one; the variable goes before the path.
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert setup.find_cuda_home() != wrapper.parent.parent
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup.find_cuda_home() == toolkit


@pytest.mark.parametrize(
    "torch_cuda, has_toolkit, force, expected",
    [
        ("12.6", True, None, None),  # a minor version may differ
        ("12.6", True, "0", "FORCE_CUDA=0"),
        (None, True, None, "torch .* is a build without CUDA"),
        ("12.6", False, None, "nvcc was not found"),
        ("13.0", True, None, "nvcc is 12.8 but torch was built with CUDA 13.0: the major version"),
    ],
)
def test_why_no_cuda(
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: str | None,
    has_toolkit: bool,
    force: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    if force:
        monkeypatch.setenv("FORCE_CUDA", force)
    reason = setup.why_no_cuda(toolkit if has_toolkit else None)
    if expected is None:
        assert reason is None
    else:
        assert re.match(expected, reason)


def test_architectures(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Those of torch that nvcc knows; PTX of the last one is for GPUs to come.
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_75 sm_100 sm_90", raising=False)
    assert setup.cuda_architectures(toolkit) == "9.0;10.0+PTX"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    capabilities = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert setup.cuda_architectures(toolkit) == "8.6;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert setup.cuda_architectures(toolkit) == "8.0"


def test_what_is_built(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(setup, "find_cuda_home", lambda: None)
    built, info = setup.extensions()
    assert [extension.name for extension in built] == ["fcos_ext._C", "fcos_ext._host"]
    reason = "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip's cuda-toolkit)"
    assert info["cuda"] == {"skipped": reason}
    assert setup.summary(info) == (
        f"fcos build | torch {torch.__version__} | CPU kernels: yes | CUDA kernels: no, {reason}"
    )
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="fcos: FORCE_CUDA=1, but nvcc was not found"):
        setup.extensions()


def test_summary_names_the_architectures() -> None:
    info = {"torch": "2.12.0", "cpu": {}, "cuda": {"nvcc": "13.0", "architectures": "8.0;9.0"}}
    assert setup.summary(info) == (
        "fcos build | torch 2.12.0 | CPU kernels: yes | CUDA kernels: yes (nvcc 13.0, 8.0;9.0)"
    )


def test_stale_libraries_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "fcos_ext").mkdir()
    for name in ("_C.abi3.so", "_C_cuda.abi3.so", "_host.cpython-310-x86_64-linux-gnu.so", "a.py"):
        (tmp_path / "fcos_ext" / name).touch()
    setup.remove_stale({"_C", "_host"})
    left = sorted(path.name for path in (tmp_path / "fcos_ext").iterdir())
    assert left == ["_C.abi3.so", "_host.cpython-310-x86_64-linux-gnu.so", "a.py"]


@pytest.mark.parametrize("only", ["g++", "clang++"])
def test_compiler_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not setup.has_cxx_compiler()
    (tmp_path / only).write_text("#!/bin/sh\n")
    (tmp_path / only).chmod(0o755)
    assert setup.has_cxx_compiler()
    assert os.environ["CXX"] == only
    monkeypatch.setenv("CXX", "missing -pipe")
    assert not setup.has_cxx_compiler()


def test_without_a_compiler(tmp_path: Path) -> None:
    """The build succeeds and says why nothing was built; the package works, and says it too."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "fcos_ext", tmp_path / "fcos_ext", ignore=without_libraries)
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "empty")}
    environment.pop("CC", None)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler was found (CXX, c++, g++, clang++)"
    assert f"CPU kernels: no, {reason} | CUDA kernels: no, {reason}" in done.stderr
    assert not list(tmp_path.rglob("*.so"))

    # An editable install would find the libraries of the project in place of those missing here.
    program = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
import fcos_ext, fcos_ext._library, torch
print(fcos_ext.__file__)
logits = torch.zeros(2, 3, requires_grad=True)
loss = fcos_ext.sigmoid_focal_loss(logits, torch.tensor([1, -1]), 0.25, 0.0)
loss.backward()
print(loss.item(), logits.grad.tolist())
print(fcos_ext._library.why_missing("cuda"))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning: fcos_ext") == 1
    warning = f"RuntimeWarning: fcos_ext: no compiled kernels (not built: {reason}); everything"
    assert f"{warning} runs on its slower PyTorch reference" in done.stderr
    file, computed, why = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    # 0.25 log 2 for the positive, 5 times 0.75 log 2 for the negatives
    loss, gradient = computed.split(maxsplit=1)
    assert float(loss) == pytest.approx(4 * 0.6931471805599453)
    assert json.loads(gradient) == [[0.375, -0.125, 0.375], [0.375] * 3]
    assert why == f"not built: {reason}"


def without_libraries(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".py", "py.typed"))]
