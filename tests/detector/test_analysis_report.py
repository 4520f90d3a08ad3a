"""What is said about an analysis: rows, advice, JSON, table and picture."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fcos.analysis.advice import advice, percent
from fcos.analysis.analyze import REASONS, Analysis, analyze
from fcos.analysis.conventions import Conventions
from fcos.analysis.plot import plot_analysis
from fcos.analysis.rows import by_class, by_level, by_size, lost_boxes, to_dict
from fcos.analysis.table import analysis_table
from fcos.data.annotations import read_annotations
from tests.detector.analysis_oracle import Document, random_document, write

AS_IS = Conventions((8, 16), ((0, 32), (32, math.inf)), resize="none")


def document_of(*boxes: list[float], size: int = 128, classes: tuple[int, ...] = ()) -> Document:
    """One picture with these boxes."""
    return {
        "images": [{"id": 9, "file_name": "nine.png", "height": size, "width": size}],
        "annotations": [
            {"id": i, "image_id": 9, "category_id": classes[i] if classes else 1, "bbox": box}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def analyze_document(document: Document, conventions: Conventions, folder: Path) -> Analysis:
    return analyze(read_annotations(write(document, folder), folder, False), conventions)


@pytest.fixture
def some(tmp_path: Path) -> Analysis:
    """Twenty pictures with boxes of all kinds."""
    document = random_document(random.Random(3), images=20)
    return analyze_document(document, replace(AS_IS, center_sampling_radius=0.25), tmp_path)


def test_rows_add_up(some: Analysis) -> None:
    levels, sizes, classes = by_level(some), by_size(some), by_class(some)
    positives = int(some.positives.sum())
    assert sum(row.positives for row in levels) == sum(row.positives for row in sizes) == positives
    assert sum(row.boxes for row in sizes) == sum(row.boxes for row in classes) == some.boxes
    learned = int(some.learned.sum())
    assert sum(row.learned for row in sizes) == sum(row.learned for row in classes) == learned
    for level, row in enumerate(levels):
        assert sum(size.level_positives[level] for size in sizes) == row.positives
        assert 0 <= row.ambiguous_classes <= row.ambiguous <= row.positives <= row.locations
    assert [(row.name, row.stride) for row in levels] == [("P3", 8), ("P4", 16)]
    lost = lost_boxes(some)
    assert 0 < len(lost) == some.boxes - learned
    areas = [box.size[0] * box.size[1] for box in lost]
    assert areas == sorted(areas, reverse=True)


def test_sizes_of_boxes(tmp_path: Path) -> None:
    boxes = [[0, 0, 8, 8], [0, 0, 7, 8], [0, 0, 64, 16], [0, 0, 31, 32]]
    rows = by_size(analyze_document(document_of(*boxes), AS_IS, tmp_path))
    assert [(row.name, row.boxes) for row in rows] == [
        *[("0 to 8", 1), ("8 to 16", 1), ("16 to 32", 1), ("32 to 64", 1)]
    ]


def test_lost_boxes_can_be_found(tmp_path: Path) -> None:
    document = document_of([6.5, 103, 2.5, 3], [30, 40, 50, 50], [30, 40, 50, 50])
    document["annotations"][0]["category_id"] = 2
    conventions = replace(AS_IS, resize="round", min_size=256, max_size=256)
    lost = lost_boxes(analyze_document(document, conventions, tmp_path))
    assert [box._asdict() for box in lost] == [
        {
            "image_id": 9,
            "file_name": "nine.png",
            "class_name": "cat",
            "bbox": (30, 40, 50, 50),
            "size": (100, 100),
            "reason": "covered",
            "twin": True,
        },
        {
            "image_id": 9,
            "file_name": "nine.png",
            "class_name": "dog",
            "bbox": (6.5, 103, 2.5, 3),
            "size": (5, 6),
            "reason": "between locations",
            "twin": False,
        },
    ]


def said(document: Document, conventions: Conventions, folder: Path) -> str:
    return "\n".join(advice(analyze_document(document, conventions, folder)))


def test_advice_on_small_boxes(tmp_path: Path) -> None:
    boxes = [[16 * i, 40, 30, 30] for i in range(6)]
    small = document_of(*boxes, [13, 13, 6, 6], [11, 9, 2, 40])
    text = said(small, AS_IS, tmp_path)
    assert "1 box of 8 (12.5 %) cannot be learned" in text
    assert (
        "25.0 % of your boxes (2) are smaller than stride 8 can see: a side of less than 8" in text
    )
    assert "1 of them lies between its locations, unlearned. Remedies: resizing, or" in text
    larger = replace(AS_IS, resize="round", min_size=512, max_size=512)
    text = said(document_of(*boxes, [13, 13, 6, 6]), larger, tmp_path)
    assert "smaller than stride" not in text and "Every box has a location that learns it" in text
    assert "after resizing" in said(small, replace(larger, min_size=140), tmp_path)


def test_advice_on_each_reason(tmp_path: Path) -> None:
    thin = document_of([5, 17, 110, 6])
    assert "1 box (100.0 %) with sides of 110 and 6 pixels" in said(thin, AS_IS, tmp_path)
    assert "long and thin ones slip" in said(thin, AS_IS, tmp_path)
    gap = replace(AS_IS, size_ranges=((0, 16), (64, 128)))
    text = said(document_of([20, 20, 60, 60]), gap, tmp_path)
    assert "no size range holds 16 to 64 or more than 128 pixels (--size-ranges)" in text
    narrow = replace(AS_IS, center_sampling_radius=0.1)
    assert "none within 0.1 strides of the centre" in said(
        document_of([20, 20, 24, 24]), narrow, tmp_path
    )
    twice = document_of([20, 20, 30, 30], [20, 20, 30, 31])
    assert "1 of these nearly coincides with another box" in said(twice, AS_IS, tmp_path)
    pixels = replace(AS_IS, corners="pixels")
    assert "No area is left of 1 box" in said(document_of([20, 20, 1, 30]), pixels, tmp_path)


def test_advice_on_ambiguity(tmp_path: Path) -> None:
    nested = document_of([16, 16, 64, 64], [24, 24, 32, 32], classes=(1, 2))
    whole = Conventions((16,), ((0, math.inf),), center_sampling_radius=0.0, resize="none")
    text = said(nested, whole, tmp_path)
    # of 4 x 4 locations, one is strictly inside both
    assert "6.2 % of the positive locations lie in more than one box, 6.2 % in boxes of" in text
    assert "(--center-sampling-radius 1.5)" in text and "more levels" not in text
    text = said(nested, replace(whole, strides=(8,)), tmp_path)
    assert "So do more levels" in text


def test_advice_on_levels_and_sizes(tmp_path: Path) -> None:
    boxes = [[16 * i, 16, 40, 40] for i in range(5)]
    text = said(document_of(*boxes), AS_IS, tmp_path)
    assert "P4 learns nothing" not in text
    idle = Conventions((8, 16, 32), ((0, 64), (64, 128), (128, math.inf)), resize="none")
    text = said(document_of(*boxes), idle, tmp_path)
    assert "P4 and P5 learn nothing: no box has the size" in text
    assert "P3 learns 100.0 % of the boxes, whose longer side has a median of 40 pixels" in text
    whole = replace(idle, center_sampling_radius=0.0)
    text = said(document_of([0, 0, 128, 128], [40, 40, 9, 9]), whole, tmp_path)
    assert "Boxes under 32 x 32 pixels are 50.0 % of all, but have" in text


def test_advice_on_classes(tmp_path: Path) -> None:
    good = [[4 * i, 4 * i, 30, 30] for i in range(24)]
    bad = [[1 + 4 * i, 13, 2, 2] for i in range(24)]
    document = document_of(*good, *bad, classes=(1,) * 24 + (2,) * 24)
    assert "Best possible recall is lowest for dog (0.0 %)." in said(document, AS_IS, tmp_path)


def test_advice_without_boxes(tmp_path: Path) -> None:
    assert (
        said(document_of(), AS_IS, tmp_path) == "There are no boxes, and so nothing to be learned."
    )


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (0.0004, "<0.1 %"), (0.1234, "12.3 %"), (0.9999, ">99.9 %"), (1, "100.0 %")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
    assert percent(math.nan) == "-"


def test_json_is_strict(some: Analysis, tmp_path: Path) -> None:
    empty = analyze_document(document_of(), AS_IS, tmp_path)
    for analysis in (some, empty):
        text = json.dumps(to_dict(analysis), allow_nan=False)
        content = json.loads(text)
        assert content["boxes"] == analysis.boxes
        assert content["conventions"]["size_ranges"] == [[0, 32], [32, None]]
        assert len(content["unlearned_boxes"]) == sum(content["unlearned"].values())
        assert list(content["unlearned"]) == list(REASONS[1:])
    assert content["best_possible_recall"] is None


def printed(analysis: Analysis, **options: Any) -> str:
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(analysis_table(analysis, **options))
    return console.export_text()


def test_table(some: Analysis, tmp_path: Path) -> None:
    text = printed(some, listed=2)
    assert f"{100 * some.recall:.2f} %" in text and "center sampling within 0.25 strides" in text
    assert f"the largest 2 of {len(lost_boxes(some))}" in text
    assert all(line in text for line in ("by level", "by size in the resized picture"))
    assert "boxes that no location learns" not in printed(some, listed=0)
    document = document_of([10, 10, 2, 2])
    document["images"][0]["file_name"] = "[bold]odd[/x].png"  # markup of rich, if it were read
    assert "[bold]odd[/x].png" in printed(analyze_document(document, AS_IS, tmp_path))
    assert "There are no boxes" in printed(analyze_document(document_of(), AS_IS, tmp_path))


def test_picture(some: Analysis, tmp_path: Path) -> None:
    documents = (document_of(), document_of([20, 20, 40, 40]), document_of([20, 20, 1, 1]))
    for number, analysis in enumerate(
        [some, *(analyze_document(d, AS_IS.only(["P3"]), tmp_path) for d in documents)]
    ):
        path = tmp_path / f"{number}.png"
        plot_analysis(analysis, path)
        image = np.asarray(Image.open(path).convert("RGB"))
        assert image.shape[1] > 1500 and (image < 100).any()
