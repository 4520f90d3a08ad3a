"""Checkpoints of other code bases to ours, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fcos.checkpoint import CheckpointError, check_content, is_ours, read_plain
from fcos.config import Config
from fcos.presets import PRESETS

from . import coco, detectron2, torchvision
from .errors import ConvertError
from .families import find_family
from .hints import Hints, Style, with_hints
from .reading import ForeignFile, parse, read_foreign

#: Code bases that checkpoints are written for.
WRITERS = {detectron2.NAME: detectron2, torchvision.NAME: torchvision}


@dataclass(frozen=True)
class Converted:
    """A checkpoint of ours that was made from another."""

    family: str
    """The code base it comes from."""
    config: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    state: dict[str, Tensor]
    ignored: list[str]
    """Keys that were left out on purpose."""
    assumed: list[str]
    """Settings that the weights do not tell, and why they are as they are."""

    @property
    def preset(self) -> str:
        """The named settings that these are, but for the network; "" if there are none."""
        return next((name for name in PRESETS if _same_rules(PRESETS[name](), self.config)), "")

    def content(self) -> dict[str, Any]:
        """For :func:`fcos.checkpoint.save_checkpoint`."""
        return {
            "config": self.config,
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "model": self.state,
            "converted_from": self.family,
        }


def convert(
    path: Path, source: str = "auto", class_names: Sequence[str] = (), style: Style = "auto"
) -> Converted:
    """Read a checkpoint of another code base.

    Args:
        path: ``.pth``, ``.pkl`` of numpy arrays, or ``.safetensors``. Nothing in it is run.
        source: the code base, or "auto".
        class_names: one for each class; (): those in the file, or COCO's where there are 80.
        style: of a ResNet.

    Raises:
        ConvertError: it is missing, damaged, unsafe, not known, or does not fit its own layout.
    """
    return convert_weights(read_foreign(path), path, source, class_names, style)


def convert_weights(
    weights: ForeignFile,
    path: Path,
    source: str = "auto",
    class_names: Sequence[str] = (),
    style: Style = "auto",
) -> Converted:
    """As :func:`convert`, of a file that was read."""
    try:
        family, reason = find_family(weights.state.keys(), source, path.name)
        hints = Hints(path.name, weights.notes, style)
        config, assumed = with_hints(
            family.NAME, weights.state, family.config(weights.state), hints
        )
        state, ignored = family.to_ours(weights.state)
        if family.NAME == torchvision.NAME and not class_names:
            before = config
            state, config = torchvision.only_categories(state, config)
            if config != before:
                ignored.append("the 11 outputs of 91 that are of no category of COCO")
        names, ids = _classes(config, weights.class_names, class_names)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    if reason:
        assumed.insert(0, reason)
    if names == coco.CLASS_NAMES and not (class_names or weights.class_names):
        assumed.append("COCO's classes, as there are 80")
    return Converted(family.NAME, config, names, ids, state, ignored, assumed)


def load_any(path: Path, source: str = "auto") -> dict[str, Any]:
    """Content of a checkpoint of this project or of another one, as of ``load_checkpoint``.

    Args:
        path: of any kind that there is.
        source: the code base of a foreign one.

    Raises:
        CheckpointError: the file is missing, damaged, or no such thing.
    """
    try:
        if path.suffix not in (".pkl", ".safetensors"):
            content = read_plain(path)
            if is_ours(content) or not _has_weights(content):
                return check_content(content, path)
            return convert_weights(parse(content, path), path, source).content()
        return convert(path, source).content()
    except ConvertError as error:
        raise CheckpointError(str(error)) from error


def write_back(
    target: str, state: Mapping[str, Tensor], config: Config, path: Path
) -> dict[str, Tensor]:
    """The weights as another code base loads them. Raises ConvertError if it has no such FCOS."""
    try:
        return WRITERS[target].from_ours(state, config)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error


def _same_rules(a: Config, b: Config) -> bool:
    """Whether outputs mean the same and become detections in the same way."""
    meaning = ("activation", "normalize_ltrb", "centerness_branch", "boundary", "locations")
    sizes = ("resize", "min_sizes", "max_size")
    return (
        (a.loss, a.postprocess, a.train) == (b.loss, b.postprocess, b.train)
        and all(getattr(a.model, name) == getattr(b.model, name) for name in meaning)
        and all(getattr(a.data, name) == getattr(b.data, name) for name in sizes)
    )


def _has_weights(content: Any) -> bool:
    return isinstance(content, dict) and any(
        isinstance(value, Tensor | dict) for value in content.values()
    )


def _classes(
    config: Config, stored: tuple[str, ...], given: Sequence[str]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    count = config.model.num_classes or 0
    if given and len(given) != count:
        raise ConvertError(f"has {count} classes, but {len(given)} names were given")
    names = tuple(given) or (stored if len(stored) == count else ())
    if count == len(coco.CLASS_NAMES) and names in ((), coco.CLASS_NAMES):
        return coco.CLASS_NAMES, coco.CATEGORY_IDS
    if count == 91 and not names:
        raise ConvertError(
            "has 91 outputs, and not COCO's 80 classes: if they are COCO's category ids from 0 to "
            "90, give 91 names with --class-names"
        )
    return names or tuple(f"class {i + 1}" for i in range(count)), tuple(range(1, count + 1))
