"""Compiles the CUDA sources of ``fcos_ext`` for the CPU simulator and registers them with PyTorch.

``load_simt_library()`` makes every CUDA kernel available as ``torch.ops.fcos_ext_simt.<op>`` on CPU
tensors. Objects are kept in ``build/simt``, named after a hash of all that goes into them, so only
what has changed is compiled again. ``simt.h`` says what the simulator checks and what it cannot.

The same tests run under AddressSanitizer, in a process that has its library preloaded::

    env $(python -m tests.simt.build) python -m pytest tests/ops -k simt
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"

COMMON_FLAGS = (
    "-O1",
    "-g1",  # line numbers for AddressSanitizer
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels read numbers as vectors, which nvcc allows
    "-ffp-contract=off",  # the same rounding on every CPU
    "-fsanitize=undefined",  # reported by undefined.cpp
    "-fno-sanitize=vptr",
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-DFCOS_SIMT",
    f"-I{SIMT / 'include'}",
)
ADDRESS_FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer")


def operator_flags(namespace: str) -> tuple[str, ...]:
    """Flags for sources that register operators: under another name, and for CPU tensors."""
    return (
        "-std=c++20",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-DFCOS_NAMESPACE={namespace}",
        "-DFCOS_CUDA_KEY=CPU",
        f"-isystem{sysconfig.get_path('include')}",
        *(f"-isystem{path}" for path in include_paths()),
    )


@functools.cache
def _environment_key() -> str:
    """Changes with the compiler, PyTorch and every header that a source may include."""
    version = subprocess.run([get_cxx_compiler(), "--version"], capture_output=True, check=True)
    digest = hashlib.sha256(version.stdout + torch.__version__.encode())
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *SIMT.rglob("*.h")]
    for header in sorted(headers):
        digest.update(bytes(header.relative_to(ROOT)) + header.read_bytes())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"simt: {' '.join(command)} failed:\n{result.stderr[-8000:]}")


def _made(name: str, key: str, command: Sequence[str]) -> Path:
    """The file that ``command + ["-o", file]`` makes, from an earlier run if there was one."""
    target = BUILD / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            _run([*command, "-o", f"{folder}/out"])
            Path(folder, "out").rename(target)  # at once: other processes may be building too
    return target


def link(
    name: str,
    sources: Sequence[tuple[Path, Sequence[str]]],
    link_flags: Sequence[str],
    sanitize_addresses: bool = False,
) -> Path:
    """Compile sources, each with flags of its own, and link them.

    Args:
        name: start of the file name of the result.
        sources: paths, ``.cu`` or C++, and the flags that each takes besides the common ones.
        link_flags: such as ``-shared`` and libraries.
        sanitize_addresses: build with AddressSanitizer.

    Returns:
        Path: the library or program.

    Raises:
        RuntimeError: the compiler's messages.
    """
    cxx = get_cxx_compiler()
    address = ADDRESS_FLAGS if sanitize_addresses else ()

    def compile_one(source: Path, flags: Sequence[str]) -> Path:
        command = [cxx, "-x", "c++", "-c", str(source), *COMMON_FLAGS, *address, *flags]
        key = " ".join(command) + _environment_key() + source.read_text()
        return _made(f"{source.stem}.o", key, command)

    jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()
    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(lambda args: compile_one(*args), sources)]
    command = [cxx, *objects, *address, *link_flags]
    return _made(name, " ".join(command), command)


def link_operators(name: str, sources: Sequence[Path], sanitize_addresses: bool = False) -> Path:
    """A library of simulated operators that ``torch.ops.load_library`` can load.

    Args:
        name: its namespace below ``torch.ops``, for sources that say ``FCOS_NAMESPACE``.
        sources: ``.cu`` and C++ files that use the stable ABI.
        sanitize_addresses: build with AddressSanitizer.
    """
    flags = operator_flags(name)
    # The allocator is C++ of PyTorch's own, which is not for sources with a target version.
    unstable = [flag for flag in flags if not flag.startswith("-DTORCH_TARGET_VERSION")]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link_flags = ["-shared", f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"]
    return link(
        name,
        [
            *((source, flags) for source in sources),
            (SIMT / "undefined.cpp", ["-std=c++17"]),
            (SIMT / "guarded_memory.cpp", unstable),
        ],
        [*link_flags, "-ltorch_cpu", "-lc10"],
        sanitize_addresses,
    )


class SimtLibrary:
    """The switches of a loaded library of simulated operators."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.simt_launches.restype = ctypes.c_int64

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._library.simt_launches()

    def set_seed(self, seed: int) -> None:
        """Order of threads and blocks from now on; 0 is the natural one."""
        self._library.simt_set_seed(ctypes.c_uint64(seed))

    @contextlib.contextmanager
    def guarded_memory(self) -> Iterator[None]:
        """CPU tensors made inside are poisoned (0xCB) and lie between red zones.

        Every launch checks the red zones of all that are alive, so that a kernel that writes
        outside its tensors raises RuntimeError.
        """
        self._library.simt_guard_memory(True)
        try:
            yield
        finally:
            self._library.simt_guard_memory(False)


@functools.cache
def load_simt_library() -> SimtLibrary:
    """Build, if need be, and load all CUDA kernels as ``torch.ops.fcos_ext_simt.<op>``.

    With ``FCOS_SIMT_ASAN=1`` in the environment it is built with AddressSanitizer, whose library
    must then have been preloaded (:func:`sanitizer_environment`).
    """
    sources = [CSRC / "library.cpp", *sorted(CSRC.glob("cuda/*.cu"))]
    sanitize_addresses = os.environ.get("FCOS_SIMT_ASAN") == "1"
    return SimtLibrary(link_operators("fcos_ext_simt", sources, sanitize_addresses))


def sanitizer_environment() -> dict[str, str]:
    """Environment variables for a Python process that can load an AddressSanitizer build."""
    paths = []
    for library in ("libasan.so", "libstdc++.so"):
        command = [get_cxx_compiler(), f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch free little at exit
        "FCOS_SIMT_ASAN": "1",
    }


if __name__ == "__main__":
    print(*(f"{name}={value}" for name, value in sanitizer_environment().items()))
