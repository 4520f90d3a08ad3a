"""From images to detections, as one module."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .postprocess import postprocess
from .regions import region


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision that a network runs in: that of its weights, or with "bf16" bfloat16."""
    if amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class Detector(nn.Module):
    """The network and its post-processing.

    The shapes of the results follow from those of the arguments, and nothing waits for the device.
    So ``torch.compile(detector, fullgraph=True)`` and ``torch.export.export`` take all of it, and a
    CUDA graph can hold it.

    Args:
        network: images to :class:`fcos.model.Predictions`; shared, not copied.
        config: strides, units and thresholds.
        amp: "none", or "bf16": the network runs under bfloat16 autocast.
    """

    def __init__(self, network: nn.Module, config: Config, amp: str = "none") -> None:
        super().__init__()
        self.network = network
        self.amp = amp
        self._model, self._postprocess = config.model, config.postprocess

    def forward(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            images (Tensor[N, 3, H, W]): normalised, zero padded, H and W multiples of 32.
            image_sizes (Tensor[N, 2]): int64 (height, width) of the images inside the padding.
            original_sizes (Tensor[N, 2]): int64 (height, width) that the boxes are scaled to.

        Returns:
            boxes, scores, labels, counts: the fields of
            :class:`fcos.postprocess.PaddedDetections`; a plain tuple, so that an exported program
            needs nothing but ``fcos_ext`` to be loaded.
        """
        with region("network"), autocast(self.amp, images.device):
            predictions = self.network(images)
        with region("postprocessing"):
            found = postprocess(
                predictions, image_sizes, original_sizes, self._model, self._postprocess
            )
        return found.boxes, found.scores, found.labels, found.counts
