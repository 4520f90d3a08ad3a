"""Boxes come back where they were, whichever way they end: from a file through resizing and targets
to what a network without error would predict, and through post-processing back to the file."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

import fcos
from fcos.config import Config, DataConfig, ModelConfig
from fcos.data.batches import Sample, collate
from fcos.data.transforms import eval_transforms
from fcos.distributed import Process
from fcos.engine import train
from fcos.losses import assign
from fcos.model import Predictions
from fcos.postprocess import postprocess

BOXES = torch.tensor([[3.0, 5, 40, 31], [50, 2, 99, 60], [10, 40, 48, 74], [1, 1, 96, 71]])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shorter", [50, 75, 160])
@pytest.mark.parametrize("corners", ["edges", "pixels"])
def test_there_and_back(corners: Any, shorter: int, normalize: bool) -> None:
    data = DataConfig(min_sizes=(shorter,), padding="beyond", resize="opencv")
    model = ModelConfig(
        corners=corners,
        normalize_ltrb=normalize,
        strides=(8, 16, 32),
        size_ranges=((0, 1e4), (1e4, 2e4), (2e4, 3e4)),
    )
    image = tv_tensors.Image(torch.zeros(3, 75, 100, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(75, 100))
    image, target = eval_transforms(data, corners)(image, {"boxes": boxes})
    found = target["boxes"].as_subclass(Tensor)
    sample = Sample(image.as_subclass(Tensor), found, torch.arange(4), 1, (75, 100))
    batch = collate([sample], padding=data.padding)
    size = batch.images.shape[2], batch.images.shape[3]
    targets = assign(size, model, batch.boxes, batch.labels, batch.counts)
    assert set(targets.labels[0].tolist()) == {-1, 0, 1, 2, 3}

    shapes = [(size[0] // s, size[1] // s) for s in model.strides]
    counts = [height * width for height, width in shapes]

    def levels(values: Tensor) -> list[Tensor]:
        """[L, channels] as [1, channels, H, W] each."""
        parts = zip(values.split(counts), shapes, strict=True)
        return [part.t().reshape(1, -1, *shape) for part, shape in parts]

    one_hot = targets.labels[0][:, None] == torch.arange(4)
    predictions = Predictions(
        levels(one_hot * 20.0 - 10),
        levels(targets.ltrb[0]),
        levels(torch.full((sum(counts), 1), 9.0)),
    )
    padded = postprocess(
        predictions,
        batch.image_sizes,
        batch.original_sizes,
        model,
        replace(Config().postprocess, iou_threshold=0.9),
    )
    assert padded.counts.tolist() == [4]
    order = padded.labels[0, :4].argsort()
    torch.testing.assert_close(padded.boxes[0, order], BOXES, rtol=1e-5, atol=1e-3)


def test_training_and_prediction_with_every_switch(short_run: Config) -> None:
    config = replace(
        short_run,
        model=replace(short_run.model, corners="pixels"),
        loss=replace(short_run.loss, iou_smooth=1.0),
        postprocess=replace(
            short_run.postprocess, topk_by="class", overlaps="edges", score_threshold=0.0
        ),
        data=replace(
            short_run.data,
            resize="opencv",
            padding="beyond",
            val_annotations=short_run.data.train_annotations,
        ),
    )
    run = train(config, Process(0, 1, torch.device("cpu")))
    predictor = fcos.load(run / "best.pt", device="cpu")
    assert predictor.config.model.corners == "pixels" and predictor.config.data.padding == "beyond"
    detections = predictor.predict(torch.zeros(3, 64, 96, dtype=torch.uint8), score_threshold=0.0)
    assert detections.boxes.isfinite().all() and len(detections) > 0
