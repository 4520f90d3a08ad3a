"""What benchmarks.gpu_check does with operators and with times, as far as it runs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    def wrong(device: str, call: samples.Call) -> Any:
        return samples.moved(call.results, device) + (call.name == "sigmoid_focal_loss")

    monkeypatch.setattr(ops, "call_on", wrong)
    monkeypatch.setattr(samples, "operators", lambda: {"sigmoid_focal_loss", "forgotten"})
    assert ops.main(["agree", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED no sample in tests/abi/check_second_torch.py of: forgotten" in printed
    assert "FAILED sigmoid_focal_loss of " in printed
    assert "FAILED sigmoid_focal_loss_backward" not in printed


# ---- limits -------------------------------------------------------------------------------------


def test_limits_are_complete() -> None:
    entries = limits.load_limits()
    assert len({entry["kernel"] for entry in entries}) == len(entries)
    for entry in entries:
        assert 0 < entry["limit_us"] < entry["goal_us"] and entry["why"]
        assert entry["where"].keys() and isinstance(entry["op"], str)


def test_judging() -> None:
    limit = {"kernel": "k", "op": "a", "where": {"size": 8}, "limit_us": 10, "goal_us": 20}
    case = {"op": "a", "size": 8, "shape": [1, 2]}
    ours = case | {"provider": "fcos_ext", "median_ms": 0.05, "graph_ms": 0.015}
    theirs = case | {"provider": "eager", "median_ms": 0.06}
    wrong = case | {"provider": "wrong", "refused": "wrong result"}
    other_case = theirs | {"size": 9}

    def verdict(*rows: dict[str, Any], device: str = "NVIDIA H200") -> dict[str, Any]:
        (entry,) = limits.judge(rows, [limit], device)
        return entry

    entry = verdict(other_case, theirs, wrong, ours)
    assert entry["verdict"] == "meets the goal"
    assert entry["us"] == pytest.approx(15) and entry["wall_us"] == pytest.approx(50)
    assert entry["ratios"] == {"eager": pytest.approx(4)}
    assert verdict(ours | {"graph_ms": 0.021})["verdict"] == "misses the goal"
    assert verdict(ours, device="NVIDIA L4")["verdict"] == "no goal for this GPU"
    assert verdict(ours | {"refused": "wrong"})["verdict"] == "wrong result"
    assert verdict(theirs, other_case)["verdict"] == "not measured"
    lines = limits.table([entry, verdict()])
    assert "15.0 us" in lines[1] and "4.0 x  eager" in lines[2] and "not measured" in lines[3]


# ---- times --------------------------------------------------------------------------------------


def test_times_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits for the device is not captured, and neither ends the benchmark."""
    monkeypatch.setattr(cuda_timing, "event_ms", lambda call, rotation: 0.5)
    monkeypatch.setattr(cuda_timing, "count_launches", lambda call, inputs: 3)
    monkeypatch.setattr(cuda_timing, "graph_ms", lambda call, rotation: 0.25)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def waits(x: int) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    def cannot(call: Any, rotation: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    good = {"event_ms": 0.5, "launches": 3, "graph_ms": 0.25}
    assert cuda_timing.measure(lambda x: None, [(1,)]) == good
    row = cuda_timing.measure(waits, [(1,)])
    assert row["no_graph"] == "called a synchronizing CUDA operation" and "graph_ms" not in row
    monkeypatch.setattr(cuda_timing, "graph_ms", cannot)
    row = cuda_timing.measure(lambda x: None, [(1,)])
    assert row["no_graph"] == "operation not permitted when stream is capturing"
    assert device_ms({"median_ms": 1.0} | good) == 0.25
    assert device_ms({"median_ms": 1.0} | row) == 1.0
