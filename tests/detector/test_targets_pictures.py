"""Targets of a picture against a slow oracle, and that the pictures show them."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos import cli
from fcos.analysis.analyze import analyze
from fcos.analysis.conventions import Conventions, conventions_of
from fcos.analysis.pictures import plot_targets
from fcos.analysis.targets import PictureTargets, picture_targets
from fcos.colors import class_color
from fcos.data.annotations import read_annotations
from fcos.presets import tiny
from tests.detector.analysis_oracle import (
    area,
    is_candidate,
    random_conventions,
    random_document,
    write,
)

CONVENTIONS = Conventions(
    (8, 16), ((0, 16), (16, math.inf)), center_sampling_radius=0.0, resize="none"
)


def targets_of(*boxes: list[float], size: tuple[int, int] = (64, 96)) -> PictureTargets:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return picture_targets(array, np.arange(len(boxes)), size, CONVENTIONS)


@pytest.mark.parametrize("seed", range(15))
def test_matches_oracle(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    document, conventions = random_document(rng, images=3), random_conventions(rng)
    annotations = read_annotations(write(document, tmp_path), tmp_path, False, conventions.crowd)
    less = conventions.corners == "pixels"
    for index, image in enumerate(document["images"]):
        mine = slice(*annotations.offsets[index : index + 2])
        size = (image["height"], image["width"])
        targets = picture_targets(
            annotations.boxes[mine], annotations.labels[mine], size, conventions
        )
        boxes = [
            (x, y, x + w - less, y + h - less)
            for x, y, w, h in (
                a["bbox"]
                for a in document["annotations"]
                if a["image_id"] == image["id"] and (conventions.crowd or not a["iscrowd"])
            )
        ]
        assert targets.boxes.tolist() == [list(box) for box in boxes] and targets.size == size
        for level, found in enumerate(targets.levels):
            for row, column in np.ndindex(found.matched.shape):
                x, y = found.location(row, column)
                may = [i for i, b in enumerate(boxes) if is_candidate(x, y, b, level, conventions)]
                assert found.candidates[row, column] == len(may)
                if not may:
                    assert found.matched[row, column] == -1
                    assert found.centerness[row, column] == 0 == found.ltrb[row, column].sum()
                    continue
                best = min(may, key=lambda i: (area(boxes[i]), i))
                assert found.matched[row, column] == best
                x0, y0, x1, y1 = boxes[best]
                left, top, right, bottom = distances = [x - x0, y - y0, x1 - x, y1 - y]
                assert found.ltrb[row, column].tolist() == distances
                share = min(left, right) * min(top, bottom) / max(left, right) / max(top, bottom)
                assert found.centerness[row, column] == pytest.approx(math.sqrt(share), rel=1e-6)


def test_same_counts_as_analyze(shapes: Path) -> None:
    annotations = read_annotations(shapes / "train.json", shapes / "images")
    conventions = conventions_of(tiny())
    counts = analyze(annotations, conventions).positives
    for index in range(len(annotations.image_ids)):
        mine = slice(*annotations.offsets[index : index + 2])
        height, width = annotations.sizes[index].tolist()
        targets = picture_targets(
            annotations.boxes[mine], annotations.labels[mine], (height, width), conventions
        )
        assert targets.positives().tolist() == counts[mine].tolist()


def drawn(targets: PictureTargets, path: Path, **options: object) -> np.ndarray:
    height, width = targets.size
    grey = np.full((2 * height, 2 * width, 3), 90, dtype=np.uint8)
    plot_targets(grey, targets, path, **options)  # type: ignore[arg-type]
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def shows(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(image - color).max(axis=2) < 12).sum())


def test_picture_shows_boxes_and_levels(tmp_path: Path) -> None:
    one = drawn(targets_of([8, 8, 30, 30]), tmp_path / "one.png")  # both levels learn it
    two = drawn(targets_of([8, 8, 30, 30], [40, 8, 90, 60]), tmp_path / "two.png")
    only_fine = drawn(targets_of([8, 8, 22, 22]), tmp_path / "fine.png")
    assert one.shape == two.shape and only_fine.shape[0] < one.shape[0]
    for label in (0, 1):
        assert shows(two, class_color(label)) > 1000
    assert shows(one, class_color(0)) > 1000 and shows(one, class_color(1)) == 0


def test_picture_without_boxes_or_learned_boxes(tmp_path: Path) -> None:
    nothing = drawn(targets_of(), tmp_path / "nothing.png")
    lost = drawn(targets_of([30, 30, 31, 31]), tmp_path / "lost.png")
    assert nothing.shape == lost.shape  # the overview alone
    assert shows(lost, (0xD0, 0x20, 0x20)) > 10  # the zeros of its row


@pytest.mark.parametrize("size", [(400, 40), (40, 400), (8, 8)])
def test_picture_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    height, width = size
    image = drawn(targets_of([0, 0, width, height], size=size), tmp_path / "any.png")
    assert 300 < image.shape[0] < 4000 and 300 < image.shape[1] < 4000


def test_names_are_not_formulas(tmp_path: Path) -> None:
    names = ["$\\broken{$ and a name that is very long indeed"]
    drawn(targets_of([8, 8, 40, 40]), tmp_path / "a.png", names=names, title="$x_{$.png")


def test_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["targets", "--data", str(shapes / "train.json"), "--preset", "tiny"]
    assert cli.main([*arguments, "--first", "2", "--output", str(tmp_path / "first")]) == 0
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    content = json.loads((shapes / "train.json").read_text())
    with_boxes = {a["image_id"] for a in content["annotations"]}
    first = [image for image in content["images"] if image["id"] in with_boxes][:2]
    assert written == sorted(f"{i['id']}-{Path(i['file_name']).stem}.jpg" for i in first)
    assert all(name in capsys.readouterr().out for name in written[-1:])
    output = ["--output", str(tmp_path / "one")]
    assert cli.main([*arguments, "--image-ids", "5", "3", "5", *output]) == 0
    assert sorted(p.name[:2] for p in (tmp_path / "one").iterdir()) == ["3-", "5-"]
    assert Image.open(next((tmp_path / "one").iterdir())).width > 500


def test_command_errors(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((shapes / "train.json").read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(content | {"annotations": []}))
    content["images"][0]["width"] += 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    train, images = shapes / "train.json", shapes / "images"
    number = str(content["images"][0]["id"])
    for options, message in (
        (["--data", train, "--image-ids", "77"], "--image-ids: there is no image 77"),
        (["--data", train, "--first", "0"], "--first must be >= 1, got 0"),
        (["--data", train, "--levels", "P1"], "unknown level P1"),
        (["--data", train, "--images", tmp_path], ".png: no such file"),
        (["--data", empty, "--images", images], "no image has a box"),
        (["--data", other, "--images", images, "--image-ids", number], "the boxes would be wrong"),
    ):
        assert cli.main(["targets", "--output", str(tmp_path), *map(str, options)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("fcos: ") and error.count("\n") == 1


def test_conventions_are_those_asked_for(shapes: Path) -> None:
    annotations = read_annotations(shapes / "train.json", shapes / "images")
    mine = slice(*annotations.offsets[:2])
    sizes = [
        picture_targets(
            annotations.boxes[mine],
            annotations.labels[mine],
            (96, 96),
            replace(conventions_of(tiny()), min_size=side, strides=(4, 8, 16, 32)),
        ).levels[0]
        for side in (64, 128)
    ]
    assert [level.matched.shape for level in sizes] == [(16, 16), (32, 32)]
    assert sizes[0].name == "P2"
