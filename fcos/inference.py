"""Running a network over a data set, on all processes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from .config import Config
from .data.batches import eval_loader
from .data.coco import CocoDataset
from .detections import Detections
from .distributed import Process
from .postprocess import postprocess


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision that the network runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.amp == "bf16")


def detect_dataset(
    network: nn.Module,
    dataset: CocoDataset,
    config: Config,
    process: Process,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Detections of every image, in COCO's result format.

    The processes share the images. The network is in eval mode meanwhile.

    Args:
        network: images to predictions.
        dataset: with the transforms of evaluation.
        config: settings of the network.
        process: this one of them.
        batch_size: images of this process at a time.

    Returns:
        The results of all processes in the main one; [] in the others.
    """
    results: list[dict[str, Any]] = []
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode(), autocast(config, process.device):
            loader = eval_loader(dataset, config.data, batch_size, process.rank, process.world_size)
            for batch in loader:
                batch = batch.to(process.device)
                padded = postprocess(
                    network(batch.images),
                    batch.image_sizes,
                    batch.original_sizes,
                    config.model,
                    config.postprocess,
                )
                sizes = batch.original_sizes.tolist()
                for i, image_id in enumerate(batch.image_ids):
                    found = Detections.from_padded(padded, i, dataset.class_names, tuple(sizes[i]))
                    results += found.to_coco(image_id, dataset.category_ids)
    finally:
        network.train(was_training)
    return [result for share in process.gather(results) for result in share]
