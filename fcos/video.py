"""Frames out of a video file and into one, with FFmpeg through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import av

# The first of these that this build of FFmpeg has. H.264 plays everywhere, but its encoder is GPL
# and left out of some builds.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
# MPEG-4 part 2 stores the units of a second in 16 bits
_MPEG4_LARGEST_DENOMINATOR = 65535


class VideoError(ValueError):
    """A video cannot be read or written."""


@dataclass(frozen=True)
class Frame:
    """One picture of a video."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB, upright."""
    index: int
    pts: int
    """When it is shown, counted from the first frame in units of ``VideoReader.time_base``."""
    time: float
    """The same in seconds."""


class VideoReader:
    """The frames of a video file, decoded as they are asked for.

    Args:
        path: Any file that FFmpeg can decode.

    Raises:
        VideoError: It cannot be opened, or has no pictures. Iterating raises it too, where the
            file breaks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        av = self._av = _pyav(path)
        try:
            self._container = av.open(str(path))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"{path}: cannot be opened as a video: {_reason(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{path}: has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.rate: Fraction = Fraction(rate)
        """Frames a second, on average."""
        self.time_base: Fraction = self._stream.time_base or 1 / self.rate
        """Unit of the time stamps in seconds."""
        self.frames: int | None = self._stream.frames or None
        """How many frames the file says it has, if it does."""

    def __iter__(self) -> Iterator[Frame]:
        first: int | None = None
        last = -1
        index = 0
        step = max(1, round(1 / (self.rate * self.time_base)))
        decoder = self._container.decode(self._stream)
        while True:
            try:
                frame = next(decoder, None)
            except self._av.error.FFmpegError as error:
                raise VideoError(
                    f"{self.path}: cannot be decoded after {index} frames: {_reason(error)}"
                ) from error
            if frame is None:
                break
            pts = frame.pts
            if pts is None:  # raw streams have no time stamps
                pts = last + step if index else 0
            first = pts if first is None else first
            pts = max(pts - first, last + 1)  # an encoder refuses time that runs backwards
            image = _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
            yield Frame(image, index, pts, float(pts * self.time_base))
            last = pts
            index += 1
        if not index:
            raise VideoError(f"{self.path}: has no frames")

    def close(self) -> None:
        """Release the file."""
        self._container.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoWriter:
    """Writes an MP4, H.264 where FFmpeg has the encoder and MPEG-4 part 2 elsewhere.

    A context manager: the file appears under its name when the block ends, and not at all if the
    block raises. Audio is not carried over.

    Args:
        path: Of the new file; one that exists is replaced at the end.
        rate: Frames a second, on average.
        time_base: Unit of the time stamps in seconds.

    Raises:
        VideoError: FFmpeg cannot write it.
    """

    def __init__(self, path: str | Path, rate: Fraction, time_base: Fraction) -> None:
        self.path = Path(path)
        self._rate = rate
        self._time_base = time_base
        self._av = _pyav(path)
        self._encoder = _encoder(self._av)
        self._partial = self.path.with_name(f".{self.path.name}.part")
        self._last = -1
        self._stream: av.VideoStream | None = None
        if self._encoder == "mpeg4" and time_base.denominator > _MPEG4_LARGEST_DENOMINATOR:
            self._time_base = 1 / rate.limit_denominator(1001)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(self._partial), "w", format="mp4")
        self._scale = time_base / self._time_base

    def write(self, picture: Image.Image | np.ndarray, pts: int) -> None:
        """Append a picture.

        Args:
            picture: PIL RGB or uint8 [H, W, 3]. All of one size. Of an odd size, the last row or
                column is doubled, since colour is stored for 2 x 2 pixels.
            pts: When to show it, in units of ``time_base``, later than the one before.
        """
        image = np.asarray(picture)
        image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), "edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if self._stream is None:
            self._stream = self._open_stream(height=image.shape[0], width=image.shape[1])
        self._last = max(round(pts * self._scale), self._last + 1)
        frame.pts = self._last
        frame.time_base = self._time_base
        self._mux(frame)

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        stream: av.VideoStream = self._container.add_stream(self._encoder, rate=self._rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = self._time_base
        if self._encoder == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream.bit_rate = round(height * width * float(self._rate) * 0.2)
        return stream

    def _mux(self, frame: av.VideoFrame | None) -> None:
        if self._stream is None:
            return
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self.path}: cannot be written: {_reason(error)}") from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with closing(self._container):
                if kind is None:
                    self._mux(None)
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def _pyav(path: str | Path) -> Any:
    """PyAV, which only videos need: it is not installed with the rest."""
    try:
        import av
    except ImportError as error:
        raise VideoError(f"{path}: videos need PyAV: pip install 'fcos[video]'") from error
    return av


def _encoder(av: Any) -> str:
    for name in _ENCODERS:
        try:
            return av.codec.Codec(name, "w").name
        except av.codec.codec.UnknownCodecError:
            continue
    raise VideoError(f"this build of FFmpeg has no encoder of {', '.join(_ENCODERS)}")


def _upright(image: np.ndarray, rotation: int) -> np.ndarray:
    """Turn a frame as its file says it is to be shown; telephones film everything sideways."""
    turns = round(rotation / 90) % 4  # rotation is counterclockwise, as np.rot90 is
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
