"""What every test gets: the same random numbers each time, and a device to run on."""

from __future__ import annotations

import faulthandler
import os
import sys

import pytest
import torch

# torch.compile in this process: its pool of compiling processes costs more than it saves on small
# functions, and the test run would have to wait for it to end.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure() -> None:
    if os.environ.get("FCOS_TEST_DEVICE") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("FCOS_TEST_DEVICE=cuda, but PyTorch finds no GPU")


def pytest_unconfigure() -> None:
    # A process that does not end is a failure too, and this shows where it stands.
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)


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
