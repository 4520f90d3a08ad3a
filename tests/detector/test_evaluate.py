"""Average precision and confusion, against tables worked out by hand and plain pycocotools."""

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from fcos.confusion import confusion_matrix
from fcos.evaluate import EvaluationError, evaluate_coco

CAT, DOG, FISH = 3, 7, 20  # ids with gaps, as in COCO


def truth(
    boxes: list[tuple[int, int, list[float]]], images: int = 3, **extra: Any
) -> dict[str, Any]:
    """Annotations of (image, category, xywh)."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)
        ],
        "categories": [
            {"id": DOG, "name": "dog"},
            {"id": CAT, "name": "cat"},
            {"id": FISH, "name": "fish"},
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, **extra}
            for number, (image, category, box) in enumerate(boxes)
        ],
    }


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def spread(count: int, category: int = CAT) -> list[tuple[int, int, list[float]]]:
    """Boxes far apart, in image 0."""
    return [(0, category, [60.0 * i, 10.0, 40.0, 40.0]) for i in range(count)]


def perfect(boxes: list[tuple[int, int, list[float]]]) -> list[dict[str, Any]]:
    return [
        found(image, category, box, 0.9 - 0.01 * n)
        for n, (image, category, box) in enumerate(boxes)
    ]


def test_perfect_detections() -> None:
    boxes = spread(4) + [(1, DOG, [5.0, 5.0, 200.0, 200.0])]
    metrics = evaluate_coco(truth(boxes), perfect(boxes))
    assert (metrics.AP, metrics.AP50, metrics.AP75, metrics.AR100) == pytest.approx((1, 1, 1, 1))
    # 40 x 40 px lies between 32 x 32 and 96 x 96, 200 x 200 above
    assert (metrics.APs, metrics.APm, metrics.APl) == (None, pytest.approx(1), pytest.approx(1))
    assert metrics.AR1 == pytest.approx((1 / 4 + 1) / 2)  # mean over cat (1 of 4) and dog
    assert (metrics.images, metrics.boxes, metrics.detections) == (3, 5, 5)
    assert [(c.name, c.boxes) for c in metrics.classes] == [("cat", 4), ("dog", 1), ("fish", 0)]
    assert metrics.classes[2].AP is None and metrics.classes[2].AP50 is None


def test_half_of_the_boxes() -> None:
    boxes = spread(4)
    metrics = evaluate_coco(truth(boxes), perfect(boxes[:2]))
    # precision 1 at the recalls 0, 0.01 ... 0.50, which are 51 of 101 points, then 0
    assert metrics.AP == pytest.approx(51 / 101)
    assert metrics.AR100 == pytest.approx(0.5)


def test_a_false_positive_above_a_true_one() -> None:
    boxes = spread(2)
    results = [
        found(0, CAT, boxes[0][2], 0.9),
        found(0, CAT, [500.0, 300.0, 40.0, 40.0], 0.8),
        found(0, CAT, boxes[1][2], 0.7),
    ]
    metrics = evaluate_coco(truth(boxes), results)
    # recall 0.5 at precision 1 (51 points), recall 1 at precision 2/3 (50 points)
    assert metrics.AP == pytest.approx((51 + 50 * 2 / 3) / 101)
    curves = metrics.curves
    assert curves.names == ("cat", "dog", "fish")
    assert curves.precision[0, [0, 50, 51, 100]] == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert curves.precision[0].mean() == pytest.approx(metrics.classes[0].AP50)
    # F1 = 2 TP / (boxes + detections) at the scores 0, 0.75, 0.85, 0.95
    assert curves.f1[0, [0, 75, 85, 95]] == pytest.approx([4 / 5, 2 / 4, 2 / 3, 0])
    assert np.isnan(curves.precision[1:]).all() and np.isnan(curves.f1[1:]).all()


def test_overlap_thresholds() -> None:
    """IoU 0.6: 40 x 40 against 40 x 24 inside it. True at 0.50, 0.55, 0.60 of ten thresholds."""
    boxes = spread(1)
    metrics = evaluate_coco(truth(boxes), [found(0, CAT, [0.0, 10.0, 40.0, 24.0], 0.9)])
    assert (metrics.AP, metrics.AP50, metrics.AP75) == pytest.approx((0.3, 1, 0))


def test_second_detection_of_a_box_is_false() -> None:
    boxes = spread(1)
    results = [found(0, CAT, boxes[0][2], score) for score in (0.9, 0.8)]
    assert evaluate_coco(truth(boxes), results).curves.f1[0, 0] == pytest.approx(2 / 3)


def test_annotation_with_id_0_can_be_found() -> None:
    """pycocotools by itself takes a match with annotation 0 for no match."""
    boxes = spread(1)
    assert truth(boxes)["annotations"][0]["id"] == 0
    assert evaluate_coco(truth(boxes), perfect(boxes)).AP == pytest.approx(1)


def test_no_detections_are_zeros() -> None:
    metrics = evaluate_coco(truth(spread(2)), [])
    assert (metrics.AP, metrics.AP50, metrics.AR100, metrics.APm) == (0, 0, 0, 0)
    assert metrics.classes[0].AP == 0
    assert (metrics.curves.f1[0] == 0).all()


@pytest.mark.parametrize("results", [[], [found(0, CAT, [1.0, 1.0, 9.0, 9.0], 0.9)]])
def test_no_ground_truth_is_none(results: list[dict[str, Any]], tmp_path) -> None:
    metrics = evaluate_coco(truth([]), results)
    values = metrics.to_dict()
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert [values[name] for name in names] == [None] * 12
    metrics.save(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(values))


def test_crowds_neither_help_nor_hurt() -> None:
    content = truth(spread(2))
    content["annotations"][1]["iscrowd"] = 1
    results = [found(0, CAT, [0.0, 10.0, 40.0, 40.0], 0.5)]
    results += [found(0, CAT, [62.0 + i, 12.0, 10.0, 10.0], 0.9) for i in range(3)]
    metrics = evaluate_coco(content, results)
    assert metrics.AP == pytest.approx(1)
    assert metrics.boxes == metrics.classes[0].boxes == 1
    counts = confusion_matrix(content, results).counts
    assert counts.sum() == counts[0, 0] == 1


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    boxes, results = [], []
    for image in range(12):
        for _ in range(rng.integers(0, 9)):
            category = int(rng.choice([CAT, DOG]))
            corner, size = rng.uniform(0, 300, 2), np.exp(rng.uniform(2.5, 5.5, 2))
            boxes.append((image, category, [*corner.tolist(), *size.tolist()]))
            for _ in range(rng.integers(0, 3)):
                moved = np.concatenate([corner, size]) + rng.normal(size=4) * np.tile(size, 2) * 0.1
                seen = int(rng.choice([category, category, category, FISH]))
                results.append(found(image, seen, moved.tolist(), float(rng.uniform())))
    content = truth(boxes, images=12)
    for annotation in content["annotations"]:
        annotation["id"] += 1
        annotation["iscrowd"] = int(rng.uniform() < 0.1)
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3] * rng.uniform(0.5, 1)
    return content, results


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_pycocotools(seed: int) -> None:
    content, results = random_case(seed)
    before = copy.deepcopy((content, results))
    metrics = evaluate_coco(content, results, image_ids=range(12))
    assert (content, results) == before
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        expected = COCOeval(coco, coco.loadRes(results), "bbox")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    ours = list(metrics.to_dict().values())[:12]
    assert [-1.0 if value is None else value for value in ours] == expected.stats.tolist()
    classes = [c.AP for c in metrics.classes if c.AP is not None]
    assert np.mean(classes) == pytest.approx(metrics.AP)
    assert np.nanmean(metrics.curves.precision) == pytest.approx(metrics.AP50)


def test_f1_agrees_with_the_precision_recall_curve() -> None:
    content, results = random_case(9)
    curves = evaluate_coco(content, results).curves
    for k in range(2):
        precision, recall = curves.precision[k], curves.recall
        bound = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        # F1 over all thresholds cannot pass the best point of the (upper) curve by more than the
        # distance between two of its recalls, and comes close to it
        assert bound - 0.05 < curves.f1[k].max() < bound + 0.01


def test_file_or_content(tmp_path) -> None:
    boxes = spread(3)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth(boxes)))
    assert evaluate_coco(path, perfect(boxes)) == evaluate_coco(truth(boxes), perfect(boxes))
    assert evaluate_coco(str(path), perfect(boxes)).AP == pytest.approx(1)


def test_prints_nothing(capsys) -> None:
    evaluate_coco(truth(spread(1)), [])
    evaluate_coco(truth([]), [])
    assert capsys.readouterr() == ("", "")


def test_table() -> None:
    boxes = spread(2)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(evaluate_coco(truth(boxes), perfect(boxes[:1])).table())
    text = console.export_text()
    assert "3 images, 2 boxes, 1 detections" in text
    assert "50.5" in text  # AP of one of two boxes: 51 / 101
    assert [line.split("│")[1:5] for line in text.splitlines() if "fish" in line] == [
        [" fish  ", "    - ", "    - ", "     0 "]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "results: image_id must be one of the annotation file's, got 99"),
        ({"category_id": 1}, "results: category_id must be one of .* got 1"),
        ({"bbox": [1.0, 2.0, float("nan"), 4.0]}, "entry 0 .*4 finite numbers"),
        ({"bbox": [1.0, 2.0, 3.0]}, "entry 0 .*4 finite numbers"),
        ({"score": float("inf")}, "entry 0 .*a finite one"),
        ({"score": None}, "entry 0 is malformed"),
    ],
)
def test_bad_results(change: dict[str, Any], message: str) -> None:
    result = found(0, CAT, [1.0, 2.0, 3.0, 4.0], 0.5) | change
    for evaluate in (evaluate_coco, confusion_matrix):
        with pytest.raises(EvaluationError, match=message):
            evaluate(truth(spread(1)), [result])


def test_bad_ground_truth(tmp_path) -> None:
    with pytest.raises(EvaluationError, match="ground_truth: category_id must be .* got 4"):
        evaluate_coco(truth([(0, 4, [1.0, 1.0, 2.0, 2.0])]), [])
    with pytest.raises(EvaluationError, match="not COCO annotations: there is no 'categories'"):
        evaluate_coco({"images": [], "annotations": []}, [])
    path = tmp_path / "broken.json"
    path.write_text('{"images": [')
    with pytest.raises(EvaluationError, match=r"broken\.json: not a JSON file: .*line 1"):
        evaluate_coco(path, [])


def test_images_must_be_those_of_the_file() -> None:
    with pytest.raises(EvaluationError, match="got 1 too few and 2 unknown"):
        evaluate_coco(truth([]), [], image_ids=[0, 2, 8, 9])


def test_confusion_by_hand() -> None:
    boxes = [
        (0, CAT, [0.0, 0.0, 10.0, 10.0]),
        (0, DOG, [100.0, 0.0, 10.0, 10.0]),
        (0, DOG, [200.0, 0.0, 10.0, 10.0]),
        (1, FISH, [0.0, 0.0, 10.0, 10.0]),
    ]
    results = [
        found(0, CAT, [0.0, 0.0, 10.0, 10.0], 0.9),  # right
        found(0, DOG, [1.0, 0.0, 10.0, 10.0], 0.8),  # the cat's box is taken: nothing there
        found(0, CAT, [100.0, 0.0, 10.0, 10.0], 0.3),  # dog taken for a cat, just sure enough
        found(0, DOG, [200.0, 0.0, 10.0, 10.0], 0.29),  # not sure enough: this dog is missed
        found(1, FISH, [0.0, 0.0, 10.0, 4.9], 0.9),  # IoU 0.49: nothing there, and fish missed
        found(2, CAT, [0.0, 0.0, 10.0, 10.0], 0.9),  # image without boxes
    ]
    confusion = confusion_matrix(truth(boxes), results)
    assert confusion.names == ("cat", "dog", "fish")
    assert confusion.counts.tolist() == [
        # cat dog fish missed
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 1],
        [1, 1, 1, 0],
    ]
    lower = confusion_matrix(truth(boxes), results, iou_threshold=0.49, score_threshold=0.2).counts
    assert lower.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    assert json.loads(json.dumps(confusion.to_dict()))["counts"] == confusion.counts.tolist()


def test_confusion_prefers_the_larger_overlap() -> None:
    boxes = [(0, CAT, [0.0, 0.0, 10.0, 10.0]), (0, DOG, [2.0, 0.0, 10.0, 10.0])]
    results = [
        found(0, DOG, [1.9, 0.0, 10.0, 10.0], 0.9),
        found(0, CAT, [1.9, 0.0, 10.0, 10.0], 0.8),  # the dog is taken, the cat overlaps 0.68
    ]
    counts = confusion_matrix(truth(boxes), results).counts
    assert counts[0, 0] == counts[1, 1] == 1 and counts.sum() == 2


def test_confusion_counts_every_box_and_detection_once() -> None:
    for seed in range(5):
        content, results = random_case(seed)
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 0
        counts = confusion_matrix(content, results, score_threshold=0.0).counts
        assert counts[:-1].sum() == len(content["annotations"])
        assert counts[:, :-1].sum() == len(results)
