"""FCOS: fully convolutional one-stage, anchor-free object detection.

>>> import fcos
>>> detections = fcos.load("best.pt").predict("street.jpg")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detections import Detections
    from .model import FCOS
    from .predict import Predictor

__version__ = "0.1.0"
__all__ = ["FCOS", "Detections", "Predictor", "load"]


def load(
    checkpoint: str | Path,
    device: str = "auto",
    *,
    amp: str = "none",
    compile: bool = False,
    graph: bool = False,
) -> Predictor:
    """The trained detector in a checkpoint; nothing else is needed to predict with it.

    Args:
        checkpoint: a file that ``fcos train`` wrote, or one of the other code bases that
            ``fcos convert`` knows.
        device: as torch names it, or "auto": the GPU if there is one.
        amp, compile, graph: how it runs; see :class:`fcos.Predictor`.

    Raises:
        fcos.config.ConfigError: ``graph`` without a GPU, or a backbone of timm without timm.
        fcos.checkpoint.CheckpointError: the file is missing, damaged or foreign.
    """
    from .checkpoint import load_weights
    from .convert.conversion import load_any
    from .model import FCOS
    from .predict import Predictor

    content = load_any(Path(checkpoint))
    network = FCOS(content["config"].model, pretrained_backbone=False)
    # "model" is what was evaluated: the moving average where training kept one
    load_weights(network, content["model"], str(checkpoint))
    return Predictor(
        network,
        content["config"],
        content["class_names"],
        content["category_ids"],
        device,
        amp=amp,
        compile=compile,
        graph=graph,
    )


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `fcos --help` does without
    if name == "FCOS":
        from .model import FCOS

        return FCOS
    if name == "Predictor":
        from .predict import Predictor

        return Predictor
    if name == "Detections":
        from .detections import Detections

        return Detections
    raise AttributeError(f"module 'fcos' has no attribute {name!r}")
