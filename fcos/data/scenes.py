"""Draws the pictures of the generated data set: shapes on textured backgrounds, and their boxes.

Shapes are drawn four times too large and averaged down, so their edges are smooth and their boxes
exact to a quarter of a pixel.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")
MIN_SIDE = 16
"""Longer side in pixels of the smallest shape."""

_SCALE = 4  # supersampling
_EMPTY_SCENES = 0.05
_SHAPES = (2, 8)  # tried in a scene that is not empty: at least, and fewer than
_MIN_VISIBLE = 0.6  # of a shape's area: not covered, and not beyond the border
_MAX_BOX_IOU = 0.45  # below the usual thresholds of NMS, so that every box can be found
_MAX_OVERHANG = 24  # pixels of a shape beyond the border
_HUE_SPREAD = 0.06  # of a turn: colour is a hint at the class, which the shape decides
_MAX_TURN = (0, 20, 25, 180, 0, 20)  # degrees, by class; a square on its corner is a diamond

Array = NDArray[np.float32]


@dataclass
class Scene:
    """A picture and what is on it."""

    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    """xyxy pixels, tight to each shape as if nothing covered it, clipped to the picture."""
    labels: list[int] = field(default_factory=list)
    """Indices into CLASS_NAMES."""


@dataclass
class _Stencil:
    """One shape before it has a place."""

    label: int
    mask: Image.Image  # 8-bit grey, supersampled
    edge: Image.Image | None

    def coverage(self, mask: Image.Image) -> Array:
        """[rows, columns, 1] Of `mask` or `edge`: the covered part of each pixel, 0..1."""
        cover: Array = np.asarray(mask.reduce(_SCALE))[..., None] / np.float32(255)
        return cover


def draw_scene(random: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draws one picture.

    Args:
        random (Generator): Decides everything.
        size (tuple): Largest (height, width) in pixels; pictures are square, wide and upright.
    """
    height, width = _picture_size(random, size)
    canvas = _background(random, height, width)
    scene = Scene(np.empty(0, dtype=np.uint8))
    if random.random() >= _EMPTY_SCENES:
        _add_shapes(random, canvas, scene)
    scene.pixels = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return scene


def _picture_size(random: np.random.Generator, size: tuple[int, int]) -> tuple[int, int]:
    scale = random.choice([1.0, random.uniform(0.8, 1)])
    height, width = size[0] * scale, size[1] * scale
    form = random.random()
    if form < 0.3:
        height *= random.uniform(0.65, 0.9)
    elif form < 0.6:
        width *= random.uniform(0.65, 0.9)
    return round(height), round(width)


def _add_shapes(random: np.random.Generator, canvas: Array, scene: Scene) -> None:
    height, width = canvas.shape[:2]
    longest = 0.95 * max(height, width)
    sides = np.exp(random.uniform(math.log(MIN_SIDE), math.log(longest), random.integers(*_SHAPES)))
    if random.random() < 0.3:
        sides[0] = random.uniform(0.6, 1) * longest
    shadow = random.random() < 0.4
    owner = np.zeros((height, width), dtype=np.int64)  # 1 + the topmost shape of each pixel
    areas: list[float] = []
    for side in np.sort(sides)[::-1]:  # the small ones lie on top, so that little is hidden
        stencil = _stencil(random, side, height, width)
        cover = stencil.coverage(stencil.mask)
        rows, columns = cover.shape[:2]
        for _ in range(10):
            top, left = _position(random, rows, height), _position(random, columns, width)
            window = (
                slice(max(0, -top), min(rows, height - top)),
                slice(max(0, -left), min(columns, width - left)),
            )
            place = (
                slice(max(0, top), min(height, top + rows)),
                slice(max(0, left), min(width, left + columns)),
            )
            box = _tight_box(stencil.mask, window, top, left)
            solid = cover[window][..., 0] > 0.5
            if not _fits(owner[place][solid], owner, areas, box, scene, cover):
                continue
            if shadow:
                _cast_shadow(canvas, stencil, top, left)
            paint = _paint(random, stencil, canvas[place].mean(axis=(0, 1)))
            canvas[place] += cover[window] * (paint[window] - canvas[place])
            areas.append(float((cover > 0.5).sum()))
            owner[place][solid] = len(areas)
            scene.boxes.append(box)
            scene.labels.append(stencil.label)
            break


def _position(random: np.random.Generator, side: int, room: int) -> int:
    """Where a shape begins: somewhere inside, or a little over the border."""
    over = min(side // 4, _MAX_OVERHANG)
    return int(random.integers(-over, room - side + over + 1))


def _fits(
    covered: NDArray[np.int64],
    owner: NDArray[np.int64],
    areas: list[float],
    box: tuple[float, float, float, float],
    scene: Scene,
    cover: Array,
) -> bool:
    """Whether the new shape and all the ones under it stay visible and their boxes distinct."""
    if len(covered) < 0.6 * (cover > 0.5).sum():
        return False
    if any(_iou(box, other) > _MAX_BOX_IOU for other in scene.boxes):
        return False
    hidden = np.bincount(covered, minlength=len(areas) + 1)[1:]
    if not hidden.any():
        return True
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:] - hidden
    return bool((visible[hidden > 0] >= _MIN_VISIBLE * np.array(areas)[hidden > 0]).all())


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across * down / (sum(areas) - across * down)


def _tight_box(
    mask: Image.Image, window: tuple[slice, slice], top: int, left: int
) -> tuple[float, float, float, float]:
    rows, columns = window
    area = (columns.start, rows.start, columns.stop, rows.stop)
    found = mask.crop(tuple(value * _SCALE for value in area)).getbbox()
    if found is None:
        return (0, 0, 0, 0)
    x1, y1, x2, y2 = (value / _SCALE for value in found)
    x, y = left + columns.start, top + rows.start
    return (x + x1, y + y1, x + x2, y + y2)


def _stencil(random: np.random.Generator, side: float, height: int, width: int) -> _Stencil:
    label = int(random.integers(len(CLASS_NAMES)))
    turn = math.radians(random.uniform(-1, 1) * _MAX_TURN[label])
    stretch = math.exp(random.uniform(-0.2, 0.2))
    if side > 0.6 * max(height, width):  # else no wide picture could hold a shape as wide
        stretch *= (width / height) ** 0.7
    cos, sin = math.cos(turn), math.sin(turn)
    outlines = [
        points * [stretch, 1] @ np.array([[cos, sin], [-sin, cos]]) for points in _outlines(label)
    ]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    extent = high - low
    factor = min(side / extent.max(), 0.97 * width / extent[0], 0.97 * height / extent[1])
    shift = random.uniform(0, 1, 2)  # the position inside the pixel grid
    columns, rows = (int(value) for value in np.ceil(extent * factor + shift))

    border = 0.0
    if random.random() < 0.5 and side > 20:
        border = max(1.0, float(factor) * random.uniform(0.05, 0.09))
    canvas = (columns * _SCALE, rows * _SCALE)
    mask = Image.new("L", canvas)
    edge = Image.new("L", canvas) if border else None
    for points, value in zip(outlines, (255, 0), strict=False):  # the second one is a hole
        corners = [(float(x), float(y)) for x, y in ((points - low) * factor + shift) * _SCALE]
        ImageDraw.Draw(mask).polygon(corners, fill=value)
        if edge is not None:
            line = ImageDraw.Draw(edge)
            line.line(corners + corners[:2], 255, round(2 * border * _SCALE), joint="curve")
    return _Stencil(label, mask, ImageChops.darker(mask, edge) if edge is not None else None)


def _outlines(label: int) -> list[NDArray[np.float64]]:
    """Corners (x right, y down) of a class's outline, and of its hole if it has one."""
    match CLASS_NAMES[label]:
        case "circle":
            return [_polar(np.ones(96))]
        case "square":
            return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85]
        case "triangle":
            return [_polar(np.ones(3))]
        case "star":
            return [_polar(np.array([1, 0.45] * 5))]
        case "ring":
            return [_polar(np.ones(96)), _polar(np.full(96, 0.55))]
    arm = 0.3
    quarter = np.array([[-arm, -1], [arm, -1], [arm, -arm]])  # of the cross
    turns = [np.eye(2), [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]]]
    return [np.concatenate([quarter @ np.array(turn) for turn in turns])]


def _polar(radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points at even angles around the centre, the first one straight up."""
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _paint(random: np.random.Generator, stencil: _Stencil, under: Array) -> Array:
    """[rows, columns, 3] The shape's colours: plain, shaded or striped, with or without border."""
    for _ in range(8):
        hue = stencil.label / len(CLASS_NAMES) + random.normal(0, _HUE_SPREAD)
        saturation = random.uniform(0.55, 0.95)
        value = random.uniform(0.5, 1)
        color = _rgb(hue, saturation, value)
        if np.linalg.norm(color - under) > 110:  # it must stand out from what lies under it
            break
    columns, rows = (side // _SCALE for side in stencil.mask.size)
    paint = np.broadcast_to(color, (rows, columns, 3)).copy()
    texture = random.random()
    if max(rows, columns) >= 28 and texture < 0.65:
        other = _rgb(hue + random.uniform(-0.08, 0.08), saturation * 0.8, value * 0.7)
        ramp = _ramp(rows, columns, random.uniform(0, 2 * math.pi))
        if texture < 0.25:
            stripes = random.integers(3, 7)
            ramp = np.clip(0.5 + 3 * np.sin(2 * math.pi * stripes * ramp), 0, 1)
        paint += ramp[..., None] * (other - color)
    if stencil.edge is not None:
        line = _rgb(hue, saturation, value * 0.45) if random.random() < 0.7 else 250
        paint += stencil.coverage(stencil.edge) * (line - paint)
    return paint


def _cast_shadow(canvas: Array, stencil: _Stencil, top: int, left: int) -> None:
    """Darkens what lies right below the shape."""
    mask = stencil.mask.reduce(_SCALE)
    blur = 1 + 0.02 * max(mask.size)
    soft = Image.new("L", (canvas.shape[1], canvas.shape[0]))
    soft.paste(mask, (left + round(blur), top + round(1.5 * blur)))
    canvas *= 1 - np.asarray(soft.filter(ImageFilter.BoxBlur(blur)))[..., None] * np.float32(0.0014)


def _background(random: np.random.Generator, height: int, width: int) -> Array:
    hue, value = random.random(), random.uniform(0.15, 0.95)
    first = _rgb(hue, random.uniform(0.05, 0.35), value)
    second = _rgb(hue + random.uniform(-0.15, 0.15), random.uniform(0.05, 0.4),
                  np.clip(value + random.uniform(-0.3, 0.3), 0.1, 1))  # fmt: skip
    ramp = _ramp(height, width, random.uniform(0, 2 * math.pi))
    kind = random.integers(5)
    if kind == 1:  # stripes
        ramp = 0.5 + 0.5 * np.sin(2 * math.pi * random.uniform(3, 14) * ramp)
    elif kind == 2:  # clouds
        cells = random.integers(3, 9, 2)
        noise = Image.fromarray(random.random(cells, dtype=np.float32))
        ramp = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    elif kind == 3:  # tiles
        across = _ramp(height, width, 0) * random.integers(4, 12)
        down = _ramp(height, width, math.pi / 2) * random.integers(4, 12)
        ramp = 0.7 * ramp + 0.3 * ((across.astype(np.int64) + down.astype(np.int64)) % 2)
    elif kind == 4:  # a light spot
        x, y = random.uniform(0.2, 0.8, 2)
        across, down = _ramp(height, width, 0) - x, _ramp(height, width, math.pi / 2) - y
        ramp = np.clip(1.4 * np.sqrt(across**2 + down**2), 0, 1)
    canvas = first + ramp[..., None].astype(np.float32) * (second - first)
    _draw_lines(random, canvas, value)
    if random.random() < 0.3:
        grain = random.standard_normal((height, width, 1), dtype=np.float32)
        canvas += np.float32(random.uniform(1, 4)) * grain
    return canvas


def _draw_lines(random: np.random.Generator, canvas: Array, value: float) -> None:
    """Thin lines that are no object."""
    count = int(random.integers(0, 7))
    if not count:
        return
    height, width = canvas.shape[:2]
    mask = Image.new("L", (width * 2, height * 2))
    draw = ImageDraw.Draw(mask)
    for _ in range(count):
        ends = random.uniform(-0.1, 1.1, (2, 2)) * mask.size
        draw.line([tuple(end) for end in ends.tolist()], 255, int(random.integers(2, 6)))
    ink = _rgb(random.random(), 0.3, value - 0.35 if value > 0.5 else value + 0.35)
    canvas += np.asarray(mask.reduce(2), dtype=np.float32)[..., None] / 320 * (ink - canvas)


def _ramp(height: int, width: int, angle: float) -> Array:
    """[height, width] from 0 to 1 in the direction of `angle`."""
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(math.cos(angle))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(math.sin(angle))
    ramp: Array = (x + y) / np.float32(abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5
    return ramp


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """[3] 0..255"""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32) * 255
