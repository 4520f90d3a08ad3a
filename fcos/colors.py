"""The colours of classes, the same in pictures and in plots."""

from __future__ import annotations

import functools

import numpy as np

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
_COLORS = 256  # distinct colours; further classes start again


@functools.cache
def _palette() -> tuple[Color, ...]:
    """Colours of which each is as far from all those before it as the gamut allows.

    Distances are taken in OKLab (https://bottosson.github.io/posts/oklab/), where equal distances
    look about equally different. Greys and very dark or very light colours are left out: greys
    vanish in photographs, white is the colour of ground truth, and neon hurts.
    """
    steps = np.linspace(0, 255, 18).round()
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 0.55) & (lab[:, 0] < 0.86) & (chroma > 0.10) & (chroma < 0.25)
    rgb, lab = rgb[usable], lab[usable]
    # lightness counts half: on a picture, hue is what the eye tells apart
    lab = lab * np.array([0.5, 1.0, 1.0])
    first = int(np.argmin(np.abs(rgb - np.array([255, 64, 64])).sum(1)))
    distance = np.full(len(rgb), np.inf)
    chosen = [first]
    while len(chosen) < _COLORS:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return tuple((int(r), int(g), int(b)) for r, g, b in rgb[chosen])


def _oklab(rgb: np.ndarray) -> np.ndarray:
    lms_of_rgb = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab_of_lms = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(_linear(rgb) @ lms_of_rgb.T) @ lab_of_lms.T


def _linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 to linear light in 0..1 (IEC 61966-2-1)."""
    value = rgb / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def class_color(label: int) -> Color:
    """RGB of a class: always the same for a label, and well apart from other labels'."""
    return _palette()[label % _COLORS]


def text_color(background: Color) -> Color:
    """Black or white, whichever stands out more (contrast ratio of WCAG 2)."""
    luminance = float(_linear(np.array(background)) @ np.array([0.2126, 0.7152, 0.0722]))
    return WHITE if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else BLACK
