"""docs/accuracy.md is what benchmarks.accuracy finds, up to what may differ between processors."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks import accuracy

ROWS = json.loads(accuracy.ROWS.read_text())


def test_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    status = accuracy.main(["--check"])
    assert status == 0, f"run python -m benchmarks.accuracy\n{capsys.readouterr().err}"


def test_changes_are_seen() -> None:
    assert accuracy.differences(ROWS, ROWS) == []
    assert accuracy.differences(ROWS[1:], ROWS) == ["the rows are of other cases"]
    for part, key, value in (
        ("loss", "median", 3e-5),
        ("gradient", "max", 0.5),
        ("gradient", "zeros", 0.01),
        ("loss", "not_finite", 1),
        ("loss", "median", float("nan")),
    ):
        changed = copy.deepcopy(ROWS)
        changed[0][part][key] = value
        (line,) = accuracy.differences(changed, ROWS)
        assert line.startswith("sigmoid_focal_loss, initial prior") and f"{part} {key}" in line
    assert accuracy.page(ROWS) != accuracy.page(changed)


def test_errors() -> None:
    exact = torch.tensor([1.0, 2.0, -4.0, 1e-300, 8.0, 16.0], dtype=torch.float64)
    actual = torch.tensor([1.0, 2.2, -3.0, 0.0, 0.0, float("nan")])
    errors = accuracy.relative_errors(actual, exact)
    assert errors["median"] == pytest.approx(0.1)  # 0, 0.1, 0.25, 1
    assert errors["max"] == 1
    assert errors["zeros"] == pytest.approx(1 / 5) and errors["not_finite"] == 1


def test_ours_is_as_good_as_the_rounding_in_half_precision() -> None:
    """The claim of the page."""
    by_case = {(r["op"], r["setting"], r["dtype"], r["provider"]): r for r in ROWS}
    for (op, setting, dtype, provider), row in by_case.items():
        if provider != accuracy.OURS or dtype == "float32":
            continue
        best = by_case[op, setting, dtype, accuracy.EXACT]
        for part in ("loss", "gradient"):
            assert row[part]["median"] <= 1.01 * best[part]["median"]
            assert row[part]["zeros"] <= best[part]["zeros"] + 1e-3
            assert row[part]["not_finite"] == 0
