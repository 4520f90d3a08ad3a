"""The CUDA simulator itself: right kernels give what CUDA gives, planted bugs are reported."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.simt.build import SIMT, SimtLibrary, link, link_operators

SEEDS = (0, 1, 2, 3)
POISON = int.from_bytes(b"\xcb" * 4, "little", signed=True)


def build_program(name: str, sanitize_addresses: bool) -> Path:
    sources = [SIMT / "planted" / "main.cpp", SIMT / "undefined.cpp"]
    flags = ["-std=c++17"]
    return link(name, [(source, flags) for source in sources], ["-pthread"], sanitize_addresses)


@pytest.fixture(scope="module")
def program() -> Path:
    return build_program("planted", sanitize_addresses=False)


@pytest.fixture(scope="module")
def address_program() -> Path:
    return build_program("planted_address", sanitize_addresses=True)


@pytest.fixture(scope="module")
def planted_operators() -> SimtLibrary:
    name = "fcos_simt_planted"
    return SimtLibrary(link_operators(name, [SIMT / "planted" / "operators.cu"]))


@pytest.fixture
def operators(planted_operators: SimtLibrary) -> Iterator[SimtLibrary]:
    yield planted_operators
    planted_operators.set_seed(0)


def start(program: Path, case: str, seed: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), case, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


def result(program: Path, case: str, seed: int = 0) -> np.ndarray:
    """What the kernel of a case wrote."""
    done = start(program, case, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.array(done.stdout.split(), dtype=float)


def error(program: Path, case: str, seed: int = 0) -> str:
    done = start(program, case, seed)
    assert done.returncode == 1 and done.stdout.startswith("error: simt: "), done
    return done.stdout


# ---- kernels without a bug ----------------------------------------------------------------------

SUMS = [sum(range(i, min(i + 256, 1000))) for i in range(0, 1000, 256)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", ["tree_sum", "warp_sum"])
def test_block_sum(program: Path, case: str, seed: int) -> None:
    assert result(program, case, seed).tolist() == SUMS


def test_thread_and_block_indices(program: Path) -> None:
    assert result(program, "positions").tolist() == list(range(8 * 24))


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize(
    "case, n", [("no_predicates", 0), ("predicates", 5), ("all_predicates", 64)]
)
def test_barriers_with_predicate(program: Path, case: str, n: int, seed: int) -> None:
    count, any_true, all_true = result(program, case, seed).reshape(64, 3).T
    assert (count == n).all()
    assert (any_true == (n > 0)).all()
    assert (all_true == (n == 64)).all()


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_shuffles(program: Path, seed: int) -> None:
    lanes = np.arange(32)
    expected = 100 + np.stack(
        [
            np.full(32, 5),
            np.full(32, 3),  # lane 35 modulo 32
            np.repeat([3, 11, 19, 27], 8),  # lane 3 of each segment of 8
            np.array([0, *range(31)]),
            np.concatenate([s + np.array([0, 1, 2, 0, 1, 2, 3, 4]) for s in (0, 8, 16, 24)]),
            np.array([*range(1, 32), 31]),
            np.concatenate([s + np.array([*range(2, 16), 14, 15]) for s in (0, 16)]),
            np.array([lane + 1 - 2 * (lane % 2) for lane in lanes]),
            np.array([*range(16), *range(16)]),  # later segments cannot be read, earlier ones can
            np.full(32, 4),  # double
            31 - lanes,  # long long
        ]
    )
    assert result(program, "shuffles", seed).reshape(32, 11).T.tolist() == expected.tolist()


def test_shuffle_from_a_missing_lane_is_poison(program: Path) -> None:
    shuffles = result(program, "shuffles_of_five_lanes").reshape(5, 11).T
    assert shuffles[0].tolist() == [POISON] * 5  # from lane 5 of 0 to 4
    assert shuffles[1].tolist() == [103] * 5
    assert shuffles[5].tolist() == [101, 102, 103, 104, POISON]


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_of_a_warp_shuffle_apart(program: Path, seed: int) -> None:
    assert result(program, "half_warps", seed).tolist() == [5] * 16 + [20] * 16


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_votes(program: Path, seed: int) -> None:
    votes = result(program, "votes", seed).reshape(40, 6)
    first, last = np.split(votes, [32])  # a whole warp, and one of 8 lanes with thread 33
    assert first[:, 0].tolist() == [0xAAAAAAAA] * 32
    assert last[:, 0].tolist() == [0xAA] * 8
    assert first[:, 1:4].tolist() == [[0, 1, 1]] * 32
    assert last[:, 1:4].tolist() == [[1, 0, 1]] * 8
    assert votes[:, 4].tolist() == [63] * 6 + [0] * 26 + [63] * 6 + [0] * 2
    assert votes[:, 5].tolist() == [17, 0] * 3 + [0] * 26 + [17, 0] * 3 + [0] * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(program: Path, seed: int) -> None:
    done = start(program, "atomics", seed)
    threads = range(20)
    bits = 2**20 - 1
    expected = [
        [sum(threads), -sum(threads), 5 - 19, 19 - 5, 2 * 20, 0, 10, 9],
        [20 % 7, (0 - 20) % 7, 2**32 - 1 - bits, bits, bits, 4_000_000_000 - 19],
        [20 << 40, 19 << 33],
        [0.5 * 20],
        [0.25 * 20],
    ]
    assert [[float(v) for v in line.split()] for line in done.stdout.splitlines()] == expected


def test_bits(program: Path) -> None:
    one = np.float32(1).view(np.int32)
    expected = [-2, -1, 2**33 - 1 - 2**33, 8, 64, 0, 4, 32, 31, 63, 8, one, 3, 17, 4, 7]
    assert result(program, "bits").tolist() == expected


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_spinning_lets_others_run(program: Path, seed: int) -> None:
    assert result(program, "spin", seed).tolist() == [1]


def test_seed_fixes_the_order(program: Path) -> None:
    orders = [result(program, "order", seed).tolist() for seed in (0, 1, 1, 2)]
    assert orders[0] == list(range(128))
    assert orders[1] == orders[2]
    assert orders[1] != orders[3]
    assert all(sorted(order) == orders[0] for order in orders)


def test_launches_after_an_error_and_from_another_thread(program: Path) -> None:
    assert result(program, "recovery").tolist() == SUMS * 6


@pytest.mark.parametrize("case", ["tree_sum", "warp_sum", "recovery", "atomics"])
def test_address_sanitizer_accepts_fibers(program: Path, address_program: Path, case: str) -> None:
    done = start(address_program, case, 1)
    assert (done.returncode, done.stdout, done.stderr) == (0, start(program, case).stdout, "")


# ---- planted bugs -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["tree_sum_without_barrier", "warp_sum_without_barrier"])
def test_missing_barrier_gives_wrong_sums(program: Path, case: str) -> None:
    assert any(result(program, case, seed).tolist() != SUMS for seed in SEEDS)


@pytest.mark.parametrize("case", ["tree_sum_of_unwritten", "warp_sum_of_unwritten"])
def test_unwritten_shared_memory_gives_wrong_sums(program: Path, case: str) -> None:
    assert result(program, case)[-1] != SUMS[-1]


def test_shared_memory_is_poisoned_for_every_block(program: Path) -> None:
    assert result(program, "leftovers").tolist() == [POISON % 2**32] * 3


def test_unwritten_output_is_poison(program: Path) -> None:
    poison = np.int32(POISON).view(np.float32)
    assert result(program, "copy").tolist() == [1.0] * 100
    assert result(program, "copy_of_too_few") == pytest.approx([1.0] * 99 + [poison], rel=1e-5)


@pytest.mark.parametrize(
    "case, messages",
    [
        (
            "early_exit_before_barrier",
            ["divergent barrier", "4 of 64 threads (first: 60) have exited", "waiting.cu:6"],
        ),
        ("barriers_in_two_branches", ["divergent barrier", "waiting.cu:11", "waiting.cu:13"]),
        (
            "warp_waits_for_barrier",
            ["deadlock", "63 of 64 threads (first: 1) wait in __syncthreads", "waiting.cu:19"],
        ),
        ("shuffles_in_two_branches", ["divergent warp operation", "__shfl_sync", "waiting.cu:27"]),
        ("mask_without_caller", ["__syncwarp: the mask lacks the calling lane 1", "waiting.cu:34"]),
        ("shuffle_width_of_12", ["width must be a power of two up to 32, got 12"]),
        ("spin_forever", ["no progress", "spin(unsigned int*, unsigned int)"]),
        ("deep_recursion", ["stack overflow", "recursion(int, int*)"]),
        ("misaligned_load", ["__ldcs of 16 bytes", "memory.cu:35", "vector_load"]),
        ("misaligned_store", ["__stcs of 8 bytes", "memory.cu:40", "thread (0,0,0)"]),
        ("misaligned_plain_load", ["null or misaligned pointer", "memory.cu:44"]),
        ("static_shared_store_behind", ["array index out of bounds", "memory.cu:20"]),
        ("wide_shift", ["shift by a wrong amount", "memory.cu:48"]),
        ("store_behind", ["out-of-bounds write: byte 400 of an allocation of 400 bytes", "copy("]),
        ("store_before", ["out-of-bounds write: byte -4 of an allocation of 400 bytes"]),
        ("copy_behind", ["out-of-bounds write: byte 400 of an allocation of 400 bytes"]),
        ("dynamic_shared_store_behind", ["byte 128 of dynamic shared memory of 128 bytes"]),
        ("too_many_threads", ["invalid launch configuration: block (64,32,1)"]),
        ("no_blocks", ["invalid launch configuration: grid (0,1,1)"]),
        ("too_much_shared_memory", ["invalid launch configuration: 300000 bytes"]),
    ],
)
def test_reported(program: Path, case: str, messages: list[str]) -> None:
    for seed in SEEDS[:2]:
        text = error(program, case, seed)
        assert all(message in text for message in messages), text


@pytest.mark.parametrize(
    "case", ["no_early_exit_before_barrier", "recursion", "vector_load", "dynamic_shared_store"]
)
def test_not_reported_without_the_bug(program: Path, case: str) -> None:
    assert start(program, case).returncode == 0


@pytest.mark.parametrize(
    "case, access, line",
    [
        ("load_behind", "READ of size 4", "memory.cu:10"),
        ("store_behind", "WRITE of size 4", "memory.cu:10"),
        ("dynamic_shared_store_behind", "WRITE of size 4", "memory.cu:15"),
    ],
)
def test_address_sanitizer_reports(
    address_program: Path, case: str, access: str, line: str
) -> None:
    done = start(address_program, case)
    assert done.returncode != 0
    assert access in done.stderr and line in done.stderr


# ---- operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_operator(operators: SimtLibrary, seed: int) -> None:
    operators.set_seed(seed)
    launches = operators.launches
    x = torch.arange(100.0)
    torch.testing.assert_close(torch.ops.fcos_simt_planted.twice(x, 0), 2 * x)
    assert operators.launches == launches + 1


def test_operator_output_is_poisoned(operators: SimtLibrary) -> None:
    with operators.guarded_memory():
        out = torch.ops.fcos_simt_planted.twice(torch.ones(100), 1)
    assert out[:99].eq(2).all()
    assert out.view(torch.int32)[99] == POISON


def test_operator_out_of_bounds_is_an_exception(operators: SimtLibrary) -> None:
    with operators.guarded_memory():
        x = torch.ones(100)
        message = (
            r"out-of-bounds write: byte 400 of an allocation of 400 bytes; kernel .*double_val"
        )
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fcos_simt_planted.twice(x, -1)
        assert torch.ops.fcos_simt_planted.twice(x, 0).eq(2).all()
    assert torch.ones(3).sum() == 3  # the usual allocator is back
