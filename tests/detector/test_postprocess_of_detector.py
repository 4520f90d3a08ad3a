"""Decoding and selection: outputs made by hand, and a second implementation, slow and simple."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from fcos.config import ModelConfig, PostprocessConfig
from fcos.model import Predictions
from fcos.postprocess import PaddedDetections, postprocess

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDES = (8, 16, 32)
MODEL = ModelConfig(
    num_classes=2,
    strides=STRIDES,
    size_ranges=((0, 64), (64, 128), (128, math.inf)),
    normalize_ltrb=False,
)
SIZE = (64, 96)  # height, width


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def silence(images: int = 1, classes: int = 2, size: tuple[int, int] = SIZE) -> Predictions:
    """Outputs without a single score above 0.00005."""
    shapes = [(size[0] // s, size[1] // s) for s in STRIDES]
    return Predictions(
        [torch.full((images, classes, h, w), -10.0) for h, w in shapes],
        [torch.ones(images, 4, h, w) for h, w in shapes],
        [torch.zeros(images, 1, h, w) for h, w in shapes],
    )


def put(
    outputs: Predictions,
    level: int,
    y: int,
    x: int,
    ltrb: tuple[float, ...],
    score: float,
    label: int = 0,
    centerness: float = 0.5,
    image: int = 0,
) -> None:
    outputs.logits[level][image, label, y, x] = logit(score)
    outputs.ltrb[level][image, :, y, x] = torch.tensor(ltrb)
    outputs.centerness[level][image, 0, y, x] = logit(centerness)


def run(
    outputs: Predictions,
    model: ModelConfig = MODEL,
    size: tuple[int, int] = SIZE,
    original: tuple[int, int] | None = None,
    **settings: Any,
) -> PaddedDetections:
    images = len(outputs.logits[0])
    sizes = torch.tensor([size] * images)
    originals = torch.tensor([original or size] * images)
    return postprocess(outputs, sizes, originals, model, PostprocessConfig(**settings))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("level", "y", "x", "center"),
    [(0, 2, 3, (28, 20)), (1, 1, 2, (40, 24)), (2, 1, 1, (48, 48))],
)
def test_decoding(level: int, y: int, x: int, center: tuple[int, int], normalize: bool) -> None:
    ltrb = (12.0, 10.0, 9.0, 13.0)
    outputs = silence()
    unit = STRIDES[level] if normalize else 1
    put(outputs, level, y, x, tuple(d / unit for d in ltrb), 0.81, label=1, centerness=0.25)
    found = run(outputs, replace(MODEL, normalize_ltrb=normalize))
    assert found.counts.tolist() == [1]
    px, py = center
    torch.testing.assert_close(
        found.boxes[0, 0], torch.tensor([px - 12.0, py - 10.0, px + 9.0, py + 13.0])
    )
    assert found.labels[0, 0] == 1
    assert found.scores[0, 0].item() == pytest.approx(0.9 * 0.5)  # sqrt(0.81 * 0.25)


def test_score_product() -> None:
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.8, centerness=0.3)
    assert run(outputs, score="product").scores[0, 0].item() == pytest.approx(0.24)


def test_clipping_and_rescaling() -> None:
    """The image fills 60 x 80 of the padded 64 x 96, and its file is 120 x 240."""
    outputs = silence()
    put(outputs, 0, 0, 0, (30, 30, 16, 6), 0.9)  # at (4, 4)
    put(outputs, 2, 1, 2, (20, 8, 99, 99), 0.8)  # at (80, 48), on the border
    found = run(outputs, size=(60, 80), original=(120, 240))
    expected = torch.tensor([[0, 0, 20 * 3, 10 * 2], [60 * 3, 40 * 2, 240, 120.0]])
    torch.testing.assert_close(found.boxes[0, :2], expected)


def test_boxes_in_the_padding_vanish() -> None:
    outputs = silence()
    put(outputs, 0, 0, 11, (2, 2, 4, 4), 0.9)  # at (92, 4), in the padding of an 80 px image
    put(outputs, 0, 0, 0, (0, 0, 0, 4), 0.9)  # without a width
    assert run(outputs, size=(60, 80)).counts.tolist() == [0]


def test_threshold_is_on_the_class_score_before_the_centerness() -> None:
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.06, centerness=0.01)  # score 0.024, kept
    put(outputs, 0, 4, 4, (4, 4, 4, 4), 0.049, centerness=0.99)  # score 0.22, dropped
    found = run(outputs)
    assert found.counts.tolist() == [1]
    assert found.scores[0, 0].item() == pytest.approx(math.sqrt(0.06 * 0.01))
    # "up to this one are dropped": sigmoid(0) is 0.5 exactly
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.5)
    assert run(outputs, score_threshold=0.5).counts.tolist() == [0]
    assert run(outputs, score_threshold=0.4999).counts.tolist() == [1]


def test_one_location_can_have_two_classes() -> None:
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.9, label=0)
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.7, label=1)
    found = run(outputs)
    assert found.counts.tolist() == [2]  # other classes do not suppress
    assert found.labels[0, :2].tolist() == [0, 1]


def test_topk_is_per_level_and_image() -> None:
    outputs = silence(images=2)
    for image in range(2):
        for i in range(4):
            put(outputs, 0, 0, 2 * i, (3, 3, 3, 3), 0.5 + 0.01 * i, image=image)
            if i < 3:
                put(outputs, 2, i // 2, i % 2, (3, 3, 3, 3), 0.8 - 0.1 * i, image=image)
    found = run(outputs, topk_candidates=2, score="product")
    assert found.counts.tolist() == [4, 4]
    expected = torch.tensor([0.8, 0.7, 0.53, 0.52]) * 0.5
    torch.testing.assert_close(found.scores[:, :4], expected.expand(2, 4))


def test_max_detections_and_padding() -> None:
    outputs = silence(images=2)
    for i in range(5):
        put(outputs, 0, 0, 2 * i, (3, 3, 3, 3), 0.5 + 0.1 * i % 0.4, image=1)
    found = run(outputs, max_detections=3)
    assert found.counts.tolist() == [0, 3]
    assert found.boxes.shape == (2, 3, 4)
    assert (found.labels[0] == -1).all() and not found.scores[0].any() and not found.boxes[0].any()
    assert (found.scores[1].diff() <= 0).all()
    found = run(outputs, max_detections=7)
    assert found.counts.tolist() == [0, 5]
    assert found.labels[1].tolist() == [0] * 5 + [-1] * 2
    assert not found.scores[1, 5:].any() and not found.boxes[1, 5:].any()


def test_ties_go_to_the_first_location_then_class() -> None:
    outputs = silence()
    for y, x in ((5, 9), (5, 8), (0, 3), (0, 2)):
        put(outputs, 0, y, x, (8, 8, 8, 8), 0.75, label=1)
    put(outputs, 0, 0, 2, (8, 8, 8, 8), 0.75, label=0)
    # neighbours overlap by 1/3: of each pair one is kept at a threshold of 0.3
    found = run(outputs, iou_threshold=0.3)
    assert found.labels[0, : found.counts[0]].tolist() == [0, 1, 1]
    corners = found.boxes[0, : found.counts[0], :2].tolist()
    assert corners == [[12, 0], [12, 0], [60, 36]]


def test_many_ties_are_in_order() -> None:
    """topk by itself returns equal scores in any order."""
    outputs = silence(size=(256, 256))
    outputs.logits[0].fill_(1.0)
    outputs.ltrb[0].fill_(0.5)
    found = run(outputs, size=(256, 256), topk_candidates=2048, max_detections=2048)
    assert found.counts.tolist() == [2048]
    order = found.boxes[0, :, 1] * 1000 + found.boxes[0, :, 0] + 0.1 * found.labels[0]
    assert (order.diff() > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_outputs_are_dropped(bad: float) -> None:
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.6)
    put(outputs, 0, 4, 4, (4, 4, bad, 4), 0.9)
    put(outputs, 0, 5, 8, (4, 4, 4, bad), 0.9)
    put(outputs, 1, 1, 1, (bad, 4, 4, 4), 0.9)
    found = run(outputs)
    assert found.counts.tolist() == [1]
    assert found.scores[0, 0].item() == pytest.approx(math.sqrt(0.3))


@pytest.mark.parametrize("topk", [1, 1000])
def test_nan_scores_do_not_displace_others(topk: int) -> None:
    outputs = silence()
    put(outputs, 0, 1, 1, (4, 4, 4, 4), 0.6)
    put(outputs, 0, 4, 4, (4, 4, 4, 4), 0.9)
    put(outputs, 0, 5, 8, (4, 4, 4, 4), 0.9)
    outputs.logits[0][0, 0, 4, 4] = math.nan
    outputs.centerness[0][0, 0, 5, 8] = math.nan
    outputs.centerness[0][0, 0, 7, 11] = math.nan  # without a class score
    found = run(outputs, topk_candidates=topk)
    assert found.counts.tolist() == [1]
    assert found.scores[0, 0].item() == pytest.approx(math.sqrt(0.3))


def test_nothing_at_all() -> None:
    found = run(silence(images=2))
    assert found.counts.tolist() == [0, 0]
    assert found.boxes.shape == (2, 100, 4) and found.labels.dtype == torch.int64
    assert (found.labels == -1).all() and not found.scores.any() and not found.boxes.any()


def slowly(
    outputs: Predictions,
    image: int,
    size: tuple[int, int],
    original: tuple[int, int],
    model: ModelConfig,
    config: PostprocessConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """One image, one candidate at a time."""
    boxes, scores, labels = [], [], []
    for logits, ltrb, centerness, stride in zip(*outputs, model.strides, strict=True):
        candidates = []
        classes, height, width = logits.shape[1:]
        for y in range(height):
            for x in range(width):
                weight = centerness[image, 0, y, x].sigmoid()
                for c in range(classes):
                    score = logits[image, c, y, x].sigmoid()
                    if score > config.score_threshold:
                        d = ltrb[image, :, y, x] * (stride if model.normalize_ltrb else 1)
                        px, py = stride // 2 + stride * x, stride // 2 + stride * y
                        box = torch.stack([px - d[0], py - d[1], px + d[2], py + d[3]])
                        candidates.append((score * weight, box, c))
        candidates.sort(key=lambda candidate: -candidate[0].item())
        for product, box, c in candidates[: config.topk_candidates]:
            scores.append(product)
            boxes.append(box)
            labels.append(c)
    if not boxes:
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    box, score, label = torch.stack(boxes), torch.stack(scores), torch.tensor(labels)
    box = clip_boxes_to_image(box, size)
    has_area = ((box[:, 2:] - box[:, :2]) > 0).all(1)
    box, score, label = box[has_area], score[has_area], label[has_area]
    keep = batched_nms(box, score, label, config.iou_threshold)[: config.max_detections]
    ratio = torch.tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
    final = score[keep].sqrt() if config.score == "sqrt" else score[keep]
    return box[keep] * ratio, final, label[keep]


@pytest.mark.parametrize("case", range(50))
def test_equals_a_slow_second_implementation(case: int) -> None:
    random = torch.Generator().manual_seed(case)

    def draw(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=random))]

    padded = (32 * draw(1, 2), 32 * draw(1, 2, 3))
    sizes = [(padded[0] - draw(0, 5, 17), padded[1] - draw(0, 3, 30)) for _ in range(2)]
    originals = [(draw(50, 64, 301), draw(40, 96, 222)) for _ in range(2)]
    classes, images = draw(1, 2, 5), 2
    model = replace(MODEL, num_classes=classes, normalize_ltrb=draw(True, False))
    config = PostprocessConfig(
        score_threshold=draw(0.05, 0.3, 0.6),
        topk_candidates=draw(5, 20, 1000),
        iou_threshold=draw(0.0, 0.3, 0.6, 1.0),
        max_detections=draw(1, 10, 100),
        score=draw("sqrt", "product"),
    )
    shapes = [(-(-padded[0] // s), -(-padded[1] // s), s) for s in STRIDES]
    outputs = Predictions(
        [torch.randn(images, classes, h, w, generator=random) for h, w, _ in shapes],
        [
            torch.rand(images, 4, h, w, generator=random) * (3 if model.normalize_ltrb else 3 * s)
            for h, w, s in shapes
        ],
        [torch.randn(images, 1, h, w, generator=random) for h, w, _ in shapes],
    )
    found = postprocess(outputs, torch.tensor(sizes), torch.tensor(originals), model, config)
    for image in range(images):
        boxes, scores, labels = slowly(
            outputs, image, sizes[image], originals[image], model, config
        )
        count = int(found.counts[image])
        assert count == len(scores)
        assert found.labels[image, :count].tolist() == labels.tolist()
        torch.testing.assert_close(found.scores[image, :count], scores)
        torch.testing.assert_close(found.boxes[image, :count], boxes, rtol=1e-5, atol=1e-4)
