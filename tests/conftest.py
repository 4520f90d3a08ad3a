"""What every test gets: the same random numbers each time, and a device to run on."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    if os.environ.get("FCOS_TEST_DEVICE") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("FCOS_TEST_DEVICE=cuda, but PyTorch finds no GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Type of the device under test. FCOS_TEST_DEVICE=cuda makes a missing GPU an error."""
    return str(request.param)
