"""Any picture file to an 8-bit RGB tensor, upright."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_ORIENTATION = 0x0112  # the EXIF tag
# EXIF 2.32, 4.6.4 A: how the stored picture is turned to stand upright, for each orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on broken files; they have no common base class.
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""


def read_image(path: str | PathLike[str]) -> Tensor:
    """Decodes a picture.

    Grey, palette and CMYK pictures become RGB. 16-bit grey is scaled to 8 bits (65535 becomes
    255). Transparency is dropped and the colours under it are kept, as OpenCV does. The rotation
    in the EXIF data is applied. Of an animation, the first frame is read.

    Args:
        path (str | PathLike): The file.

    Returns:
        Tensor[3, H, W]: uint8, RGB.

    Raises:
        ImageError: The file is missing, truncated, not a picture, or has values without a
            known white (32-bit integers, floating point).
    """
    with _opened(path) as image:
        image.load()
        # After load(): Pillow has turned TIFF files itself by then, and no longer says otherwise.
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _eight_bit(image, path)
        pixels = torch.from_numpy(np.array(rgb if turn is None else rgb.transpose(turn)))
    return pixels.permute(2, 0, 1).contiguous()


def image_size(path: str | PathLike[str]) -> tuple[int, int]:
    """(height, width) in pixels that `read_image` would return, read from the header alone.

    Raises:
        ImageError: The file is missing or not a picture.
    """
    with _opened(path) as image:
        width, height = image.size
        # Pillow gives the upright size of TIFF files, the stored size of all others.
        if image.format != "TIFF" and _orientation(image) >= 5:
            return width, height
        return height, width


def exif_orientation(path: str | PathLike[str]) -> int:
    """The EXIF orientation of a picture, 1 to 8; from 5 on, height and width change places.

    Raises:
        ImageError: The file is missing or not a picture.
    """
    with _opened(path) as image:
        return _orientation(image)


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[Image.Image]:
    """The opened file; what Pillow raises meanwhile becomes an ImageError, its warnings nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except Image.UnidentifiedImageError as error:
        kind = "an empty file" if not Path(path).stat().st_size else "not a picture Pillow can read"
        raise ImageError(f"{path}: {kind}") from error
    except _DECODING_ERRORS as error:
        raise ImageError(f"{path}: cannot be decoded: {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DECODING_ERRORS:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if value in _UPRIGHT else 1


def _eight_bit(image: Image.Image, path: str | PathLike[str]) -> Image.Image:
    """RGB, 8 bits a channel. Pillow's own conversion clips 16-bit grey at 255."""
    if image.mode == "F":
        raise ImageError(f"{path}: floating-point pixels have no known white; store 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(
                f"{path}: 32-bit pixels have no known white; store 8 or 16 bits, "
                f"got values in {grey.min()}..{grey.max()}"
            )
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("P", "PA"):  # by way of RGBA: a palette may hold transparent colours
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
