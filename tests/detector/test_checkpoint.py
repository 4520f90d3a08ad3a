"""Checkpoints: whole or not at all, and nothing in a file is ever run."""

import errno
import io
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from fcos.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    read_plain,
    save_checkpoint,
)
from fcos.config import Config
from fcos.presets import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def content(value: float = 1.0, **changes: Any) -> dict[str, Any]:
    config = replace(tiny(), model=replace(tiny().model, num_classes=2))
    return {
        "config": config,
        "class_names": ("cat", "dog"),
        "category_ids": (3, 7),
        "model": {"weight": torch.full((1000,), value)},
        **changes,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.pt", content())
    return tmp_path / "last.pt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert isinstance(loaded["config"], Config) and loaded["config"] == content()["config"]
    assert list(loaded["class_names"]) == ["cat", "dog"]
    assert list(loaded["category_ids"]) == [3, 7]
    assert torch.equal(loaded["model"]["weight"], torch.ones(1000))
    # any program with torch can read it, without this package
    plain = torch.load(saved, weights_only=True)
    assert plain["config"]["model"]["backbone"] == tiny().model.backbone


def test_replaces_the_old_file(saved: Path) -> None:
    save_checkpoint(saved, content(2.0))
    assert load_checkpoint(saved)["model"]["weight"][0] == 2
    assert names(saved.parent) == ["last.pt"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk(step: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        if step == "write":
            args[1].write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save") if step == "write" else (os, step)), full)
        with pytest.raises(CheckpointError, match="No space left.*previous file is unchanged"):
            save_checkpoint(saved, content(2.0))
        assert names(saved.parent) == ["last.pt"] and saved.read_bytes() == before
        with pytest.raises(CheckpointError, match=r"new\.pt: could not be saved") as caught:
            save_checkpoint(saved.with_name("new.pt"), content(2.0))
        assert "previous" not in str(caught.value)
        assert names(saved.parent) == ["last.pt"]
    assert load_checkpoint(saved)["model"]["weight"][0] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device is Linux's")
def test_full_device(tmp_path: Path) -> None:
    """What torch itself makes of a disk that runs full in the middle of a file."""
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save_checkpoint(tmp_path / "last.pt", content())
    assert names(tmp_path) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be saved .*No such file"):
        save_checkpoint(tmp_path / "nowhere" / "last.pt", content())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing.pt: no such file"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(share: float, saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="last.pt: not a PyTorch file, or a truncated one"):
        load_checkpoint(saved)


@pytest.mark.parametrize("kind", ["random", "pickle-like", "damaged"])
def test_damaged_files(kind: str, saved: Path) -> None:
    """Whatever the bytes, the error is ours, in one line, and names the file."""
    source = random.Random(0)
    good = saved.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(source.randbytes(80))
        if kind == "pickle-like":
            data[:2] = b"\x80\x02"
        elif kind == "damaged":
            data = bytearray(good)
            for _ in range(4):
                data[source.randrange(1500)] = source.randrange(256)
        saved.write_bytes(data)
        try:
            load_checkpoint(saved)
        except CheckpointError as error:
            refused += 1
            assert str(saved) in str(error) and "\n" not in str(error)
    assert refused == 150 or (kind == "damaged" and refused > 50)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle", "inside"])
def test_code_is_not_run(how: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    evil = Evil(proof)
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil if how == "torch" else {**content(), "config": {}, "extra": evil}, path)
    with pytest.raises(CheckpointError, match="evil.pt: refused.*could run code"):
        load_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists(), "the file would not have run anything, and shows nothing"


def test_foreign_files(tmp_path: Path) -> None:
    for name, value in (
        ("tensor.pt", torch.zeros(3)),
        ("state.pt", torchvision.models.resnet18().state_dict()),
        ("other.pt", {"format": "fcos-999", **content(config={})}),
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: not a checkpoint of this project"):
            load_checkpoint(tmp_path / name)


def altered(path: Path, **changes: Any) -> Path:
    plain = torch.load(path, weights_only=True)
    plain.update(changes)
    torch.save({k: v for k, v in plain.items() if v is not None}, path)
    return path


def test_missing_entries(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint lacks class_names, model"):
        load_checkpoint(altered(saved, class_names=None, model=None))


def test_number_of_classes(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="num_classes is 2, but the file names 3 classes"):
        load_checkpoint(altered(saved, class_names=["a", "b", "c"]))


def test_unknown_setting(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown setting optimizer"):
        load_checkpoint(altered(saved, config={"optimizer": {}}))


def test_weights_that_do_not_fit() -> None:
    network = torch.nn.Linear(2, 3)
    good = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, {"weight": torch.zeros(3, 4), "other": torch.zeros(1)}, "f.pt")
    for part in (
        "f.pt: the weights do not fit",
        "weight has shape (3, 4), the network's is (3, 2)",
        "missing bias",
        "unexpected other",
    ):
        assert part in str(caught.value)
    many = {str(i): torch.zeros(1) for i in range(10)}
    with pytest.raises(CheckpointError, match="and 7 more$"):
        load_weights(network, many, "f.pt")
    assert all(torch.equal(v, good[k]) for k, v in network.state_dict().items())
    load_weights(network, {k: v + 1 for k, v in good.items()}, "f.pt")
    assert torch.equal(network.bias, good["bias"] + 1)


def test_read_plain(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": [1, "b"]}, buffer)
    (tmp_path / "plain.pt").write_bytes(buffer.getvalue())
    assert read_plain(tmp_path / "plain.pt") == {"a": [1, "b"]}
