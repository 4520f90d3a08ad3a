"""Generated images and the settings of a short training run on them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fcos.config import Config
from fcos.data.shapes import generate_shapes
from fcos.presets import tiny


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (8 images of 96 px), val.json (5) and images/."""
    folder = tmp_path_factory.mktemp("shapes")
    generate_shapes(folder, split="train", images=8, size=(96, 96))
    generate_shapes(folder, split="val", images=5, size=(96, 96))
    return folder


@pytest.fixture
def short_run(shapes: Path, tmp_path: Path) -> Config:
    """`tiny`, on those images, for 6 iterations in this process, without validation."""
    config = tiny()
    data = replace(
        config.data,
        train_annotations=shapes / "train.json",
        min_sizes=(64, 96),
        max_size=96,
        workers=0,
    )
    train = replace(
        config.train,
        output=tmp_path / "run",
        iterations=6,
        batch_size=2,
        warmup_iterations=2,
        ema_decay=0.9,
        eval_every=100,
        log_every=2,
        device="cpu",
    )
    return replace(config, data=data, train=train)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
