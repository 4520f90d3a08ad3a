"""assign_targets: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel. The rules are in test_assign_targets_rules.py, the fuzz against an oracle
in test_assign_targets_fuzz.py.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from benchmarks.bench_assign_targets import feature_sizes, make_boxes
from fcos_ext import AssignedTargets, Grid, _host, assign_targets, assign_targets_ref
from fcos_ext._library import kernels
from tests.ops.assign_targets_oracle import RULES, TIES, numbers_of, random_case
from tests.simt.build import SimtLibrary, load_simt_library

OP = torch.ops.fcos_ext.assign_targets.default

STRIDES = [8, 16, 32, 64, 128]
IMAGE_SIZE = (192, 320)
#: Such that there are positives on every level of an image this small.
SIZE_RANGES = [(0, 16), (16, 32), (32, 64), (64, 128), (128, math.inf)]
OPTIONS: dict[str, Any] = {
    "feature_sizes": feature_sizes(IMAGE_SIZE),
    "strides": STRIDES,
    "size_ranges": SIZE_RANGES,
}


def geometry(
    radius: float, strides: Sequence[int | Grid] = STRIDES
) -> tuple[list[int], list[float], list[float]]:
    """feature_sizes, grids and size_ranges as the operator takes them."""
    return (
        [side for size in OPTIONS["feature_sizes"] for side in size],
        [number for stride in strides for number in numbers_of(stride, radius)],
        [float(end) for ends in SIZE_RANGES for end in ends],
    )


def make_packed(
    counts: Sequence[int] = (30, 0, 7), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and offsets of a batch."""
    generator = torch.Generator().manual_seed(sum(counts))
    boxes = torch.cat([make_boxes(count, IMAGE_SIZE, generator) for count in counts])
    labels = torch.randint(80, (len(boxes),), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    return boxes.to(device, dtype), labels.to(device), offsets.to(device)


def make_padded(
    counts: Sequence[int] = (30, 0, 7), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and counts of a batch."""
    generator = torch.Generator().manual_seed(sum(counts))
    capacity = max(counts) + 2
    boxes = torch.stack([make_boxes(capacity, IMAGE_SIZE, generator) for _ in counts])
    labels = torch.randint(80, (len(counts), capacity), generator=generator)
    return boxes.to(device, dtype), labels.to(device), torch.tensor(counts).to(device)


FORMS = {"packed": make_packed, "padded": make_padded}


def reference(
    boxes: Tensor, labels: Tensor, extents: Tensor, options: dict[str, Any] = OPTIONS, **more: Any
) -> AssignedTargets:
    form = "counts" if boxes.dim() == 3 else "offsets"
    return assign_targets_ref(boxes, labels, **{form: extents}, **options, **more)


def assert_same(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    for name, ours, exact in zip(AssignedTargets._fields, actual, truth, strict=True):
        assert ours.dtype == exact.dtype, name
        assert torch.equal(ours.cpu(), exact.cpu()), name
        assert not ours.requires_grad


# ---- the kernels of this device -----------------------------------------------------------------


def test_compiled(device: str) -> None:
    assert device in kernels("assign_targets")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("boundary", RULES)
@pytest.mark.parametrize("radius", [0.0, 1.5, 2.75])
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(
    device: str, form: str, radius: float, boundary: Any, normalize: bool
) -> None:
    tensors = FORMS[form](device=device)
    actual = OP(*tensors, *geometry(radius), RULES.index(boundary), normalize, 0)
    truth = reference(
        *tensors, center_sampling_radius=radius, boundary=boundary, normalize=normalize
    )
    assert_same(actual, truth)
    assert truth.num_pos[0] > 20 and truth.num_pos[1] == 0


@pytest.mark.parametrize("counts", [(), (0,), (0, 0), (1,), (255, 256, 257)], ids=str)
def test_numbers_of_boxes(device: str, counts: tuple[int, ...]) -> None:
    tensors = make_packed(counts, device=device) if counts else no_images(device)
    actual = OP(*tensors, *geometry(1.5), 0, False, 0)
    assert_same(actual, reference(*tensors))
    assert actual[0].shape == (len(counts), sum(h * w for h, w in OPTIONS["feature_sizes"]))


def no_images(device: str) -> tuple[Tensor, Tensor, Tensor]:
    boxes, labels, offsets = make_packed((1,), device=device)
    return boxes[:0], labels[:0], offsets[:1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(device: str, dtype: torch.dtype, integers: torch.dtype, form: str) -> None:
    boxes, labels, extents = FORMS[form](dtype=dtype, device=device)
    if dtype == torch.float64:
        boxes = boxes + 1e-9  # rounded to float32, not used as it is
    tensors = boxes, labels.to(integers), extents.to(integers)
    assert_same(OP(*tensors, *geometry(1.5), 0, False, 0), reference(*tensors))


@pytest.mark.parametrize("number", range(len(geometry(0.0)[2])))
def test_every_end_of_every_range_counts(device: str, number: int) -> None:
    """As does every stride and size: schema types are not checked against those of C++."""
    tensors = make_packed((60,), device=device)
    ends = list(geometry(0.0)[2])
    ends[number] = [14.3, 12.3, 21.3, 26.3, 37.3, 52.3, 76.3, 109.3, 149.3, 140.3][number]
    ranges = list(zip(ends[::2], ends[1::2], strict=True))
    changed = OP(*tensors, *geometry(0.0)[:2], ends, 0, False, 0)
    options = OPTIONS | {"size_ranges": ranges}
    assert_same(changed, reference(*tensors, options=options, center_sampling_radius=0.0))
    assert not torch.equal(changed[0], OP(*tensors, *geometry(0.0), 0, False, 0)[0])


@pytest.mark.parametrize("level", range(5))
def test_every_stride_and_size_counts(device: str, level: int) -> None:
    tensors = make_packed((60,), device=device)
    strides, sizes = list(STRIDES), list(OPTIONS["feature_sizes"])
    strides[level] += 3
    sizes[level] = (sizes[level][0] + 1, sizes[level][1] + 2)
    flat = [side for size in sizes for side in size]
    actual = OP(*tensors, flat, geometry(1.5, strides)[1], geometry(0.0)[2], 0, True, 0)
    options = OPTIONS | {"feature_sizes": sizes, "strides": strides}
    assert_same(actual, reference(*tensors, options=options, normalize=True))


@pytest.mark.parametrize("number", range(6))
def test_every_number_of_a_grid_counts(device: str, number: int) -> None:
    tensors = make_packed((60,), device=device)
    sizes, grids, ends = geometry(1.5)
    grids[6 + number] *= 0.5
    actual = OP(*tensors, sizes, grids, ends, 0, True, 0)
    levels: list[int | Grid] = [
        Grid((step_y, step_x), (y, x), unit, reach)
        for step_y, step_x, y, x, unit, reach in zip(*[iter(grids)] * 6, strict=True)
    ]
    truth = reference(*tensors, options=OPTIONS | {"strides": levels}, normalize=True)
    assert_same(actual, truth)
    before = OP(*tensors, *geometry(1.5), 0, True, 0)
    assert not torch.equal(actual[1], before[1])
    for part in (slice(24 * 40), slice(24 * 40 + 12 * 20, None)):  # of the other levels
        assert torch.equal(actual[1][:, part], before[1][:, part])


@pytest.mark.parametrize("ties", TIES)
def test_ties(device: str, ties: Any) -> None:
    """Many boxes of nearly the same area, in which the rules disagree."""
    boxes, labels, offsets = make_packed((200, 0, 90), device=device)
    corner = boxes[:, :2]
    sides = torch.rand(len(boxes), 1, generator=torch.Generator().manual_seed(0)).to(boxes) / 8 + 60
    tensors = torch.cat([corner, corner + sides], dim=1), labels, offsets
    actual = OP(*tensors, *geometry(0.0), 0, False, TIES.index(ties))
    assert_same(actual, reference(*tensors, ties=ties, center_sampling_radius=0.0))
    other = OP(*tensors, *geometry(0.0), 0, False, 1 - TIES.index(ties))
    assert (actual[3] != other[3]).sum() > 20


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(device: str, form: str, strided: bool) -> None:
    boxes, labels, extents = FORMS[form](device=device)
    if strided:
        boxes = boxes.repeat_interleave(2, dim=-1)[..., ::2]
        labels = labels.repeat_interleave(2, dim=-1)[..., ::2]
        extents = extents.repeat_interleave(2)[::2]
        assert not (boxes.is_contiguous() or labels.is_contiguous() or extents.is_contiguous())
    opcheck(OP, (boxes, labels, extents, *geometry(1.5), 2, True, 0))
    actual = OP(boxes, labels, extents, *geometry(1.5), 2, True, 0)
    assert_same(actual, reference(boxes, labels, extents, boundary="half_open", normalize=True))


def test_misaligned_boxes(device: str) -> None:
    boxes, labels, offsets = make_packed(device=device)
    shifted = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view(-1, 4)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 != 0
    actual = OP(shifted, labels, offsets, *geometry(1.5), 0, False, 0)
    assert_same(actual, reference(boxes, labels, offsets))


@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph(device: str, form: str) -> None:
    def step(boxes: Tensor, labels: Tensor, extents: Tensor) -> Sequence[Tensor]:
        keyword = {"counts" if form == "padded" else "offsets": extents}
        return assign_targets(boxes + 1, labels, **keyword, **OPTIONS)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for counts in ((3, 1), (5, 9), (6, 0)):
        tensors = FORMS[form](counts, device=device)
        assert_same(compiled(*tensors), step(*tensors))


@pytest.mark.parametrize("function", [assign_targets, assign_targets_ref, OP])
def test_nothing_is_differentiable(device: str, function: Any) -> None:
    boxes, labels, offsets = make_packed(device=device)
    leaf = boxes.clone().requires_grad_()
    options = OPTIONS
    arguments = (*geometry(1.5), 0, False, 0) if function is OP else ()
    if function is OP:
        options = {}
    for given in (leaf, leaf.double() * 1):
        targets = function(given, labels, offsets, *arguments, **options)
        assert_same(targets, reference(boxes, labels, offsets))


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    tensors = make_packed((400, 3, 0, 200), device=device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(OP(*tensors, *geometry(0.0), 0, True, 0))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    """Of padded boxes: the counts change between replays. The host waits for nothing."""
    counts = [(3, 0, 40), (40, 40, 40), (0, 0, 0), (1, 39, 2)]
    capacity = [make_padded((*c, 40), device="cuda") for c in counts]
    static = [t.clone() for t in capacity[0]]
    graph = torch.cuda.CUDAGraph()
    OP(*static, *geometry(1.5), 0, False, 0)  # once before, so that nothing is loaded meanwhile
    with torch.cuda.graph(graph):
        targets = OP(*static, *geometry(1.5), 0, False, 0)
    for tensors in capacity:
        for ours, new in zip(static, tensors, strict=True):
            ours.copy_(new)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            OP(*static, *geometry(1.5), 0, False, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(targets, reference(*tensors))


# ---- CPU instruction sets -----------------------------------------------------------------------

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
ISA_PROGRAM = """
import sys, torch
from fcos_ext import _host
cases = torch.load(sys.argv[1])
assert _host.cpu_isa() == sys.argv[3], _host.cpu_isa()
torch.save([torch.ops.fcos_ext.assign_targets(*case) for case in cases], sys.argv[2])
"""


def test_instruction_sets(tmp_path: Path) -> None:
    """All that this CPU has agree to the bit; each runs in a process of its own."""
    rng = random.Random(0)
    cases = [random_case(rng).arguments() for _ in range(100)]
    for form, radius in itertools.product(FORMS, (0.0, 1.5)):
        cases.append((*FORMS[form]((300, 30)), *geometry(radius), 0, True, 0))
    torch.save(cases, tmp_path / "cases.pt")
    running = []
    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]
    for isa in available:
        command = [sys.executable, "-c", ISA_PROGRAM, "cases.pt", f"{isa}.pt", isa]
        environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
    assert [process.wait() for process in running] == [0] * len(available)
    expected = [OP(*case) for case in cases]
    for isa in available:
        for actual, truth in zip(torch.load(tmp_path / f"{isa}.pt"), expected, strict=True):
            assert_same(actual, truth)


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("radius", [0.0, 1.5])
@pytest.mark.parametrize("form", FORMS)
def test_simt(simt: SimtLibrary, form: str, radius: float, seed: int) -> None:
    """One launch for all images and levels, and the same bits whatever the order of the threads."""
    tensors = FORMS[form]((280, 0, 30))
    simt.set_seed(seed)
    before = simt.launches
    with simt.guarded_memory():
        actual = torch.ops.fcos_ext_simt.assign_targets(*tensors, *geometry(radius), 0, True, 0)
    assert simt.launches - before == 1
    assert_same(actual, reference(*tensors, center_sampling_radius=radius, normalize=True))


def test_simt_strided_and_empty(simt: SimtLibrary) -> None:
    op = torch.ops.fcos_ext_simt.assign_targets
    boxes, labels, offsets = make_packed()
    with simt.guarded_memory():
        strided = op(boxes.t().contiguous().t(), labels, offsets, *geometry(1.5), 0, False, 0)
        before = simt.launches
        nothing = op(*no_images("cpu"), *geometry(1.5), 0, False, 0)
    assert simt.launches == before
    assert_same(strided, reference(boxes, labels, offsets))
    assert_same(nothing, reference(*no_images("cpu")))


BIG = 2**62


@pytest.mark.parametrize("function", ["simt", "cuda"])
@pytest.mark.parametrize(
    "extents, rows",
    [
        ([-3, 4, 9], [(0, 4), (4, 6)]),
        ([5, 2, 4], [(5, 5), (2, 4)]),
        ([BIG, -BIG, BIG], [(6, 6), (0, 6)]),
        ([0, BIG, 3], [(0, 6), (6, 6)]),
    ],
    ids=str,
)
def test_garbage_offsets_are_clamped(
    simt: SimtLibrary, function: str, extents: list[int], rows: list[tuple[int, int]]
) -> None:
    """On a GPU: the boxes of images may then be any, but there is no access outside of them."""
    boxes, labels, _ = make_packed((6,))
    check_clamped(simt, function, boxes, labels, torch.tensor(extents), rows)


@pytest.mark.parametrize("function", ["simt", "cuda"])
def test_garbage_counts_are_clamped(simt: SimtLibrary, function: str) -> None:
    boxes, labels, _ = make_padded((4, 4, 4, 4))
    counts = torch.tensor([-1, BIG, 7, -BIG])
    rows = [(0, 0), (6, 12), (12, 18), (18, 18)]
    check_clamped(simt, function, boxes, labels, counts, rows)


def check_clamped(
    simt: SimtLibrary,
    function: str,
    boxes: Tensor,
    labels: Tensor,
    extents: Tensor,
    rows: Sequence[tuple[int, int]],
) -> None:
    if function == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = (*geometry(1.5), 0, False, 0)
    if function == "cuda":
        actual = [t.cpu() for t in OP(boxes.cuda(), labels.cuda(), extents.cuda(), *options)]
    else:
        with simt.guarded_memory():
            actual = torch.ops.fcos_ext_simt.assign_targets(boxes, labels, extents, *options)
    boxes, labels = boxes.view(-1, 4), labels.flatten()
    for image, (first, last) in enumerate(rows):
        owned = slice(first, last)
        truth = reference(boxes[owned], labels[owned], torch.tensor([0, last - first]))
        matched = torch.where(truth.matched >= 0, truth.matched + first, -1)
        assert_same([t[image : image + 1] for t in actual], truth._replace(matched=matched))
