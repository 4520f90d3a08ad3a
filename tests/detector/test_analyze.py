"""Recall, ambiguity and levels: against an oracle, against training, and the paper's tables."""

import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fcos.analysis.analyze import REASONS, Analysis, analyze
from fcos.analysis.assignment import network_boxes, network_size
from fcos.analysis.conventions import Conventions, conventions_of, paper_conventions
from fcos.config import ConfigError
from fcos.data.annotations import read_annotations
from fcos.data.batches import collate
from fcos.data.coco import CocoDataset
from fcos.data.transforms import eval_transforms
from fcos.losses import assign
from fcos.presets import PRESETS, improved, tiny
from tests.detector.analysis_oracle import (
    Document,
    expected,
    random_conventions,
    random_document,
    write,
)

COCO_BOXES = os.environ.get("FCOS_COCO_BOXES")


def analyze_document(document: Document, conventions: Conventions, folder: Path) -> Analysis:
    path = write(document, folder)
    return analyze(read_annotations(path, folder, False, conventions.crowd), conventions)


def assert_counts(analysis: Analysis, truth: dict) -> None:
    depth = len(analysis.conventions.strides)
    for name in ("positives", "candidates"):
        table = [[row[level] for level in range(depth)] for row in truth[name]]
        assert getattr(analysis, name).tolist() == table, name
    for name in ("level_positives", "level_ambiguous", "level_ambiguous_classes"):
        assert getattr(analysis, name).tolist() == [truth[name][d] for d in range(depth)], name
    assert [REASONS[reason] for reason in analysis.reasons] == truth["reasons"]
    learned = [not reason for reason in truth["reasons"]]
    if learned:
        assert analysis.recall == pytest.approx(sum(learned) / len(learned))
    positives = sum(truth["level_positives"].values())
    if positives:
        ambiguous = sum(truth["level_ambiguous"].values())
        assert analysis.ambiguous == pytest.approx(ambiguous / positives)
        classes = sum(truth["level_ambiguous_classes"].values())
        assert analysis.ambiguous_classes == pytest.approx(classes / positives)


@pytest.mark.parametrize("seed", range(60))
def test_matches_oracle(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    document, conventions = random_document(rng), random_conventions(rng)
    analysis = analyze_document(document, conventions, tmp_path)
    assert_counts(analysis, expected(document, conventions))
    sizes = [side for (height, width) in analysis.sizes.tolist() for side in (width, height)]
    less = conventions.corners == "pixels"
    drawn = [a for a in document["annotations"] if conventions.crowd or not a["iscrowd"]]
    assert sizes == [side - less for a in drawn for side in a["bbox"][2:]]


def test_oracle_meets_every_reason() -> None:
    met = set()
    for seed in range(60):
        rng = random.Random(seed)
        document, conventions = random_document(rng), random_conventions(rng)
        met |= set(expected(document, conventions)["reasons"])
    assert met >= set(REASONS) - {"outside"}


@pytest.mark.parametrize("resize", ["round", "truncate"])
@pytest.mark.parametrize("seed", range(6))
def test_matches_oracle_resized(seed: int, resize: str, tmp_path: Path) -> None:
    rng = random.Random(1000 + seed)
    document = random_document(rng, images=3)
    for image in document["images"]:  # all of one shorter side, so that the scale is exact
        image["height"], image["width"] = 96, 112
    conventions = replace(random_conventions(rng), resize=resize, min_size=192, max_size=1000)
    analysis = analyze_document(document, conventions, tmp_path)
    assert_counts(analysis, expected(document, conventions, scale=2.0))


def test_many_boxes_take_several_calls(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fcos.analysis.analyze._PAIRS_AT_ONCE", 1000)
    rng = random.Random(5)
    document = random_document(rng, images=6)
    conventions = replace(random_conventions(rng), strides=(4, 8), size_ranges=((0, 16), (16, 99)))
    assert_counts(
        analyze_document(document, conventions, tmp_path), expected(document, conventions)
    )


def test_no_boxes(tmp_path: Path) -> None:
    document = random_document(random.Random(0))
    document["annotations"] = []
    analysis = analyze_document(document, conventions_of(improved()), tmp_path)
    assert analysis.boxes == 0 and analysis.locations.all()
    assert math.isnan(analysis.recall) and math.isnan(analysis.ambiguous)


def test_pictures_are_reported(tmp_path: Path) -> None:
    path = write(random_document(random.Random(1), images=5), tmp_path)
    done: list[int] = []
    analyze(read_annotations(path, tmp_path, False), conventions_of(tiny()), done.append)
    assert done == [1, 2, 3, 4, 5]


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        document = random_document(random.Random(1))
        analyze_document(document, conventions_of(tiny()), tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_twins_and_boxes_without_area(tmp_path: Path) -> None:
    document = random_document(random.Random(0), images=1)
    document["images"][0] |= {"height": 64, "width": 64}
    boxes = [[10, 10, 26, 26], [10, 10, 26, 26], [9, 9, 30, 30], [50, 50, 10, 1], [0, 0, 64, 64]]
    document["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)
    ]
    conventions = Conventions(
        strides=(16,),
        size_ranges=((0, math.inf),),
        center_sampling_radius=0.0,
        resize="none",
        corners="pixels",
    )
    analysis = analyze_document(document, conventions, tmp_path)
    reasons = [REASONS[reason] for reason in analysis.reasons]
    assert reasons == ["", "covered", "covered", "outside", ""]
    assert analysis.twins.tolist() == [False, True, False, False, False]


def test_same_as_training(shapes: Path) -> None:
    """The targets that training makes of the pictures, through its own data pipeline."""
    for name in ("tiny", "paper", "improved", "torchvision", "original", "mmdet"):
        config = PRESETS[name]()
        config = replace(config, data=replace(config.data, min_sizes=(150,), max_size=200))
        transforms = eval_transforms(config.data, config.model.corners)
        dataset = CocoDataset(shapes / "train.json", transforms=transforms)
        annotations = read_annotations(shapes / "train.json", shapes / "images")
        analysis = analyze(annotations, conventions_of(config))
        positives = []
        for index in range(len(dataset)):
            batch = collate([dataset[index]])
            mine = slice(*annotations.offsets[index : index + 2])
            boxes, size = network_boxes(
                annotations.boxes[mine], dataset.size(index), conventions_of(config)
            )
            assert size == tuple(batch.image_sizes[0].tolist())
            boxes[:, 2:] += config.model.corners == "pixels"  # in batches they end at edges
            assert np.allclose(boxes, batch.boxes[0], rtol=1e-6, atol=1e-4)
            targets = assign(
                (batch.images.shape[2], batch.images.shape[3]),
                config.model,
                batch.boxes,
                batch.labels,
                batch.counts,
            )
            boxes = int(batch.counts)
            positives += np.bincount(
                targets.matched[targets.matched >= 0], minlength=boxes
            ).tolist()
        assert analysis.positives.sum(axis=1).tolist() == positives
        assert sum(positives) > 50


@pytest.mark.parametrize(
    ("size", "truncated", "rounded"),
    [  # (height, width)
        ((480, 640), (800, 1066), (800, 1067)),
        ((640, 480), (1066, 800), (1067, 800)),
        ((427, 640), (800, 1199), (800, 1199)),
        ((800, 900), (800, 900), (800, 900)),
        ((200, 640), (417, 1334), (417, 1333)),  # limited by the longer side
        ((3, 4000), (1, 1333), (1, 1333)),
        ((500, 500), (800, 800), (800, 800)),
    ],
)
def test_network_size(size: tuple, truncated: tuple, rounded: tuple) -> None:
    conventions = paper_conventions()
    assert network_size(size, conventions) == truncated
    assert network_size(size, replace(conventions, resize="round")) == rounded
    assert network_size(size, replace(conventions, resize="none")) == size


def test_network_boxes() -> None:
    box = np.array([[0, 10, 20, 40]], dtype=np.float32)
    edges = Conventions((8,), ((0, 64),), min_size=200, max_size=1000)
    boxes, size = network_boxes(box, (100, 50), edges)
    assert boxes.tolist() == [[0, 40, 80, 160]] and boxes.dtype == np.float32
    assert size == (400, 200)
    boxes, _ = network_boxes(box, (100, 50), replace(edges, corners="pixels"))
    assert boxes.tolist() == [[0, 40, 76, 156]]
    assert box.tolist() == [[0, 10, 20, 40]]  # as it was
    boxes, size = network_boxes(box, (480, 640), replace(edges, min_size=800, resize="truncate"))
    assert size == (750, 1000)  # the shorter side is rounded first, the longer follows
    assert boxes[0].tolist() == pytest.approx([0, 15.625, 31.25, 62.5])
    boxes, size = network_boxes(box, (480, 640), replace(edges, min_size=700, resize="truncate"))
    assert size == (700, 933)  # of 933.3
    assert boxes[0].tolist() == pytest.approx([0, 14.58333, 29.15625, 58.33333], rel=1e-6)


def test_huge_pictures_are_refused() -> None:
    conventions = Conventions((8,), ((0, 64),), resize="none")
    with pytest.raises(ConfigError, match=r"at most 1,000,000,000 pixels, got 100000 x 100000"):
        network_size((100_000, 100_000), conventions)


def test_levels() -> None:
    conventions = conventions_of(improved())
    assert conventions.level_names == ("P3", "P4", "P5", "P6", "P7")
    assert replace(conventions, strides=(2, 12, 16, 1, 256)).level_names == (
        *("P1", "stride 12", "P4", "P0", "P8"),
    )
    assert conventions.only(["P4"]).size_ranges == ((0, math.inf),)
    some = conventions.only(["P5", "P3"])
    assert some.strides == (8, 32) and some.size_ranges == ((0, 64), (128, math.inf))
    with pytest.raises(ConfigError, match="unknown level p4; known are P3, .*; did you mean P4?"):
        conventions.only(["p4"])
    with pytest.raises(ConfigError, match="at least one level"):
        conventions.only([])


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("strides", (), "1 to 32 whole numbers"),
        ("strides", (0, 8, 16, 32, 64), "whole numbers >= 1, got"),
        ("size_ranges", ((0, 64),), "for each of the 5 strides, got"),
        ("size_ranges", ((64, 0),) * 5, "low <= high"),
        ("size_ranges", ((math.nan, 1),) * 5, "low <= high"),
        ("center_sampling_radius", -1.0, ">= 0 and finite, got -1"),
        ("center_sampling_radius", math.nan, ">= 0 and finite, got nan"),
        ("min_size", 0, ">= 1, got 0"),
        ("max_size", 0, ">= 1, got 0"),
    ],
)
def test_conventions_that_cannot_be(field: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be .*{rule}"):
        replace(conventions_of(improved()), **{field: value})


@pytest.mark.skipif(not COCO_BOXES, reason="FCOS_COCO_BOXES: boxes of COCO val2017, not given")
@pytest.mark.parametrize(
    ("levels", "recall", "ambiguous", "classes"),
    [(["P4"], 95.55, 23.16, 17.84), (["P3", "P4", "P5", "P6", "P7"], 98.40, 7.14, 3.75)],
)
def test_tables_of_the_paper(
    levels: list[str], recall: float, ambiguous: float, classes: float
) -> None:
    """arXiv 1904.01355, tables 1 and 2."""
    path = Path(str(COCO_BOXES))
    annotations = read_annotations(path, path.parent, check_images=False)
    start = time.perf_counter()
    analysis = analyze(annotations, paper_conventions().only(levels))
    assert time.perf_counter() - start < 60
    assert 100 * analysis.recall == pytest.approx(recall, abs=0.02)
    assert 100 * analysis.ambiguous == pytest.approx(ambiguous, abs=0.02)
    assert 100 * analysis.ambiguous_classes == pytest.approx(classes, abs=0.02)
