"""Detections of pictures, folders and videos."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fcos.config import Config
from fcos.data.images import read_image
from fcos.data.padding import pad_images
from fcos.data.transforms import prepare_image
from fcos.detections import Detections
from fcos.detector import Detector
from fcos.draw import Picture, to_pil
from fcos.inference import InferencePass
from fcos.postprocess import PaddedDetections
from fcos.sources import find_files, is_video
from fcos.video import Frame, VideoError, VideoReader, VideoWriter

Source = str | Path | Picture
Key = TypeVar("Key")


@dataclass(frozen=True)
class VideoResult:
    """What became of a video."""

    frames: int
    seconds: float
    """Time it took to decode, detect, draw and encode."""

    @property
    def frames_per_second(self) -> float:
        """Frames worked through per second."""
        return self.frames / self.seconds


class Predictor:
    """Finds objects in pictures with a trained network.

    Args:
        network: Images [N, 3, H, W] to outputs; it is moved to the device and put in eval mode.
        config: The settings that the network was trained with.
        class_names: Name of each class, by label.
        category_ids: Id of each class in the annotation file; for ``Detections.to_coco``.
        device: As torch names it, or "auto": the GPU if there is one.
        amp: "bf16" runs the network under bfloat16 autocast, "none" in the precision of its
            weights.
        compile: ``torch.compile`` it all. The first picture takes minutes then; for many.
        graph: Record it all as a CUDA graph for each shape of batch. Pictures are padded to a few
            shapes; the CPU has nearly nothing left to do, which tells with small batches.

    Raises:
        ValueError: There is no class name, or not one category id per class.
        fcos.config.ConfigError: ``graph`` without a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        class_names: Sequence[str],
        category_ids: Sequence[int] = (),
        device: str | torch.device = "auto",
        *,
        amp: str = "none",
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        if not class_names:
            raise ValueError("Predictor: class_names must not be empty")
        if category_ids and len(category_ids) != len(class_names):
            raise ValueError(
                f"Predictor: category_ids must have one id per class ({len(class_names)}), "
                f"got {len(category_ids)}"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.inference = InferencePass(
            network, config, self.device, amp=amp, compile=compile, graph=graph
        )
        self.config = config
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)

    @property
    def detector(self) -> Detector:
        """Network and post-processing in one module: what ``torch.export`` takes."""
        return self.inference.detector

    def predict(
        self,
        source: Source | Sequence[Source],
        score_threshold: float = 0.5,
        batch_size: int = 1,
    ) -> Detections | list[Detections]:
        """Detections of one picture or of several.

        Args:
            source: A picture: a path, a PIL image, a uint8 ndarray [H, W, 3] or a uint8 tensor
                [3, H, W], all in RGB. Several: a folder, a pattern such as ``"shots/*.jpg"``, a
                video, or a list of any of these. Paths are read upright, as their EXIF data says.
            score_threshold: Lowest score that is kept. Below ``postprocess.score_threshold`` of the
                settings there is nothing to keep.
            batch_size: Pictures that go through the network together. Those of different shapes are
                padded to a common one, which changes scores near the padding a little.

        Returns:
            ``Detections`` for one picture; a list, in order, for anything that may hold several.

        Raises:
            ValueError: A source is no picture, or stands for no file; the message names it.
        """
        detections = list(self.stream(source, score_threshold, batch_size))
        return detections[0] if _is_picture(source) else detections

    def stream(
        self,
        source: Source | Sequence[Source],
        score_threshold: float = 0.5,
        batch_size: int = 1,
    ) -> Iterator[Detections]:
        """As ``predict``, one picture at a time, holding no more than a batch in memory."""
        numbered = enumerate(_pictures(source))
        for _, _, detections in self.detect(numbered, score_threshold, batch_size):
            yield detections

    def predict_video(
        self,
        source: str | Path,
        output: str | Path | None = None,
        *,
        score_threshold: float = 0.5,
        batch_size: int = 4,
        on_frame: Callable[[Frame, Detections], None] | None = None,
    ) -> VideoResult:
        """Detect in each frame of a video and draw the detections into a new video.

        The new video has the frame rate, time stamps and size of the source (made even, see
        ``VideoWriter``), no audio, and appears only when complete.

        Args:
            source: Any video file that FFmpeg can decode.
            output: The MP4 to write; None: only detect.
            score_threshold: Lowest score that is kept.
            batch_size: Frames that go through the network together.
            on_frame: Called with each frame and its detections, in order.

        Raises:
            VideoError: The source cannot be decoded, or the output not written or is the source.
        """
        if output is not None and Path(output).resolve() == Path(source).resolve():
            raise VideoError(f"{output}: the drawn video must not replace its source")
        start = time.perf_counter()
        frames = 0
        with ExitStack() as files:
            reader = files.enter_context(VideoReader(source))
            writer = None
            if output is not None:
                writer = files.enter_context(VideoWriter(output, reader.rate, reader.time_base))
            pictures = ((frame, _to_tensor(frame.image)) for frame in reader)
            for frame, _, detections in self.detect(pictures, score_threshold, batch_size):
                if writer is not None:
                    writer.write(detections.plot(frame.image), frame.pts)
                if on_frame is not None:
                    on_frame(frame, detections)
                frames += 1
        return VideoResult(frames, time.perf_counter() - start)

    def detect(
        self, pictures: Iterable[tuple[Key, Tensor]], score_threshold: float, batch_size: int
    ) -> Iterator[tuple[Key, Tensor, Detections]]:
        """Detections of pictures that are already in memory, each under a key of the caller's.

        Args:
            pictures: Pairs of any key and a uint8 tensor [3, H, W]; taken a batch at a time.
            score_threshold: Lowest score that is kept.
            batch_size: Pictures that go through the network together.

        Yields:
            Key, picture and its detections, in the order of the pictures.

        Raises:
            ValueError: ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        pictures = iter(pictures)
        while batch := list(islice(pictures, batch_size)):
            sizes = [(image.shape[1], image.shape[2]) for _, image in batch]
            prepared = [prepare_image(image, self.config.data) for _, image in batch]
            images, image_sizes = pad_images(
                prepared, self.inference.shapes, self.config.data.padding
            )
            padded = self._detect(images, image_sizes, torch.tensor(sizes))
            for i, (key, image) in enumerate(batch):
                detections = Detections.from_padded(padded, i, self.class_names, sizes[i])
                yield key, image, detections.filter(score_threshold)

    def _detect(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor
    ) -> PaddedDetections:
        """As ``inference``, with the results on the CPU."""
        padded = self.inference(images, image_sizes, original_sizes)
        return PaddedDetections(*(field.cpu() for field in padded))


def _is_picture(source: Source | Sequence[Source]) -> bool:
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        return path.is_file() and not is_video(path)
    return isinstance(source, (Image.Image, np.ndarray, Tensor))


def _pictures(source: Source | Sequence[Source]) -> Iterator[Tensor]:
    """The pictures that a source stands for, as uint8 tensors [3, H, W], read one by one."""
    if isinstance(source, (str, Path)):
        for path in find_files(source):
            if is_video(path):
                with VideoReader(path) as reader:
                    yield from (_to_tensor(frame.image) for frame in reader)
            else:
                yield read_image(path)
    elif isinstance(source, (Image.Image, np.ndarray, Tensor)):
        yield _to_tensor(source)
    else:
        for one in source:
            yield from _pictures(one)


def _to_tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(np.array(to_pil(picture))).permute(2, 0, 1)
