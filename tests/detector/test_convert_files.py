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
from foreign_checkpoints import Layout, Random, Unique, build

import fcos
from fcos import cli
from fcos.checkpoint import CheckpointError, load_checkpoint
from fcos.convert.errors import ConvertError
from fcos.convert.pickled_arrays import read_pickle
from fcos.convert.reading import read_foreign

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 18, "channels": 64, "tower": 1}
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


def run(*arguments: Any) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """mmdetection's, R-18, with scores above a half."""
    checkpoint = build(Layout("mmdet", **SMALL), Random(seed=0))
    checkpoint.state["bbox_head.conv_cls.bias"].fill_(2.0)
    torch.save({"state_dict": checkpoint.state, "meta": {}}, tmp_path / "fcos_r18.pth")
    return tmp_path / "fcos_r18.pth"


def test_convert_and_predict(
    foreign: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--weights", foreign) == 0
    text = capsys.readouterr().out
    for part in ("mmdet", "ignored: nothing", "rgb in 0..255", "80: person, bicycle", "-fcos.pt"):
        assert part in text
    output = tmp_path / "fcos_r18-fcos.pt"
    content = load_checkpoint(output)
    assert content["class_names"][79] == "toothbrush" and content["category_ids"][79] == 90
    assert content["config"].data.pixel_range == 255
    assert names(tmp_path) == ["fcos_r18-fcos.pt", "fcos_r18.pth"]

    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    detections = fcos.load(output, device="cpu").predict(image, score_threshold=0.1)
    directly = fcos.load(foreign, device="cpu").predict(image, score_threshold=0.1)
    assert len(detections) > 0
    assert torch.equal(detections.boxes, directly.boxes)
    assert torch.equal(detections.scores, directly.scores)


def test_detectron2_pickle_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layout = Layout("detectron2", scales=False, **SMALL)
    state = build(layout, Random(seed=0)).state
    arrays = {key: value.half().numpy() for key, value in state.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    ours, back = tmp_path / "ours.pt", tmp_path / "back.pth"
    assert run("--weights", tmp_path / "a.pkl", "--output", ours) == 0
    assert run("--weights", ours, "--to", "detectron2", "--output", back) == 0
    assert "for detectron2, to be configured with" in capsys.readouterr().out
    found = torch.load(back, weights_only=True)["model"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value.half().float()) for key, value in state.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "gone.pth"], "gone.pth: no such file"),
        (["--weights", "other.pth"], "other.pth: not from a known FCOS"),
        (["--weights", "text.pth"], "text.pth: "),
        (["--weights", "plain.pth"], "plain.pth: the weights do not tell whether"),
        (["--weights", "plain.pth", "--source", "mmdt"], "did you mean mmdet?"),
        (["--weights", "plain.pth", "--output", "plain.pth"], "must not replace the weights"),
        (["--weights", "plain.pth", "--output", "no/out.pt"], "no such folder"),
        (["--weights", "plain.pth", "--source", "original", "--class-names", "a"], "has 2 classes"),
        (
            ["--weights", "plain.pth", "--source", "original", "--to", "detectron2"],
            "plain.pth: detectron2's FCOS needs model.activation 'relu', got 'exp'",
        ),
    ],
)
def test_errors_leave_nothing_behind(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layer.weight": torch.zeros(2)}, "other.pth")
    Path("text.pth").write_text("hello")
    torch.save(
        {"model": build(Layout("original", classes=2, **SMALL), Unique()).state}, "plain.pth"
    )
    before = names(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert names(tmp_path) == before
