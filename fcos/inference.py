"""Running a network on batches of images, and over a data set on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .cuda_graph import GraphedFunction
from .data.batches import eval_loader
from .data.coco import CocoDataset
from .data.padding import Shape, fixed_shapes
from .detections import Detections
from .detector import Detector
from .distributed import Process
from .postprocess import PaddedDetections


class InferencePass:
    """Batches to detections, on a device.

    Args:
        network: images to predictions, on the device. It is put in eval mode.
        config: the settings that it was trained with.
        device: of the network.
        amp: "none", or "bf16": the network runs under bfloat16 autocast.
        compile: ``torch.compile`` network and post-processing together. The first batch takes
            minutes then, and one of another shape again.
        graph: record them as a CUDA graph for each shape of batch that comes repeatedly.

    Raises:
        ConfigError: ``graph`` without a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        device: torch.device,
        *,
        amp: str = "none",
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        self.shapes: tuple[Shape, ...] = config.data.image_shapes
        """That images are to be padded to; see ``fcos.data.padding``."""
        if graph:
            self.shapes = fixed_shapes(config.data)
        self._device = device
        self._format = (
            torch.channels_last if config.train.channels_last else torch.contiguous_format
        )
        network.to(memory_format=self._format)
        self.detector = Detector(network, config, amp).eval()
        """Network and post-processing in one module, as ``torch.export`` takes it."""
        self._detect: Any = self.detector
        if compile:
            self._detect = torch.compile(self.detector, fullgraph=True)
        if graph:
            self._detect = GraphedFunction(self._detect, device, self._format)

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor
    ) -> PaddedDetections:
        """Detections, on the device, which is not waited for; see :class:`Detector`.

        Args:
            images, image_sizes, original_sizes: on any device.
        """
        if not isinstance(self._detect, GraphedFunction):
            images = images.to(self._device, non_blocking=True)
            images = images.contiguous(memory_format=self._format)
            image_sizes = image_sizes.to(self._device, non_blocking=True)
            original_sizes = original_sizes.to(self._device, non_blocking=True)
        return PaddedDetections(*self._detect(images, image_sizes, original_sizes))


def detect_dataset(
    detect: InferencePass,
    dataset: CocoDataset,
    config: Config,
    process: Process,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Detections of every image, in COCO's result format.

    The processes share the images.

    Args:
        detect: the network.
        dataset: with the transforms of evaluation.
        config: for the number of workers.
        process: this one of them.
        batch_size: images of this process at a time.

    Returns:
        The results of all processes in the main one; [] in the others.
    """
    results: list[dict[str, Any]] = []
    rank, world_size = process.rank, process.world_size
    for batch in eval_loader(dataset, config.data, batch_size, rank, world_size, detect.shapes):
        padded = detect(batch.images, batch.image_sizes, batch.original_sizes)
        sizes = batch.original_sizes.tolist()
        for i, image_id in enumerate(batch.image_ids):
            found = Detections.from_padded(padded, i, dataset.class_names, tuple(sizes[i]))
            results += found.to_coco(image_id, dataset.category_ids)
    return [result for share in process.gather(results) for result in share]
