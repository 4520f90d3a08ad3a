"""One picture's detections: selecting, filtering, COCO entries, JSON."""

import json
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from fcos.detections import Detections

NAMES = ("cat", "dog", "fish")


def make() -> Detections:
    return Detections(
        boxes=torch.tensor([[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 8.5, 9.25], [0.0, 0.0, 40.0, 30.0]]),
        scores=torch.tensor([0.875, 0.5, 0.25]),
        labels=torch.tensor([1, 0, 1]),
        names=NAMES,
        image_size=(30, 40),
    )


@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (0, [0.875]),
        (-1, [0.25]),
        (slice(1, None), [0.5, 0.25]),
        (torch.tensor(1), [0.5]),
        ([2, 0], [0.25, 0.875]),
        ([], []),
        ([True, False, True], [0.875, 0.25]),
        (torch.tensor([False, True, False]), [0.5]),
        (torch.tensor([1, 1]), [0.5, 0.5]),
    ],
)
def test_index(index: object, scores: list[float]) -> None:
    some = make()[index]  # type: ignore[index]
    assert some.scores.tolist() == scores
    assert len(some) == len(some.boxes) == len(some.labels) == len(scores)
    assert (some.names, some.image_size) == (NAMES, (30, 40))


@pytest.mark.parametrize("index", [3, -4])
def test_index_beyond_the_end(index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} of 3"):
        make()[index]


def test_iterates_over_single_detections() -> None:
    assert [(len(one), one.class_names) for one in make()] == [
        (1, ["dog"]),
        (1, ["cat"]),
        (1, ["dog"]),
    ]


def test_filter() -> None:
    detections = make()
    assert detections.filter(0.5).scores.tolist() == [0.875, 0.5]  # the threshold itself is kept
    assert detections.filter(classes=["dog"]).scores.tolist() == [0.875, 0.25]
    assert detections.filter(classes="cat").class_names == ["cat"]
    assert detections.filter(classes=[0, "fish"]).class_names == ["cat"]
    assert detections.filter(0.3, classes={"dog"}).scores.tolist() == [0.875]
    assert len(detections.filter(classes=[])) == 0


@pytest.mark.parametrize("wrong", ["bird", 3, -1])
def test_filter_unknown_class(wrong: str | int) -> None:
    with pytest.raises(
        ValueError, match=f"class {wrong!r} is not one of the model's: cat, dog, fish"
    ):
        make().filter(classes=[wrong])


def test_to_coco() -> None:
    entries = make().to_coco(42, category_ids=[10, 20, 90])
    assert entries[0] == {
        "image_id": 42,
        "category_id": 20,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": pytest.approx(0.875),
    }
    assert entries[1]["bbox"] == [5.0, 5.0, 3.5, 4.25]
    assert [entry["category_id"] for entry in make().to_coco(1)] == [2, 1, 2]
    json.dumps(entries)  # no tensor left
    with pytest.raises(ValueError, match=r"one id per class \(3\), got 2"):
        make().to_coco(1, [1, 2])


def test_json_round_trip(tmp_path) -> None:
    detections = make()
    detections.save(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read == detections.to_dict()
    assert read["image_size"] == [30, 40]
    assert [d["box"] for d in read["detections"]] == detections.boxes.tolist()
    assert [d["name"] for d in read["detections"]] == ["dog", "cat", "dog"]
    assert torch.allclose(torch.tensor([d["score"] for d in read["detections"]]), detections.scores)


def test_repr() -> None:
    assert repr(make()) == "<3 detections: 2 dog, 1 cat>"
    assert repr(make()[:1]) == "<1 detection: 1 dog>"
    assert repr(make()[:0]) == "<0 detections>"


def test_from_padded() -> None:
    class Padded(NamedTuple):
        boxes: Tensor
        scores: Tensor
        labels: Tensor
        counts: Tensor

    padded = Padded(
        boxes=torch.arange(24.0).view(2, 3, 4),
        scores=torch.tensor([[0.875, 0.8, 0.7], [0.6, 0.0, 0.0]]),
        labels=torch.tensor([[0, 1, 2], [2, -1, -1]]),
        counts=torch.tensor([3, 1]),
    )
    assert Detections.from_padded(padded, 0, NAMES, (8, 8)).labels.tolist() == [0, 1, 2]
    second = Detections.from_padded(padded, 1, list(NAMES), (8, 9))
    assert second.boxes.tolist() == [[12.0, 13.0, 14.0, 15.0]]
    assert second.class_names == ["fish"]
    assert second.image_size == (8, 9)


def test_plot_saves_and_checks_the_size(tmp_path) -> None:
    picture = Image.new("RGB", (40, 30))
    drawing = make().plot(picture, tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").tobytes() == drawing.tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match=r"image must be 30 x 40 .*, got 40 x 30"):
        make().plot(Image.new("RGB", (30, 40)))


def test_errors() -> None:
    box, score, label = torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \[1, 5\], \[1\], \[1\]"):
        Detections(torch.zeros(1, 5), score, label, NAMES, (1, 1))
    with pytest.raises(ValueError, match=r"got \[1, 4\], \[1\], \[2\]"):
        Detections(box, score, torch.zeros(2, dtype=torch.int64), NAMES, (1, 1))
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"labels must lie in 0..2, .* got {wrong}"):
            Detections(box, score, label + wrong, NAMES, (1, 1))
