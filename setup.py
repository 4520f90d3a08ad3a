"""Builds the kernel libraries: what can be built here, and says in one line what and why.

- ``fcos_ext._C``       schemas and CPU kernels       needs a C++ compiler
- ``fcos_ext._C_cuda``  CUDA kernels                  needs nvcc and a CUDA build of torch
- ``fcos_ext._host``    what was built (pybind11)     needs a C++ compiler

Environment: ``FORCE_CUDA=1`` makes a missing CUDA half an error, ``FORCE_CUDA=0`` leaves it out;
``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``MAX_JOBS``, ``CC`` and ``CXX`` as for every torch
extension.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",
    "matplotlib",
    "numpy",
    "pillow>=10.1",
    "pycocotools>=2.0.8",
    "pyyaml",
    "rich",
    "tyro>=0.9",
]

# Everything that uses torch's C++ does so through its stable ABI of this version, so that one
# binary serves this and every later torch.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Without traps the compiler may turn selects into blends: AVX2 code is 4 times faster
CXX_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# Where a result hangs on one bit (an IoU at the threshold), all of them compute what is written;
# the losses, where it does not, allow fused multiply-adds in their own files.
CXX_FLAGS += ["-ffp-contract=off", "-fvisibility=hidden", TARGET_VERSION]
NVCC_FLAGS = ["-O3", "-lineinfo", "--threads=2", "-DUSE_CUDA", TARGET_VERSION]


def lacks_torchvision() -> bool:
    """Whether the environment has torch but not torchvision."""
    site = Path(sysconfig.get_path("purelib"))
    return (site / "torch").is_dir() and not (site / "torchvision").is_dir()


def requirements() -> list[str]:
    """What pip is to install.

    Asked for torchvision where there is torch alone, pip takes the newest and replaces torch by the
    one that belongs to it. Which torchvision fits is the user's to say: `fcos` does when it starts.
    """
    return [r for r in REQUIREMENTS if not (r.startswith("torchvision") and lacks_torchvision())]


def has_cxx_compiler() -> bool:
    """Whether there is one. Sets CXX where it is not called c++, as torch would then look for."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen.split()[0]) is not None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            if name != "c++":
                os.environ["CXX"] = name
            return True
    return False


def find_cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, the one nvcc belongs to, /usr/local/cuda, or the pip packages."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    candidates += [str(p) for path in sys.path for p in Path(path or ".").glob("nvidia/cu[0-9]*")]
    for candidate in candidates:
        if not candidate:
            continue
        home = Path(candidate)
        # nvcc on PATH may be a wrapper outside the toolkit: the header decides
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def nvcc_version(home: Path) -> str:
    text = subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True)
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "0"


def why_no_cuda(home: Path | None) -> str | None:
    """None if the CUDA half can be built, else the reason it cannot."""
    import torch

    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if home is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip's cuda-toolkit)"
    nvcc, ours = nvcc_version(home), torch.version.cuda
    if nvcc.split(".")[0] != ours.split(".")[0]:
        return f"nvcc is {nvcc} but torch was built with CUDA {ours}: the major version must agree"
    return None


def cuda_architectures(home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST: the user's; else the visible GPUs; else all that torch is built for."""
    import torch

    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        found = sorted({torch.cuda.get_device_capability(d) for d in devices})
        return ";".join(f"{major}.{minor}" for major, minor in found)
    listed = subprocess.check_output([home / "bin" / "nvcc", "--list-gpu-arch"], text=True)
    known = set(re.findall(r"compute_(\d+)", listed))
    flags = re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or "") or ["80", "90"]
    numbers = sorted({f for f in flags if f in known}, key=int)
    return ";".join(f"{n[:-1]}.{n[-1]}" for n in numbers) + "+PTX"  # PTX: for GPUs to come


def extensions() -> tuple[list, dict]:
    """What to build, and the record of the decision that ``fcos env`` shows."""
    import torch

    info: dict = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if not has_cxx_compiler():
        reason = "no C++ compiler was found (CXX, c++, g++, clang++)"
        info |= {"cpu": {"skipped": reason}, "cuda": {"skipped": reason}}
        return [], info

    home = find_cuda_home()
    if home:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension guesses
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    built = [
        CppExtension(
            "fcos_ext._C",
            ["csrc/library.cpp", *sources("csrc/cpu/*.cpp")],
            depends=sources("csrc/*.h") + sources("csrc/cpu/*.h"),
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        ),
        Pybind11Extension("fcos_ext._host", ["csrc/host.cpp"], cxx_std=17),
    ]
    # torch's BuildExtension wants its own keywords on every extension
    built[1].py_limited_api = False
    info["cpu"] = {"instruction_sets": ["baseline", "avx2", "avx512"]}

    skipped = why_no_cuda(home)
    if skipped and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"fcos: FORCE_CUDA=1, but {skipped}")
    if skipped or home is None:
        info["cuda"] = {"skipped": skipped}
        return built, info
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = cuda_architectures(home)
    info["cuda"] = {"nvcc": nvcc_version(home), "architectures": architectures}
    built.append(
        CUDAExtension(
            "fcos_ext._C_cuda",
            sources("csrc/cuda/*.cpp") + sources("csrc/cuda/*.cu"),
            depends=sources("csrc/*.h") + sources("csrc/cuda/*.cuh"),
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    )
    return built, info


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def summary(info: dict) -> str:
    cpu = info["cpu"].get("skipped")
    cuda = info["cuda"].get("skipped")
    parts = [
        f"torch {info['torch']}",
        f"CPU kernels: no, {cpu}" if cpu else "CPU kernels: yes",
        f"CUDA kernels: no, {cuda}"
        if cuda
        else f"CUDA kernels: yes (nvcc {info['cuda']['nvcc']}, {info['cuda']['architectures']})",
    ]
    if lacks_torchvision():
        parts.append("torchvision: missing, install the one that belongs to this torch")
    return "fcos build | " + " | ".join(parts)


def remove_stale(built: set[str]) -> None:
    """Delete libraries of an earlier build in place that this build does not replace."""
    for library in (ROOT / "fcos_ext").glob("_*.so"):
        if library.name.split(".")[0] not in built:
            library.unlink()


def main() -> None:
    os.chdir(ROOT)
    if not {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv):
        setup(install_requires=requirements())  # metadata only: nothing is decided or written
        return
    ext_modules, info = extensions()
    (ROOT / "fcos_ext" / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    print(summary(info), file=sys.stderr, flush=True)
    if {"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv):
        remove_stale({extension.name.split(".")[-1] for extension in ext_modules})
    from torch.utils.cpp_extension import BuildExtension

    setup(
        install_requires=requirements(),
        ext_modules=ext_modules,
        cmdclass={"build_ext": BuildExtension},
    )
    print(summary(info), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
