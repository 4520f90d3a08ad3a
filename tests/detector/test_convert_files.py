"""Foreign files: read whatever they are packed in, and never run."""

import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fcos
from fcos.checkpoint import CheckpointError
from fcos.convert.errors import ConvertError
from fcos.convert.pickled_arrays import read_pickle
from fcos.convert.reading import read_foreign

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(7)}


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "optimizer": {"state": {}}, "iteration": 90000},
        {"state_dict": OrderedDict(STATE), "meta": {"epoch": 12, "CLASSES": ("x", "y")}},
        {"model": {f"module.{key}": value for key, value in STATE.items()}, "scheduler": {}},
    ],
)
def test_torch_files(content: Any, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_foreign(path)
    assert found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[key], STATE[key]) for key in STATE)
    assert found.class_names == (("x", "y") if "meta" in content else ())


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "half": np.ones((1, 2), np.float16),
        "big": np.arange(3, dtype=">f4"),
        "int": np.arange(3),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "a.pkl"
    content = {"model": arrays, "__author__": "x", "matching_heuristics": True, "n": np.float32(2)}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    plain = read_pickle(path)
    assert plain["__author__"] == "x" and plain["n"] == 2
    found = read_foreign(path).state
    for key, array in arrays.items():
        assert found[key].shape == array.shape
        assert found[key].tolist() == array.tolist(), key
        if array.dtype.kind == "f":
            assert found[key].dtype == torch.float32


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_nothing_is_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.{suffix}"
    content = {"model": {"head.cls_score.weight": Runs(tmp_path / "made")}}
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ConvertError, match=f"bad.{suffix}: refused.*(posix|nt).mkdir"):
        read_foreign(path)
    with pytest.raises(CheckpointError, match="refused"):
        fcos.load(path)
    assert names(tmp_path) == [path.name]


def forged(*calls: bytes) -> bytes:
    """A pickle, protocol 2, of these instructions."""
    return b"\x80\x02" + b"".join(calls) + b"."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forged(b"cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R"), "refused: it names builtins.eval"),
        (forged(b"cos\nsystem\n"), "refused: it names os.system"),
        (forged(b"cnumpy\nload\n"), "refused: it names numpy.load"),
        (forged(b"cnumpy.core.multiarray\nfromfile\n"), "names numpy.core.multiarray.fromfile"),
        (forged(b"ccollections\nOrderedDict.__class__\n"), "names collections.OrderedDict.__class"),
        (pickle.dumps(np.array([{}, []], object)), "refused: it holds arrays of the type 'O8'"),
        (pickle.dumps(np.array(["text"])), "refused: it holds arrays of the type 'U4'"),
        (pickle.dumps(types.SimpleNamespace()), "refused: it names types.SimpleNamespace"),
        (pickle.dumps(torch.zeros(2)), "refused: it names torch._utils._rebuild_tensor_v2"),
        (pickle.dumps({"a": np.zeros(1000)})[:-500], "not a pickle of arrays, or a truncated one"),
        (b"", "not a pickle of arrays"),
        (b"PK\x03\x04 no pickle", "not a pickle of arrays"),
        (forged(b"r\xff\xff\xff\x7f"), "not a pickle of arrays"),
        (pickle.dumps([1, 2]), "holds no weights"),
        (pickle.dumps({}), "holds no weights"),
        (pickle.dumps({"model": {"a": "text"}}), "'a' is str, not a tensor"),
        (pickle.dumps({"model": {1: np.zeros(2)}}), "weights must have names, got 1"),
    ],
)
def test_forged_pickles(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=f"a.pkl: .*{message}"):
        read_foreign(path)


class Plain:
    """Pickles as an array of any shape, type and bytes."""

    def __init__(self, shape: Any, kind: Any, data: Any) -> None:
        self.state = (1, shape, kind, False, data)

    def __reduce__(self) -> Any:
        start = np.zeros(0).__reduce__()
        return start[0], start[1], self.state


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1000, 1000), r"damaged: 16 bytes for an array of shape \(1000, 1000\)"),
        ((-4, -1), "refused: an array without a type or with a negative size"),
        ((2**62, 4), "damaged"),
        ("ab", "not a pickle of arrays"),
    ],
)
def test_forged_shapes(shape: Any, message: str, tmp_path: Path) -> None:
    """Numpy's own code never sees them."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": Plain(shape, np.dtype("f4"), b"\0" * 16)}))
    with pytest.raises(ConvertError, match=message):
        read_pickle(path)
    path.write_bytes(pickle.dumps({"a": Plain((4,), "f4", b"\0" * 16)}))
    with pytest.raises(ConvertError, match="an array without a type"):
        read_pickle(path)


def test_shared_and_endless_structures(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    nested: Any = [np.ones(2, np.float32)]
    for _ in range(60):
        nested = [nested, nested]  # 2^60 leaves, if they were counted out
    path.write_bytes(pickle.dumps({"model": {"a": nested}}))
    with pytest.raises(ConvertError, match="'a' is list, not a tensor"):
        read_foreign(path)
    endless: list[Any] = []
    endless.append(endless)
    path.write_bytes(pickle.dumps(endless))
    with pytest.raises(ConvertError, match="RecursionError"):
        read_foreign(path)


def test_damaged_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    buffer = io.BytesIO()
    torch.save({"model": STATE}, buffer)
    for data in (buffer.getvalue()[:-300], b"", b"text", pickle.dumps(STATE)[:40]):
        path.write_bytes(data)
        with pytest.raises(ConvertError, match="a.pth: "):
            read_foreign(path)
    with pytest.raises(ConvertError, match="gone.pth: no such file"):
        read_foreign(tmp_path / "gone.pth")


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\0" * 20)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # not installed
    with pytest.raises(ConvertError, match="needs the package safetensors .pip install"):
        read_foreign(path)
    monkeypatch.undo()
    library = pytest.importorskip("safetensors.torch")
    with pytest.raises(ConvertError, match="not a safetensors file, or damaged"):
        read_foreign(path)
    library.save_file(STATE, path)
    found = read_foreign(path).state
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)
