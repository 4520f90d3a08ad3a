"""Decoding: every kind of picture to upright 8-bit RGB, every bad file to an ImageError."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fcos.data.images import ImageError, exif_orientation, image_size, read_image


@pytest.fixture
def photo():
    """A smooth [20, 30, 3] picture without symmetry."""
    y, x = np.mgrid[:20, :30]
    return np.stack([8 * x, 12 * y, 255 - 4 * (x + y)], axis=2).astype(np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def test_rgb_is_unchanged(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, as_tensor(photo))
    assert image_size(tmp_path / "a.png") == (20, 30)


def test_grey_and_one_bit(tmp_path, photo):
    Image.fromarray(photo[..., 0]).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), as_tensor(photo[..., [0, 0, 0]]))
    Image.fromarray(photo[..., 0] > 100).save(tmp_path / "bit.png")
    expected = np.repeat((photo[..., :1] > 100) * np.uint8(255), 3, axis=2)
    assert torch.equal(read_image(tmp_path / "bit.png"), as_tensor(expected))


def test_transparency_is_dropped(tmp_path, photo):
    alpha = np.full((20, 30, 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([photo, alpha], axis=2)).save(tmp_path / "rgba.png")
    assert torch.equal(read_image(tmp_path / "rgba.png"), as_tensor(photo))
    Image.fromarray(np.concatenate([photo[..., :1], alpha], axis=2)).save(tmp_path / "la.png")
    assert torch.equal(read_image(tmp_path / "la.png"), as_tensor(photo[..., [0, 0, 0]]))


def test_palette_with_transparency_does_not_warn(tmp_path):
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "p.png", transparency=bytes([0, 255, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "p.png")
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    assert torch.equal(image, as_tensor(colors[indices]))


def test_cmyk(tmp_path, photo):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    difference = read_image(tmp_path / "a.jpg").int() - as_tensor(photo).int()
    assert difference.abs().float().mean() < 4  # an inverted picture would differ by 100


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    grey = np.array([[0, 256, 257, 32768, 65535]], dtype=np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 5 1 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(tmp_path / name)
    assert read_image(tmp_path / name)[0].tolist() == [[0, 1, 1, 128, 255]]


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]])])
def test_values_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: .* have no known white"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.array(ImageOps.exif_transpose(stored))
    image = read_image(path)
    assert torch.equal(image, as_tensor(expected))
    assert image_size(path) == tuple(image.shape[1:])
    assert image_size(path) == ((30, 20) if orientation >= 5 else (20, 30))
    assert exif_orientation(path) == orientation


def test_exif_rotation_of_sixteen_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png")[0].tolist() == [[0], [255]]


def test_broken_exif_does_not_matter(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.jpg").shape == (3, 20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp"])
def test_truncated(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: "):
        read_image(path)


def test_not_a_picture(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    for read in (read_image, image_size, exif_orientation):
        with pytest.raises(ImageError, match=r"a\.jpg: not a picture"):
            read(tmp_path / "a.jpg")
        with pytest.raises(ImageError, match=r"empty\.jpg: an empty file"):
            read(tmp_path / "empty.jpg")
        with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
            read(tmp_path / "none.jpg")
        with pytest.raises(ImageError, match="cannot be decoded: .*directory"):
            read(tmp_path)


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(content + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"bomb\.png: cannot be decoded"):
        read_image(tmp_path / "bomb.png")
