"""What benchmarks.gpu_check does with operators and with times, as far as it runs without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import cuda_timing
from benchmarks.gpu_check import limits, ops, samples
from benchmarks.harness import device_ms

# ---- operators ----------------------------------------------------------------------------------


def test_every_operator_has_a_sample() -> None:
    calls = samples.record_calls(0)
    assert samples.operators() and samples.missing_samples(calls) == []
    # Those of fixed shape can be replayed with other values of the same shapes.
    others = samples.record_calls(1)
    replayed = {
        first.name
        for first, other in zip(calls, others, strict=False)
        if samples.same_shapes(first, other)
    }
    fixed = {call.name for call in calls if samples.has_fixed_shapes(call)}
    assert fixed <= replayed
    tensors = [x for call in calls for x in call.args if isinstance(x, torch.Tensor)]
    assert tensors and not any(x.requires_grad for x in tensors)


def test_shapes_that_hang_on_values_are_seen() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    by_value = samples.Call(torch.ops.aten.nonzero.default, (x,), {}, None)
    by_shape = samples.Call(torch.ops.aten.relu.default, (x,), {}, None)
    assert not samples.has_fixed_shapes(by_value)
    assert samples.has_fixed_shapes(by_shape)


@pytest.mark.parametrize("way", ["float64", "agree", "run"])
def test_operators_on_a_cpu(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main([way, "--device", "cpu"]) == 0
    assert ", 0 failures" in capsys.readouterr().out


def test_a_wrong_operator_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = samples.record_calls(0)[0].name

    def wrong(device: str, call: samples.Call) -> Any:
        return tree_map(
            lambda x: x + 1 if isinstance(x, torch.Tensor) and call.name == first else x,
            call.results,
        )

    monkeypatch.setattr(ops, "call_on", wrong)
    monkeypatch.setattr(samples, "operators", lambda: {first, "forgotten"})
    assert ops.main(["agree", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED no sample in tests/abi/check_second_torch.py of: forgotten" in printed
    failed = {line.split()[1] for line in printed.splitlines() if line.startswith("FAILED")}
    assert failed == {"no", first}


def test_arguments_that_are_written_to_are_results() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    recorder = samples.Recorder("aten")
    with recorder:
        torch.ops.aten._foreach_add_.List([x], [y])
        torch.ops.aten.neg.default(y)
    add, neg = recorder.calls
    assert torch.equal(add.args[0][0], torch.tensor([1.0, 2.0]))
    assert torch.equal(add.results[1][0][0], torch.tensor([4.0, 6.0]))
    again = ops.call_on("cpu", add)
    ops.assert_same(again, add.results, exact=True)
    assert neg.results[1] == [] and torch.equal(neg.results[0], -y)


# ---- in a graph ----------------------------------------------------------------------------------


class FakeGraph:
    """What was called while it was captured, and is called again into the same tensors."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for target, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(target, torch.Tensor):
                    target.copy_(value)


class FakeCapture(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, results))
        return results


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just enough for graphs on a CPU."""
    for name, value in {
        "CUDAGraph": FakeGraph,
        "graph": FakeCapture,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("way", ["graphs", "syncs"])
def test_operators_in_a_graph(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main([way, "--device", "cpu"]) == 0
    count = int(capsys.readouterr().out.split()[0])
    assert count >= len(samples.record_calls(0)) / 2


@pytest.mark.usefixtures("fake_cuda")
def test_a_replay_without_effect_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: None)
    assert ops.main(["graphs", "--device", "cpu"]) == 1
    failures = capsys.readouterr().out.count("FAILED ")
    assert failures >= len(samples.record_calls(0)) / 2


# ---- limits -------------------------------------------------------------------------------------


def test_limits_are_complete() -> None:
    entries = limits.load_limits()
    assert len({entry["kernel"] for entry in entries}) == len(entries)
    for entry in entries:
        assert 0 < entry["limit_us"] < entry["goal_us"] and entry["why"]
        benchmark = importlib.import_module(f"benchmarks.bench_{entry['op']}")
        measured = [
            case.providers
            for case in benchmark.cases(torch.device("cuda"))
            if entry["where"].items() <= case.settings.items()
        ]
        assert measured and entry.get("provider", "fcos_ext") in measured[0], entry["kernel"]


def test_judging() -> None:
    limit = {
        "kernel": "k",
        "op": "a",
        "where": {"size": 8, "shape": [1, 2]},
        "limit_us": 10,
        "goal_us": 20,
    }
    case = {"op": "a", "size": 8, "shape": [1, 2]}
    ours = case | {"provider": "fcos_ext", "median_ms": 0.05, "graph_ms": 0.015}
    theirs = case | {"provider": "eager", "median_ms": 0.06}
    wrong = case | {"provider": "wrong", "refused": "wrong result"}
    other_case = theirs | {"size": 9}

    def verdict(*rows: dict[str, Any], device: str = "NVIDIA H200") -> dict[str, Any]:
        (entry,) = limits.judge(rows, [limit], device)
        return entry

    captured = theirs | {"provider": "compiled", "graph_ms": 0.06}
    entry = verdict(other_case, theirs, wrong, ours, captured)
    assert entry["verdict"] == "meets the goal"
    assert entry["us"] == pytest.approx(15) and entry["wall_us"] == pytest.approx(50)
    assert entry["ratios"] == {
        "eager, both with the host": pytest.approx(1.2),
        "compiled": pytest.approx(4),
    }
    assert verdict(ours | {"graph_ms": 0.021})["verdict"] == "misses the goal"
    assert verdict(ours, device="NVIDIA L4")["verdict"] == "no goal for this GPU"
    assert verdict(ours | {"refused": "wrong"})["verdict"] == "wrong result"
    assert verdict(theirs, other_case)["verdict"] == "not measured"
    lines = limits.table([entry, verdict()])
    assert "15.0 us" in lines[1] and "1.2 x  eager" in lines[2] and "4.0 x  compiled" in lines[3]
    assert "not measured" in lines[4]


# ---- times --------------------------------------------------------------------------------------


def test_times_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits for the device is not captured, and neither ends the benchmark."""
    monkeypatch.setattr(cuda_timing, "event_ms", lambda call, rotation: 0.5)
    monkeypatch.setattr(cuda_timing, "count_launches", lambda call, inputs: 3)
    monkeypatch.setattr(cuda_timing, "graph_ms", lambda call, rotation: 0.25)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    mode = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.append(new))

    def waits(x: int) -> None:
        """Twice, as PyTorch's operators do in each of its modes."""
        for _ in range(2):
            if mode[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nmore")
            if mode[-1] == "warn":
                warnings.warn("called a synchronizing CUDA operation (file.cpp:1)", stacklevel=1)

    def cannot(call: Any, rotation: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    good = {"event_ms": 0.5, "launches": 3, "synchronizations": 0, "graph_ms": 0.25}
    assert cuda_timing.measure(lambda x: None, [(1,)]) == good
    row = cuda_timing.measure(waits, [(1,)])
    assert row["synchronizations"] == 2 and mode[-1] == "default"
    assert row["no_graph"] == "called a synchronizing CUDA operation" and "graph_ms" not in row
    monkeypatch.setattr(cuda_timing, "graph_ms", cannot)
    row = cuda_timing.measure(lambda x: None, [(1,)])
    assert row["no_graph"] == "operation not permitted when stream is capturing"
    assert device_ms({"median_ms": 1.0} | good) == 0.25
    assert device_ms({"median_ms": 1.0} | row) == 1.0


@pytest.mark.usefixtures("fake_cuda")
def test_graph_and_event_times() -> None:
    seen: list[int] = []

    def sleeps(x: int) -> None:
        seen.append(x)
        time.sleep(0.002)
        torch.zeros(1)  # what the fake graph repeats

    rotation = [(1,), (2,), (3,)]
    assert cuda_timing.event_ms(sleeps, rotation) == pytest.approx(2, rel=0.9)
    assert set(seen) == {1, 2, 3}
    # Replays do not come by here: only the call that was captured is repeated.
    seen.clear()
    assert 0 < cuda_timing.graph_ms(sleeps, rotation) < 1
    assert len(seen) == 3 + 8
