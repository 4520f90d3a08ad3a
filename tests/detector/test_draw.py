"""Pixels of drawn boxes, and pictures in a grid."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fcos.colors import BLACK, WHITE, class_color, text_color
from fcos.data.batches import Sample, collate
from fcos.draw import draw_batch, draw_boxes, draw_truth, mosaic, to_pil, unnormalize

GREY = (90, 90, 90)


def grey(width: int = 64, height: int = 48) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def drawn_extent(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (first and last) of the pixels that are no longer grey."""
    ys, xs = np.nonzero((np.asarray(image) != GREY).any(axis=2))
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def test_outline_covers_the_box_and_nothing_else() -> None:
    picture = grey()
    boxes = torch.tensor([[10.0, 12.0, 30.0, 40.0]])
    drawing = draw_boxes(picture, boxes, torch.tensor([5]), line_width=2)
    assert drawn_extent(drawing) == (10, 12, 29, 39)
    pixels = np.asarray(drawing)
    assert tuple(pixels[12, 10]) == tuple(pixels[39, 29]) == tuple(pixels[20, 11]) == class_color(5)
    assert tuple(pixels[20, 12]) == GREY  # two pixels wide, inwards
    assert drawn_extent(picture.point(lambda v: v + 1)) == (0, 0, 63, 47)
    assert np.asarray(picture).max() == 90  # the picture given is left as it was


@pytest.mark.parametrize(
    "box",
    [
        [-50.0, -50.0, 500.0, 500.0],
        [60.0, 44.0, 90.0, 90.0],
        [0.0, 0.0, 3.0, 2.0],
        [63.4, 47.4, 63.6, 47.6],
        [200.0, 200.0, 300.0, 300.0],
        [30.0, 30.0, 20.0, 20.0],
    ],
)
def test_boxes_and_captions_stay_inside(box: list[float]) -> None:
    label, score = torch.tensor([0]), torch.tensor([0.5])
    drawing = draw_boxes(grey(), torch.tensor([box]), label, score, ["a rather long name"])
    assert drawing.size == (64, 48)
    drawing = draw_truth(drawing, torch.tensor([box]), label)
    assert drawing.size == (64, 48)


def test_boxes_that_are_not_finite_are_left_out() -> None:
    boxes = torch.tensor([[1.0, 1.0, float("nan"), 9.0], [1.0, 1.0, float("inf"), 9.0]])
    assert np.asarray(draw_boxes(grey(), boxes)).max() == 90


def test_caption_stands_above_or_else_inside() -> None:
    label, score = torch.tensor([1]), torch.tensor([0.5])
    picture = grey(200, 160)
    above = draw_boxes(
        picture, torch.tensor([[20.0, 60.0, 180.0, 150.0]]), label, score, ("", "dog")
    )
    left, top, _, _ = drawn_extent(above)
    assert left == 20 and 30 < top < 55
    inside = draw_boxes(
        picture, torch.tensor([[20.0, 2.0, 180.0, 150.0]]), label, score, ("", "dog")
    )
    assert drawn_extent(inside) == (20, 2, 179, 149)
    right = draw_boxes(
        picture, torch.tensor([[190.0, 60.0, 199.0, 90.0]]), label, score, ("", "dog")
    )
    filled = (np.asarray(right)[:60] == class_color(1)).all(axis=2)
    assert filled.any() and drawn_extent(right)[2] == 199  # moved left to fit
    bare = draw_boxes(
        picture, torch.tensor([[20.0, 60.0, 180.0, 150.0]]), label, score, captions=False
    )
    assert drawn_extent(bare) == (20, 60, 179, 149)


def test_caption_says_name_and_score() -> None:
    def caption(name: str, score: float) -> bytes:
        box, label = torch.tensor([[20.0, 60.0, 180.0, 150.0]]), torch.tensor([0])
        return draw_boxes(grey(200, 160), box, label, torch.tensor([score]), [name]).tobytes()

    texts = [caption("cat", 0.25), caption("dog", 0.25), caption("cat", 0.75)]
    assert len(set(texts)) == 3
    assert caption("cat", 0.25) == texts[0]
    caption("猫 é\n", 0.5)  # letters that the font lacks are no reason to fail


def test_best_box_is_on_top() -> None:
    boxes = torch.tensor([[10.0, 10.0, 40.0, 40.0]]).repeat(2, 1)
    labels, scores = torch.tensor([3, 4]), torch.tensor([0.9, 0.4])
    drawing = draw_boxes(grey(), boxes, labels, scores, captions=False)
    assert drawing.getpixel((10, 10)) == class_color(3)


def test_line_grows_with_the_picture() -> None:
    def line(size: int) -> int:
        box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size
        drawing = draw_boxes(grey(size, size), box)
        row = (np.asarray(drawing)[size // 2] != GREY).any(axis=1)
        return int(row[: size // 2].sum())

    assert [line(64), line(500), line(2000)] == [1, 2, 8]


def test_truth_is_dashed_in_white_and_the_class_colour() -> None:
    box = torch.tensor([[4.0, 4.0, 60.0, 44.0]])
    drawing = draw_truth(grey(), box, torch.tensor([2]), line_width=1)
    assert drawn_extent(drawing) == (4, 4, 59, 43)
    edge = {drawing.getpixel((x, 4)) for x in range(4, 60)}
    assert edge == {WHITE, class_color(2)}
    assert drawing.getpixel((30, 20)) == GREY


def test_colours_differ_and_stay() -> None:
    colors = [class_color(label) for label in range(256)]
    assert len(set(colors)) == 256
    assert class_color(256) == colors[0]
    # of the first twelve, any two differ by a fifth of the range in some channel
    for a, b in itertools.combinations(colors[:12], 2):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 50
    assert colors[:2] == [class_color(0), class_color(1)]


def test_text_can_be_read_on_every_colour() -> None:
    assert text_color((255, 255, 0)) == BLACK
    assert text_color((0, 0, 160)) == WHITE

    def luminance(color: tuple[int, int, int]) -> float:  # WCAG 2.2
        parts = [c / 255 for c in color]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for label in range(256):
        dark, light = sorted(
            luminance(c) for c in (class_color(label), text_color(class_color(label)))
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's level AA


def test_to_pil() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (array, array[:, ::-1][:, ::-1], tensor, Image.fromarray(array)):
        assert (np.asarray(to_pil(image)) == array).all()
    assert to_pil(Image.new("LA", (3, 2))).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 7), np.uint8), r"uint8 \[H, W, 3\] in RGB, got uint8 \[5, 7\]"),
        (np.zeros((5, 7, 3), np.float32), r"got float32 \[5, 7, 3\]"),
        (torch.zeros(5, 7, 3, dtype=torch.uint8), r"uint8 \[3, H, W\] in RGB, got .*\[5, 7, 3\]"),
        (torch.zeros(3, 5, 7), r"got torch.float32 \[3, 5, 7\]"),
        (Image.new("I;16", (3, 2)), "8 bits a channel, got a PIL image of I;16"),
    ],
)
def test_to_pil_errors(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_pil(image)  # type: ignore[arg-type]


def test_to_pil_of_something_else() -> None:
    with pytest.raises(TypeError, match="got str"):
        to_pil("picture.jpg")  # type: ignore[arg-type]


def test_unnormalize_undoes_normalisation() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    normalised = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert torch.equal(unnormalize(normalised, mean, std), image)
    assert unnormalize(normalised * 9, mean, std).max() == 255  # clamped, not wrapped


def test_mosaic() -> None:
    images = [
        Image.new("RGB", size, color)
        for size, color in [((20, 10), "red"), ((10, 20), "lime"), ((40, 20), "blue")]
    ]
    sheet = mosaic(images, columns=2, cell=(20, 20), gap=4)
    assert sheet.size == (44, 44)
    assert sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((10, 2)) == (32, 32, 32)  # wide picture: bars above and below
    assert sheet.getpixel((34, 10)) == (0, 255, 0)
    assert sheet.getpixel((25, 10)) == (32, 32, 32)
    assert sheet.getpixel((10, 34)) == (0, 0, 255)  # reduced to fit
    assert sheet.getpixel((34, 34)) == (32, 32, 32)
    assert mosaic(images).size == (2 * 40 + 4, 2 * 20 + 4)
    assert mosaic(images[:1], columns=5).size == (20, 10)


def test_mosaic_errors() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        mosaic([])
    with pytest.raises(ValueError, match="must be positive, got 0"):
        mosaic([grey()], columns=0)


def test_draw_batch_shows_each_image_without_padding() -> None:
    mean = std = (0.5, 0.5, 0.5)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 18.0]])
    samples = [
        Sample(torch.full((3, 24, 40), 1.0), boxes, torch.tensor([1]), 1, (24, 40)),
        Sample(
            torch.full((3, 40, 24), -1.0), torch.zeros(0, 4), torch.zeros(0).long(), 2, (40, 24)
        ),
    ]
    sheet = draw_batch(collate(samples), ["a", "b"], mean, std)
    assert sheet.size == (2 * 40 + 4, 40)
    assert sheet.getpixel((39, 20)) == (255, 255, 255)
    assert sheet.getpixel((2, 8 + 17)) == class_color(1)  # the first image starts 8 pixels down
    assert sheet.getpixel((64, 20)) == (0, 0, 0)
    assert sheet.getpixel((47, 20)) == (32, 32, 32)  # beside the narrow one: background
    assert draw_batch(collate(samples), ["a", "b"], mean, std, limit=1).size == (40, 24)
