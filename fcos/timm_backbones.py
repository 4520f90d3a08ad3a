"""Trunks from timm, an optional package: DLA, VoVNet and HRNet.

Yu et al., https://arxiv.org/abs/1707.06484; Lee et al., https://arxiv.org/abs/1904.09730, with
effective squeeze and excitation (eSE) https://arxiv.org/abs/1911.06667; Wang et al.,
https://arxiv.org/abs/1908.07919.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .config import ConfigError, ModelConfig
from .convert.timm_names import BODY, VOVNETS
from .convert.timm_names import timm_trunk as timm_trunk_names
from .trunk import MissingPackageError, Stages, Trunk, load_weights, weights_from_file


class Network(NamedTuple):
    """A network of timm's, and what becomes of it here."""

    name: str
    """Its name there."""
    arguments: dict[str, Any]
    stages: Stages
    taps: tuple[str, ...]
    channels: tuple[int, ...]
    classifiers: tuple[str, ...]
    """Beginnings of the names of weights that only classify."""
    imagenet: str = ""
    """Why timm's ImageNet weights are of no use; "": they are."""


_DLA_STAGES = (
    ("base_layer", "level0", "level1"),
    ("level2",),
    ("level3",),
    ("level4",),
    ("level5",),
)
_VOVNET_STAGES = (("stem",), ("stage2",), ("stage3",), ("stage4",), ("stage5",))
_HRNET_STAGES = (
    ("conv1", "bn1", "conv2", "bn2"),
    ("layer1",),
    ("transition1", "stage2"),
    ("transition2", "stage3"),
    ("transition3", "stage4"),
)


def _vovnet(name: str, reason: str, **arguments: Any) -> Network:
    taps = ("stage3", "stage4", "stage5")
    return Network(
        name, arguments, _VOVNET_STAGES, taps, (512, 768, 1024), ("head.", "classifier."), reason
    )


def _hrnet(width: int) -> Network:
    channels = tuple(width * 2**branch for branch in range(4))
    # without the layers of the classifier that widen the branches; stride 2 is the stem's
    arguments = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
    classifiers = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
    return Network(f"hrnet_w{width}", arguments, _HRNET_STAGES, (), channels, classifiers)


# The first whose networks can be laid out without memory, on torch's meta device.
_OLDEST_TIMM = (1, 0, 22)
_FEWER_ESE = "timm's have an eSE in the last block of each stage alone"
#: By the names of :class:`fcos.config.ModelConfig`.
NETWORKS = {
    "dla34": Network(
        "dla34",
        {},
        _DLA_STAGES,
        ("level3", "level4", "level5"),
        (128, 256, 512),
        # of the authors' own weights, also two projections that nothing uses
        ("fc.", "level3.project.", "level4.project."),
    ),
    # the residual connections are those of the paper's second version
    "vovnet57": _vovnet("vovnet57a", "timm has none", residual=True),
    "vovnet39_ese": _vovnet("ese_vovnet39b", _FEWER_ESE),
    "vovnet57_ese": _vovnet("ese_vovnet57b", _FEWER_ESE),
    "vovnet99_ese": _vovnet("ese_vovnet99b", "timm has none"),
    "hrnet_w18": _hrnet(18),
    "hrnet_w32": _hrnet(32),
    "hrnet_w40": _hrnet(40),
}


def timm_trunk(config: ModelConfig, pretrained: bool) -> Trunk:
    """The trunk of a backbone in :data:`NETWORKS`.

    Args:
        config: which one, its norms and weights.
        pretrained: load ``config.backbone_weights``.

    Raises:
        ConfigError: timm is not installed, or the weights cannot be had or do not fit.
    """
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError as error:
        raise MissingPackageError(
            f"model.backbone {config.backbone} needs the package timm: pip install 'fcos[timm]' or "
            f"pip install timm ({error})"
        ) from error
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < _OLDEST_TIMM:
        raise MissingPackageError(
            f"model.backbone {config.backbone} needs timm {'.'.join(map(str, _OLDEST_TIMM))} or "
            f"newer, got {timm.__version__}: pip install --upgrade timm"
        )
    network = NETWORKS[config.backbone]
    wanted = config.backbone_weights if pretrained else "none"
    body = _create(config, network, imagenet=wanted == "imagenet")
    is_vovnet = config.backbone in VOVNETS
    if is_vovnet:
        body = _flatten_vovnet(body)
    if wanted not in ("imagenet", "none"):
        state = weights_from_file(Path(wanted))
        if is_vovnet:
            state = _vovnet_names(config.backbone, state)
        load_weights(body, state, config, "timm", network.classifiers)
    if config.frozen_batch_norm:
        body = freeze_batch_norm_2d(body)
    for module in body.modules():
        if hasattr(module, "running_var"):
            module.eps = config.batch_norm_eps  # type: ignore[assignment]
    return Trunk(body, network.stages, network.channels, network.taps)


def _create(config: ModelConfig, network: Network, imagenet: bool) -> nn.Module:
    from timm import create_model
    from timm.layers import EffectiveSEModule

    if imagenet and network.imagenet:
        raise ConfigError(
            f"model.backbone {config.backbone} has no ImageNet weights ({network.imagenet}): set "
            "model.backbone_weights to none or to a file"
        )
    try:
        body: nn.Module = create_model(network.name, pretrained=imagenet, **network.arguments)
    except Exception as error:  # whatever its download raises
        if not imagenet:
            raise
        raise ConfigError(
            f"timm's ImageNet weights of {config.backbone} could not be downloaded ({error}). "
            f"Without a connection, fetch {network.name}'s from huggingface.co/timm elsewhere and "
            "set model.backbone_weights to that file, or set it to none to train from scratch"
        ) from error
    if config.backbone.endswith("_ese"):
        # in every block, as its authors' detectors have it; timm has it in the last of a stage
        for stage in body.get_submodule("stages").children():
            for block in stage.get_submodule("blocks").children():
                channels = block.get_submodule("conv_concat.conv").out_channels
                if block.attn is None:
                    block.attn = EffectiveSEModule(channels)
    return body


def _flatten_vovnet(body: nn.Module) -> nn.Module:
    """Its stem and stages as children, so that their outputs can be taken."""
    stages = body.get_submodule("stages").children()
    named = ((f"stage{i}", stage) for i, stage in enumerate(stages, start=2))
    return nn.Sequential(OrderedDict([("stem", body.get_submodule("stem")), *named]))


def _vovnet_names(backbone: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in timm's names, or in those of VoVNet's authors, by the names in such a body."""
    authors = {theirs: ours for ours, theirs in timm_trunk_names(backbone, "")}

    def ours(key: str) -> str:
        if key in authors:
            return authors[key].removeprefix(f"{BODY}.")
        return re.sub(r"^stages\.(\d)\.", lambda match: f"stage{int(match[1]) + 2}.", key)

    return {ours(key): value for key, value in state.items()}
