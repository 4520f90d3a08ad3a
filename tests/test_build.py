"""The build keeps its promises: stable ABI only, CUDA sources compile well, reasons are given."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from fcos_ext import _library

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
# Data-centre GPUs of two generations; what compiles for them compiles for what lies between.
ARCHITECTURES = ("80", "90")
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


# ---- the CUDA sources ---------------------------------------------------------------------------


def nvcc() -> Path:
    home = setup.find_cuda_home()
    if home is None:
        if os.environ.get("FCOS_REQUIRE_NVCC") == "1":
            pytest.fail("FCOS_REQUIRE_NVCC=1, but nvcc was not found")
        pytest.skip("nvcc was not found")
    return Path(home, "bin", "nvcc")


def memory_use(ptxas: str) -> Iterator[tuple[str, str, int]]:
    """(architecture and kernel, what, bytes) of every function that ``-Xptxas -v`` reports on."""
    architecture = ""
    for line, following in zip(ptxas.splitlines(), ptxas.splitlines()[1:] + [""], strict=True):
        if found := re.search(r"Compiling entry function .* for '(sm_\w+)'", line):
            architecture = found[1]
        elif found := re.search(r"Function properties for (\S+)", line):
            for size, what in re.findall(r"(\d+) bytes ([a-z ]+)", following):
                yield f"{architecture} {found[1]}", what, int(size)


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_compiles(source: Path, tmp_path: Path) -> None:
    """For two generations of GPU, and without a variable that has to live in memory."""
    command = [
        *(str(nvcc()), "-c", str(source), "-o", str(tmp_path / "out.o")),
        *(flag for flag in setup.NVCC_FLAGS if not flag.startswith("--threads")),
        *COMMON_NVCC_FLAGS,
        "-std=c++17",  # what the oldest torch builds with
        *("-Xptxas", "-v"),  # not -warn-spills: the stack counts too
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
        *(f"-I{path}" for path in include_paths()),
        f"-I{sysconfig.get_path('include')}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    report = list(memory_use(done.stdout + done.stderr))
    if "__global__" in source.read_text():
        for architecture in ARCHITECTURES:
            assert any(where.startswith(f"sm_{architecture} ") for where, *_ in report)
            assert {what for _, what, _ in report} == {"stack frame", "spill stores", "spill loads"}
    over = [f"{where}: {size} bytes {what}, limit 0" for where, what, size in report if size > 0]
    assert not over, demangled("\n".join(over))


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout


def test_memory_use_is_read_from_the_compiler() -> None:
    """The gate above would let everything pass if it did not understand the report."""
    report = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    96 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 96 bytes cumulative stack size
"""
    assert list(memory_use(report)) == [
        ("sm_90 _Z1kv", "stack frame", 96),
        ("sm_90 _Z1kv", "spill stores", 8),
        ("sm_90 _Z1kv", "spill loads", 24),
    ]


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


# ---- the build backend --------------------------------------------------------------------------

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
