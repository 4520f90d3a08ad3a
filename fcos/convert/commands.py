"""``fcos convert``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fcos.config import Config, ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Make a checkpoint of this project from one of another code base, or the other way round.

    Knows the FCOS of tianzhi0549/FCOS, AdelaiDet, detectron2, mmdetection, torchvision and
    rosinality. Nothing in a file is run.
    """

    weights: Path
    """.pth, .pkl of numpy arrays, or .safetensors; or, with --to, a checkpoint of fcos train."""
    source: str = "auto"
    """The code base: original, original-imprv, adelaidet, detectron2, mmdet, torchvision or
    rosinality. auto: as the names of the weights say."""
    style: Literal["auto", "caffe", "pytorch"] = "auto"
    """Of a ResNet-50 or -101 from AdelaiDet, detectron2 or mmdetection. caffe: strides in the first
    1x1 convolutions, BGR; pytorch: in the 3x3 ones, RGB. auto: as the configuration in the file or
    its name says, else caffe."""
    to: Literal["fcos", "detectron2", "torchvision"] = "fcos"
    """What to write."""
    output: Path | None = None
    """File to write. None: beside the weights, as NAME-fcos.pt, NAME-detectron2.pth or
    NAME-torchvision.pth."""
    class_names: tuple[str, ...] = ()
    """One for each class. (): those in the file, or COCO's where there are 80, or torchvision's 91
    outputs, of which the 80 are taken."""


def convert(arguments: list[str]) -> int:
    """Run the command. Returns the exit code."""
    options = tyro.cli(ConvertOptions, prog="fcos convert", args=arguments)
    suffix = "-fcos.pt" if options.to == "fcos" else f"-{options.to}.pth"
    output = options.output or options.weights.with_name(options.weights.stem + suffix)
    if output.resolve() == options.weights.resolve():
        raise ConfigError(f"--output {output}: must not replace the weights")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: no such folder")
    if options.to == "fcos":
        _to_ours(options, output)
    else:
        _from_ours(options, output)
    return 0


def _to_ours(options: ConvertOptions, output: Path) -> None:
    from fcos.checkpoint import save_checkpoint

    from .conversion import convert

    found = convert(options.weights, options.source, options.class_names, options.style)
    save_checkpoint(output, found.content())
    print(f"{options.weights}: {found.family}, {len(found.state)} tensors mapped")
    print(f"preset: {found.preset or 'none'}, with the network of the weights")
    print(f"ignored: {_ignored(found.ignored)}")
    for line in found.assumed:
        print(f"assumed: {line}")
    for line in _describe(found.config):
        print(line)
    print(f"classes: {_shorten(found.class_names)}")
    print(f"written to {output}. Next: fcos predict {output} YOUR_IMAGES")


def _from_ours(options: ConvertOptions, output: Path) -> None:
    from fcos.checkpoint import save_plain

    from .conversion import load_any, write_back

    content = load_any(options.weights, options.source)
    state = write_back(options.to, content["model"], content["config"], options.weights)
    # torchvision's checkpoints are the state dict itself
    save_plain(output, state if options.to == "torchvision" else {"model": state})
    print(f"{len(state)} tensors written to {output}, for {options.to}, to be configured with:")
    for line in _describe(content["config"]):
        print(line)


def _describe(config: Config) -> list[str]:
    """The settings that differ between code bases."""
    model, data, post = config.model, config.data, config.postprocess
    deformable = ""
    if model.deformable_stages or model.tower_deformable:
        stages = [f"layer{stage}" for stage in model.deformable_stages]
        deformable = f"; deformable: {', '.join(stages + ['towers'] * model.tower_deformable)}"
    return [
        f"network: {model.backbone}, stride in {model.stride_in}, batch norm eps "
        f"{model.batch_norm_eps:g}, {model.fpn_channels} channels, {len(model.strides)} levels"
        + deformable,
        f"head: {model.shared_tower_convs} shared + {model.tower_convs} convolutions, norm "
        f"{model.tower_norm}, {'with' if model.tower_bias else 'without'} bias, "
        f"{'with' if model.trainable_scales else 'without'} scales, {model.activation} of "
        f"{'strides' if model.normalize_ltrb else 'pixels'}, centerness on the "
        f"{model.centerness_branch} tower",
        f"images: {data.color_order} in 0..{data.pixel_range}, mean {data.mean}, std {data.std}, "
        f"{data.min_sizes[-1]} x {data.max_size}, resize {data.resize}",
        f"detections: score {post.score}, threshold {post.score_threshold:g} on the "
        f"{post.threshold_on} score, NMS {post.iou_threshold:g}, clip {post.clip}, locations "
        f"{model.locations}",
    ]


def _ignored(keys: Sequence[str]) -> str:
    """All of them, but the counter that every batch norm has as one."""
    counter = "num_batches_tracked"
    others = [key for key in keys if not key.endswith(counter)]
    if len(others) < len(keys):
        others.append(f"{len(keys) - len(others)} {counter}")
    return ", ".join(others) or "nothing"


def _shorten(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
