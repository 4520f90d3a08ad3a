"""The generated set: same seed same bytes, tight boxes, objects for every feature level."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcos.data import shapes
from fcos.data.coco import CocoDataset, shared_image_files
from fcos.data.scenes import CLASS_NAMES, MIN_SIDE, _iou, _stencil, _tight_box, draw_scene
from fcos.data.shapes import ShapesError, generate_shapes, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    assert main(["--output", str(folder), "--train", "150", "--val", "30"]) == 0
    return folder


@pytest.fixture(scope="module")
def train(folder):
    return CocoDataset(folder / "train.json")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_reads_back_without_a_complaint(folder, train):
    assert train.class_names == CLASS_NAMES
    assert train.report.images == len(train) == 150
    assert train.report.dropped == train.report.clipped == train.report.crowd == 0
    assert 0 < train.report.images_without_boxes < 20
    assert train.report.boxes > 400
    assert not list(folder.rglob("*.partial"))


def test_reaches_every_level(train):
    """At the centre of a box, max(l, t, r, b) is half of its longer side."""
    boxes = torch.cat([train.target(i)[0] for i in range(len(train))])
    reach = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
    for low, high in ((0, 32), (32, 64), (64, 128), (128, math.inf)):
        assert ((reach > low) & (reach <= high)).sum() >= 5
    assert 2 * reach.min() >= 0.6 * MIN_SIDE


def test_classes_and_forms_are_balanced(train):
    labels = torch.cat([train.target(i)[1] for i in range(len(train))])
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
    assert counts.min() > 0.6 * counts.float().mean()
    ratios = train.aspect_ratios
    assert all((kind.mean() > 0.15) for kind in (ratios < 0.95, ratios > 1.05, ratios == 1))


def test_boxes_stay_apart(train):
    for index in range(len(train)):
        boxes = train.target(index)[0].tolist()
        for i, box in enumerate(boxes):
            assert all(_iou(box, other) <= 0.46 for other in boxes[:i])


def test_boxes_are_tight(monkeypatch):
    """Against the pixels: the same picture with and without its one shape differs inside only."""
    monkeypatch.setattr("fcos.data.scenes._cast_shadow", lambda *_: None)
    monkeypatch.setattr("fcos.data.scenes._SHAPES", (1, 2))
    checked = 0
    for seed in range(40):
        drawn, bare = (np.random.default_rng(seed) for _ in range(2))
        scene = draw_scene(drawn, (200, 200))
        if len(scene.boxes) != 1:
            continue
        with monkeypatch.context() as patch:
            patch.setattr("fcos.data.scenes._add_shapes", lambda *_: None)
            without = draw_scene(bare, (200, 200))
        changed = (scene.pixels.astype(int) - without.pixels).any(axis=2)
        (x1, y1, x2, y2), height, width = scene.boxes[0], *changed.shape
        outside = np.ones_like(changed)
        outside[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = False
        assert not (changed & outside).any()
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert [x1, y1, x2, y2] == pytest.approx(found, abs=1.01)
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        checked += 1
    assert checked >= 5


def test_tight_box_of_a_stencil_over_the_border():
    stencil = _stencil(np.random.default_rng(2), 60, 200, 200)
    covered = np.asarray(stencil.mask)
    rows, columns = (side // 4 for side in covered.shape)
    assert _tight_box(stencil.mask, (slice(0, rows), slice(0, columns)), 5, 7) == pytest.approx(
        (7, 5, 7 + columns, 5 + rows), abs=1
    )
    # Its upper 20 rows and left 10 columns lie outside of the picture.
    x1, y1, x2, y2 = _tight_box(stencil.mask, (slice(20, rows), slice(10, columns)), -20, -10)
    ys, xs = np.nonzero(covered[80:, 40:])
    assert (x1, y1) == (xs.min() / 4, ys.min() / 4)
    assert (x2, y2) == ((xs.max() + 1) / 4, (ys.max() + 1) / 4)


def test_same_seed_same_bytes(folder, tmp_path):
    generate_shapes(tmp_path, split="val", images=30)
    ours = contents(tmp_path)
    assert len(ours) == 31
    assert {name: data for name, data in contents(folder).items() if name in ours} == ours


def test_a_larger_set_begins_with_the_smaller(folder, tmp_path):
    generate_shapes(tmp_path, images=5)
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()


def test_splits_and_seeds_differ(folder, train, tmp_path):
    generate_shapes(tmp_path, images=5, seed=1)
    val = CocoDataset(folder / "val.json")
    assert shared_image_files(train, val) == 0
    pictures = [path.read_bytes() for path in folder.rglob("*.png")]
    pictures += [path.read_bytes() for path in tmp_path.rglob("*.png")]
    assert len(set(pictures)) == 185


def test_a_complete_set_is_kept(tmp_path, capsys, monkeypatch):
    path = generate_shapes(tmp_path, images=3)
    assert "3 pictures, " in capsys.readouterr().out
    before = {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert generate_shapes(tmp_path, images=3) == path
    assert "3 pictures are there already" in capsys.readouterr().out
    assert {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*.*")} == before


def test_an_incomplete_set_is_completed(tmp_path):
    generate_shapes(tmp_path, images=3)
    whole = contents(tmp_path)
    (tmp_path / "images" / "train-00001.png").unlink()
    generate_shapes(tmp_path, images=3)
    assert contents(tmp_path) == whole
    (tmp_path / "train.json").unlink()
    generate_shapes(tmp_path, images=3)
    assert contents(tmp_path) == whole


def test_an_interrupted_set_is_not_taken_for_complete(tmp_path, monkeypatch):
    def full_disk(path, content):
        if path.name == "train-00002.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    write = shapes._write
    monkeypatch.setattr(shapes, "_write", full_disk)
    with pytest.raises(ShapesError, match=r"train-00002\.png: cannot be written: No space left"):
        generate_shapes(tmp_path, images=4)
    assert not (tmp_path / "train.json").exists()


def test_write_leaves_no_part_behind(tmp_path):
    with pytest.raises(OSError):
        shapes._write(tmp_path / "missing" / "a.png", b"")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        shapes._write(tmp_path / "a.png", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"train\.json: holds another generated set \(seed 0\)"),
        ({"images": 2}, r"another generated set \(images 3\)"),
        ({"size": (64, 96)}, r"another generated set \(size \[320, 320\]\)"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"size": (320, 63)}, r"size must be at least 64 x 64 .*, got \(320, 63\)"),
        ({"split": "../a"}, r"split must be a plain name, got '\.\./a'"),
    ],
)
def test_errors(tmp_path, arguments, message):
    generate_shapes(tmp_path, images=3)
    before = contents(tmp_path)
    with pytest.raises(ShapesError, match=message):
        generate_shapes(tmp_path, **{"images": 3} | arguments)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON", '{"info": {"generator": "other"}}'])
def test_somebody_elses_annotations_are_never_touched(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ShapesError, match=r"train\.json: exists and was not generated"):
        generate_shapes(tmp_path, images=3)
    assert contents(tmp_path) == {"train.json": text.encode()}


def test_output_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShapesError, match="file.*: cannot be written: Not a directory"):
        generate_shapes(tmp_path / "file", images=1)


def test_command(tmp_path):
    """As a person types it: no warning, a line a split; then one error without a traceback."""
    command = [sys.executable, "-W", "error", "-m", "fcos.data.shapes", "--output", str(tmp_path)]
    command += ["--train", "2", "--val", "1", "--height", "64", "--width", "96"]
    root = Path(__file__).parents[2]
    first = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (first.returncode, first.stderr) == (0, "")
    assert "train.json: 2 pictures" in first.stdout and "val.json: 1 pictures" in first.stdout
    sizes = [Image.open(path).size for path in tmp_path.rglob("*.png")]
    assert len(sizes) == 3 and all(w <= 96 and h <= 64 for w, h in sizes)
    info = json.loads((tmp_path / "train.json").read_text())["info"]
    assert info["seed"] == 0 and info["size"] == [64, 96]
    again = subprocess.run([*command, "--seed", "4"], cwd=root, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ") and "(seed 0)" in again.stderr
    assert "Traceback" not in again.stderr
