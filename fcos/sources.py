"""Which files a path, a folder or a pattern stands for."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"}
)


class SourceError(ValueError):
    """A source stands for no file."""


def is_video(path: Path) -> bool:
    """Whether the name is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_files(source: str | Path) -> list[Path]:
    """The files of one source, in the order of their names.

    Args:
        source: A file of any name; a folder, for the pictures and videos directly in it; or a
            pattern with ``*``, ``?``, ``[...]`` and ``**`` for folders of any depth. Hidden files
            are left out.

    Raises:
        SourceError: Nothing is there, or no picture and no video.
    """
    path = Path(source).expanduser()
    if path.is_file():  # first, as a file may be called "photo[1].jpg"
        return [path]
    if path.is_dir():
        files = _pictures_and_videos(path.iterdir())
        if not files:
            raise SourceError(f"{source}: the folder has no picture and no video")
        return files
    if not glob.has_magic(str(path)):
        raise SourceError(f"{source}: no such file or folder")
    files = _pictures_and_videos(map(Path, glob.iglob(str(path), recursive=True)))
    if not files:
        raise SourceError(f"{source}: the pattern matches no picture and no video")
    return files


def find_all_files(sources: Iterable[str | Path]) -> list[Path]:
    """The files of several sources in turn, each file once.

    Raises:
        SourceError: One of the sources stands for no file, or there is no source.
    """
    files: dict[Path, Path] = {}
    for source in sources:
        for path in find_files(source):
            files.setdefault(path.resolve(), path)
    if not files:
        raise SourceError("sources: must name at least one picture, folder, pattern or video")
    return list(files.values())


def _pictures_and_videos(paths: Iterable[Path]) -> list[Path]:
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
    )
