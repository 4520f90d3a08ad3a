"""Drawn copies of files with their detections, and one JSON file of all detections."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fcos.data.images import ImageError, read_image
from fcos.detections import Detections
from fcos.predict import Predictor
from fcos.sources import find_all_files, is_video
from fcos.video import Frame, VideoError

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class FilesResult:
    """What became of a number of files."""

    pictures: int = 0
    videos: int = 0
    frames: int = 0
    """Of all the videos."""
    detections: int = 0
    seconds: float = 0.0
    outputs: dict[Path, Path] = field(default_factory=dict)
    """The drawn file of each source file."""
    failures: dict[Path, str] = field(default_factory=dict)
    """Files that could not be read, with the reason."""

    @property
    def exit_code(self) -> int:
        """For the command: 1 if a file could not be read, else 0."""
        return 1 if self.failures else 0


def predict_files(
    predictor: Predictor,
    sources: Iterable[str | Path],
    output_folder: str | Path,
    *,
    score_threshold: float = 0.5,
    batch_size: int = 1,
    report: Callable[[str], None] | None = None,
) -> FilesResult:
    """Detect in pictures and videos; write drawn copies and ``detections.json``.

    Drawn pictures keep their stem and the suffix .jpg, .jpeg or .png; other pictures become .png,
    videos .mp4. Where two sources have the same name, or the copy would replace a source, the copy
    is called ``<stem>-2`` and so on. Copies of an earlier run are replaced.

    ``detections.json`` is a list with ``{"file", "drawing", "image_size", "detections"}`` for each
    picture, and for each frame of a video the same with "frame" (from 0) and "time" (seconds); see
    ``Detections.to_dict``. Files that cannot be read have no entry, but the frames before the place
    where a video breaks do.

    Args:
        predictor: The trained detector.
        sources: Pictures, videos, folders and patterns.
        output_folder: Made if it is not there.
        score_threshold: Lowest score that is kept.
        batch_size: Pictures that go through the network together.
        report: Called with a line of text for each file, such as ``print``.

    Raises:
        SourceError: A source stands for no file; nothing has been written then.
    """
    start = time.perf_counter()
    files = find_all_files(sources)
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = dict(zip(files, _output_paths(files, folder), strict=True))
    result = FilesResult()
    tell = report or (lambda line: None)

    def fail(path: Path, error: Exception) -> None:
        result.failures[path] = str(error)
        tell(f"failed: {error}")

    def read(paths: Iterable[Path]) -> Iterator[tuple[Path, Tensor]]:
        for path in paths:
            try:
                yield path, read_image(path)
            except ImageError as error:
                fail(path, error)

    with _json_list(folder / "detections.json") as write_entry:
        pictures = read(path for path in files if not is_video(path))
        for path, image, detections in predictor.detect(pictures, score_threshold, batch_size):
            detections.plot(image, outputs[path])
            write_entry(_names(path, outputs[path]) | detections.to_dict())
            result.pictures += 1
            result.detections += len(detections)
            result.outputs[path] = outputs[path]
            tell(f"{path}: {detections.summary()}")
        for path in filter(is_video, files):
            names = _names(path, outputs[path])

            def on_frame(frame: Frame, found: Detections, names: dict[str, str] = names) -> None:
                when = {"frame": frame.index, "time": round(frame.time, 6)}
                write_entry(names | when | found.to_dict())
                result.detections += len(found)

            try:
                video = predictor.predict_video(
                    path,
                    outputs[path],
                    score_threshold=score_threshold,
                    batch_size=batch_size,
                    on_frame=on_frame,
                )
            except VideoError as error:
                fail(path, error)
                continue
            result.videos += 1
            result.frames += video.frames
            result.outputs[path] = outputs[path]
            tell(f"{path}: {video.frames} frames, {video.frames_per_second:.1f} frames/s")
    result.seconds = time.perf_counter() - start
    return result


def _names(path: Path, drawing: Path) -> dict[str, str]:
    return {"file": str(path), "drawing": drawing.name}


def _output_paths(files: list[Path], folder: Path) -> list[Path]:
    """A path of its own for each file, none of them one of the files."""
    # lower case: some file systems do not tell A.jpg from a.jpg
    taken = {str(path.resolve()).lower() for path in files}
    paths = []
    for path in files:
        suffix = path.suffix.lower()
        if is_video(path):
            suffix = ".mp4"
        elif suffix not in _KEPT_SUFFIXES:
            suffix = ".png"
        output, number = folder / f"{path.stem}{suffix}", 1
        while str(output.resolve()).lower() in taken:
            number += 1
            output = folder / f"{path.stem}-{number}{suffix}"
        taken.add(str(output.resolve()).lower())
        paths.append(output)
    return paths


@contextmanager
def _json_list(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes a JSON list entry by entry, so that a long video needs no memory.

    The file is complete JSON even if the block raises or is interrupted.
    """
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"

        def write(entry: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + json.dumps(entry, ensure_ascii=False))
            separator = ",\n"

        try:
            yield write
        finally:
            file.write("\n]\n" if separator == ",\n" else "[]\n")
