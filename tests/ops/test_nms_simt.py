"""The CUDA source of nms, run on the CPU by the simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.nms_inputs import DTYPES, expected, make_inputs
from tests.simt.build import SimtLibrary, load_simt_library

SEEDS = (0, 1, 12345)
BAND = 192  # ranks, in the simulator


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


def simt_result(lib: SimtLibrary, *arguments: Any, seed: int = 0) -> Tensor:
    lib.set_seed(seed)
    before = lib.launches
    with lib.guarded_memory():
        result = torch.ops.fcos_ext_simt.nms(*arguments)
    n = len(arguments[0])
    # One to start, then two a band, and one more for each that comes after another.
    assert lib.launches - before == (3 * -(-n // BAND) if n else 0)
    return result


@pytest.mark.parametrize("limit", [-1, 0, 1, 70])
@pytest.mark.parametrize("num_groups", [None, 3])
@pytest.mark.parametrize("spread", [20.0, 300.0], ids="spread{:.0f}".format)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 192, 193, 500])
def test_simt(simt: SimtLibrary, n: int, spread: float, num_groups: int | None, limit: int) -> None:
    inputs = make_inputs(n, num_groups, spread)
    arguments = (*inputs, 0.4, limit)
    if limit == 0:
        assert torch.ops.fcos_ext_simt.nms(*arguments).tolist() == []
        return
    assert torch.equal(simt_result(simt, *arguments, seed=n), expected(*arguments))


@pytest.mark.parametrize("num_groups", [None, 2])
def test_simt_seeds(simt: SimtLibrary, num_groups: int | None) -> None:
    arguments = (*make_inputs(700, num_groups, 150.0), 0.5, -1)
    for seed in SEEDS:
        assert torch.equal(simt_result(simt, *arguments, seed=seed), expected(*arguments))


@pytest.mark.parametrize("groups", [None, torch.full((1150,), -5)], ids=["ungrouped", "grouped"])
def test_simt_many_kept(simt: SimtLibrary, groups: Tensor | None) -> None:
    """So many that a block compares its ranks with several tiles of them, and the first counts."""
    corner = torch.stack((torch.arange(960) % 31, torch.arange(960) // 31), dim=1) * 30.0
    boxes = torch.cat((corner, corner + 20), dim=1)
    boxes = torch.cat((boxes, boxes[:190].flip(0)))
    for seed in SEEDS:
        arguments = boxes, torch.linspace(1, 0, 1150), groups
        kept = simt_result(simt, *arguments, 0.5, -1, seed=seed)
        assert kept.tolist() == list(range(960))


def test_simt_chain(simt: SimtLibrary) -> None:
    """Every box overlaps the next alone: within a tile nothing is settled before its turn."""
    left = torch.arange(400.0) * 6
    boxes = torch.stack((left, torch.zeros(400), left + 10, torch.full((400,), 10.0)), dim=1)
    kept = simt_result(simt, boxes, torch.linspace(1, 0, 400), None, 0.2, -1)
    assert kept.tolist() == list(range(0, 400, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simt_dtypes(simt: SimtLibrary, dtype: torch.dtype) -> None:
    boxes, scores, groups = make_inputs(150, 2, 40.0)
    inputs = boxes.to(dtype), scores.to(dtype), groups
    assert torch.equal(simt_result(simt, *inputs, 0.4, -1), expected(*inputs, 0.4))


def test_simt_misaligned_and_strided(simt: SimtLibrary) -> None:
    boxes, scores, groups = make_inputs(100, 3, 40.0)
    assert groups is not None
    plain = simt_result(simt, boxes, scores, groups, 0.4, -1)
    misaligned = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view(100, 4)
    assert misaligned.data_ptr() % 16 != 0
    strided = boxes.t().contiguous().t(), scores.repeat_interleave(2)[::2]
    assert torch.equal(simt_result(simt, misaligned, scores, groups, 0.4, -1), plain)
    groups = groups.repeat_interleave(3)[::3]
    assert torch.equal(simt_result(simt, *strided, groups, 0.4, -1), plain)
