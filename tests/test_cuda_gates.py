"""CUDA sources compile for each generation of GPU into what their budgets say.

The first part holds the project's kernels to their budgets. The rest plants kernels that must be
caught, so that a gate which has come off its hinges is noticed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cuda_gates import budget as budgets
from tests.cuda_gates.__main__ import main
from tests.cuda_gates.budget import Budget, budget_path, check, load_budget, updated_budget
from tests.cuda_gates.compile import (
    ROOT,
    SOURCES,
    TESTED,
    Compiled,
    CompileError,
    MissingTool,
    compile_all,
    compile_one,
    find_cuobjdump,
)
from tests.cuda_gates.report import Usage, read_report, readable
from tests.cuda_gates.sass import read_disassembly

PLANTED = ROOT / "tests" / "cuda_gates" / "planted" / "kernels.cu"


@pytest.fixture(scope="module")
def _tools() -> None:
    try:
        find_cuobjdump()  # beside that of nvcc
    except MissingTool as error:
        if os.environ.get("FCOS_REQUIRE_NVCC") == "1":
            pytest.fail(f"FCOS_REQUIRE_NVCC=1, but {error}")
        pytest.skip(str(error))


# ---- the project's kernels ----------------------------------------------------------------------


@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_to_their_budget(source: Path) -> None:
    budget = load_budget(budget_path(source))
    failures = [line for each in compile_all([source], TESTED) for line in check(each, budget)]
    assert not failures, "\n".join(["over budget:", *failures])


@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_are_found(source: Path) -> None:
    """Report and disassembly tell of the same kernels, and of some where the source has some."""
    text = source.read_text()
    for header in re.findall(r'#include "(\w+\.cuh)"', text):
        text += (source.parent / header).read_text()
    for each in compile_all([source], TESTED):
        report, code = read_report(each), read_disassembly(each)
        assert report.keys() == code.keys()
        assert bool(report) == ("__global__" in text)
        assert all(usage.registers > 0 for usage in report.values())
        assert all(c.count("EXIT") > 0 for c in code.values())


def test_no_budget_without_a_source() -> None:
    left = {path.stem for path in budgets.BUDGETS.glob("*.json")} - {s.stem for s in SOURCES}
    assert not left, f"delete the budgets of: {', '.join(sorted(left))}"


# ---- what must be caught ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(_tools: None) -> Compiled:
    return compile_one(PLANTED, "90")


@pytest.fixture
def budget(planted: Compiled) -> Budget:
    return updated_budget({"requirements": [], "kernels": {}}, [planted])


def failures_of(planted: Compiled, budget: Budget, name: str) -> list[str]:
    """What is said of a kernel, without source and architecture."""
    where = "kernels.cu sm_90: "
    lines = check(planted, budget)
    assert all(line.startswith(where) for line in lines)
    lines = [line.removeprefix(where) for line in lines]
    return [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]


@pytest.mark.parametrize("name", ["wide", "narrow", "special", "shared<256>"])
def test_good_kernel_passes(planted: Compiled, budget: Budget, name: str) -> None:
    assert name in read_report(planted)
    assert failures_of(planted, budget, name) == []


def test_spills_are_caught(planted: Compiled, budget: Budget) -> None:
    usage = read_report(planted)["spilling"]
    assert usage.stack_bytes > 0 and usage.spill_store_bytes > 0 and usage.spill_load_bytes > 0
    lines = failures_of(planted, budget, "spilling")
    assert f"{usage.stack_bytes} bytes of stack, limit 0" in lines
    assert f"{usage.spill_store_bytes} bytes of spill stores, limit 0" in lines
    assert f"{usage.spill_load_bytes} bytes of spill loads, limit 0" in lines
    assert any("local loads and stores (LDL, STL), limit 0" in line for line in lines)


def test_indexed_array_is_caught(planted: Compiled, budget: Budget) -> None:
    assert read_report(planted)["indexed"] == Usage(
        registers=read_report(planted)["indexed"].registers, stack_bytes=64
    )
    local, stack = failures_of(planted, budget, "indexed")
    assert stack == "64 bytes of stack, limit 0"
    count = sum(i.is_local for i in read_disassembly(planted)["indexed"].instructions)
    assert count >= 2 and local == f"{count} local loads and stores (LDL, STL), limit 0"


def test_growth_is_caught(planted: Compiled, budget: Budget) -> None:
    registers = read_report(planted)["wide"].registers
    limits = budget["kernels"]["wide"]["registers"]
    assert registers <= limits["90"] < registers + 8 and limits["90"] % 8 == 0
    limits["90"] = registers - 1
    budget["kernels"]["shared<256>"]["shared_bytes"]["90"] = 1023
    lines = failures_of(planted, budget, "wide")
    assert lines == [f"{registers} registers, limit {registers - 1}"]
    lines = failures_of(planted, budget, "shared<256>")
    assert lines == ["1024 bytes of shared memory, limit 1023"]


def test_kernel_without_a_budget_is_caught(planted: Compiled, budget: Budget) -> None:
    registers = read_report(planted)["wide"].registers
    del budget["kernels"]["wide"]
    budget["kernels"]["narrow"]["registers"] = {"80": 255}  # not for this architecture
    budget["kernels"]["gone"] = budget["kernels"]["special"]
    run = "run python -m tests.cuda_gates --update"
    (line,) = failures_of(planted, budget, "wide")
    figures = f"{registers} registers, 0 bytes of shared memory"
    assert line == f"{figures}, no limit in the budget; {run}"
    (line,) = failures_of(planted, budget, "narrow")
    assert line.endswith(f"no limit in the budget; {run}")
    (line,) = failures_of(planted, budget, "gone")
    assert line == f"in the budget, but not in the source; {run}"


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("wide", {"wide_loads": 1, "wide_stores": 1}, []),
        ("wide", {"wide_loads": 2}, ["1 16-byte LDG in its loop, at least 2"]),
        (
            "narrow",
            {"wide_loads": True, "wide_stores": True},
            ["0 16-byte LDG in its loop, at least 1", "0 16-byte STG in its loop, at least 1"],
        ),
        ("special", {"element_bytes": 4, "mufu_per_element": 2}, []),
        ("special", {"element_bytes": 4, "mufu_per_element": 1.9}, ["2.0 MUFU an element"]),
        ("special", {"element_bytes": 4, "instructions_per_element": 20}, []),
        ("special", {"element_bytes": 4, "instructions_per_element": 2}, [" instructions an"]),
        ("narrow", {"wide_loads": 1, "architectures": ["80"]}, []),
        ("narrow", {"element_bytes": 4, "mufu_per_element": 9}, ["no 16-byte loads to count"]),
    ],
)
def test_requirements(
    planted: Compiled,
    budget: Budget,
    name: str,
    changes: dict[str, float],
    expected: Sequence[str],
) -> None:
    budget["requirements"] = [{"kernels": name, "reason": "streams"} | changes]
    lines = failures_of(planted, budget, name)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert start in line and line.endswith(": streams")


def test_requirement_of_no_kernel_is_caught(planted: Compiled, budget: Budget) -> None:
    budget["requirements"] = [{"kernels": "wid", "reason": "streams", "wide_loads": 1}]
    message = "no kernel matches 'wid', of which the budget requires: streams"
    assert f"kernels.cu sm_90: {message}" in check(planted, budget)


@pytest.mark.parametrize(
    "requirement, message",
    [
        ({"kernels": "a", "reason": "b", "wide_load": 1}, "unknown keys .*'wide_load'"),
        ({"kernels": "a", "wide_loads": 1}, "needs kernels and a reason"),
        ({"kernels": "a", "reason": "b", "mufu_per_element": 1}, "need element_bytes"),
    ],
)
def test_malformed_requirement(tmp_path: Path, requirement: object, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"requirements": [requirement], "kernels": {}}))
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        load_budget(path)


def test_source_that_does_not_compile(_tools: None, tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nothing(); }")
    with pytest.raises(CompileError, match='identifier "nothing" is undefined'):
        compile_one(source, "90")


def test_command_line(_tools: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails without a budget, makes one, keeps what is written by hand, and shows figures."""
    arguments = ["--budgets", str(tmp_path)]
    assert main(arguments, [PLANTED]) == 1
    printed = capsys.readouterr()
    assert "kernels.cu sm_80: wide: " in printed.err and "failures" in printed.out
    path = budget_path(PLANTED, tmp_path)
    requirement = {"kernels": "wide", "reason": "streams", "wide_loads": 1}
    path.write_text(json.dumps({"requirements": [requirement], "kernels": {"gone": {}}}))
    assert main([*arguments, "--update"], [PLANTED]) == 1  # spills stay failures
    printed = capsys.readouterr()
    assert {line.split(": ")[1] for line in printed.err.splitlines()} == {"spilling", "indexed"}
    written = load_budget(path)
    assert written["requirements"] == [requirement]
    assert "gone" not in written["kernels"]
    assert written["kernels"]["wide"]["registers"].keys() == set(TESTED)
    before = path.read_text()
    main([*arguments, "--update", "--show"], [PLANTED])
    assert path.read_text() == before
    assert "1 wide loads, 1 wide stores, 0 MUFU]  wide" in capsys.readouterr().out


# ---- reading ------------------------------------------------------------------------------------

REPORT = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    96 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 96 bytes cumulative stack size, 1040 bytes smem
ptxas info    : Compiling entry function '_Z1gi' for 'sm_90'
ptxas info    : Function properties for _Z1gi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 400 bytes cmem[0]
"""

# An outer loop of 4 lines around a loop with two wide loads and a tail with one.
LISTING = """Function : _Z1kv
/*0000*/ MOV R1, c[0x0][0x28] ;
/*0010*/ ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT ;
/*0020*/ LDG.E.EF.128 R4, [R2.64] ;
/*0030*/ LDG.E.128.CONSTANT R8, [R2.64+0x10] ;
/*0040*/ @!P0 LDG.E.64 R8, [R2.64+0x10] ;
/*0050*/ MUFU.EX2 R4, R4 ;
/*0060*/ STG.E.128 [R2.64], R4 ;
/*0070*/ @P0 BRA 0x20 ;
/*0080*/ LDG.E.128 R8, [R2.64+0x10] ;
/*0090*/ @P1 BRA P2, 0x80 ;
/*00a0*/ @!UP0 BRA 0x10 ;
/*00b0*/ STL [R1], R4 ;
/*00c0*/ EXIT ;
/*00d0*/ BRA 0xd0 ;
/*00e0*/ NOP ;
"""


def test_report_is_understood() -> None:
    assert read_report(Compiled(Path("a.cu"), "90", REPORT, "")) == {
        "k": Usage(64, 1040, 96, 8, 24),
        "g": Usage(12, 0, 0, 0, 0),
    }


def test_disassembly_is_understood() -> None:
    code = read_disassembly(Compiled(Path("a.cu"), "90", "", LISTING))["k"]
    assert len(code.instructions) == 14
    assert [len(loop.instructions) for loop in code.loops()] == [6, 2, 10]
    loop = code.streaming_loop()
    assert len(loop.instructions) == 6
    assert (loop.count_wide("LDG"), loop.wide_load_bytes()) == (2, 32)
    assert (loop.count_wide("STG"), loop.count("MUFU")) == (1, 1)
    assert sum(i.is_local for i in code.instructions) == 1
    # Without a loop, all up to the end.
    straight = read_disassembly(Compiled(Path("a.cu"), "90", "", LISTING.replace("BRA", "NOP")))
    assert len(straight["k"].streaming_loop().instructions) == 10


def test_names_are_readable() -> None:
    mangled = "_ZN8fcos_ext59_GLOBAL__N__b88476a6_21_sigmoid_focal_loss_cu_99c01cb6_7188"
    mangled += "19sum_partials_kernelIfEEvPKT_lS4_PS2_"
    assert readable([mangled, "_Z1fi", "_Z1ff", "_Z1gv"]) == [
        *("sum_partials_kernel<float>", "f(int)", "f(float)", "g"),
    ]
    assert readable([]) == []
