"""The named stretches of a step appear in a profile, once each."""

from collections import Counter
from dataclasses import replace

import torch

from fcos.config import Config
from fcos.data.batches import training_loader
from fcos.data.coco import CocoDataset
from fcos.data.transforms import train_transforms
from fcos.distributed import Process
from fcos.inference import InferencePass
from fcos.training import Training


def test_of_training_and_inference(short_run: Config) -> None:
    config = replace(short_run, model=replace(short_run.model, num_classes=6))
    assert config.data.train_annotations is not None
    dataset = CocoDataset(config.data.train_annotations, None, train_transforms(config.data))
    training = Training(config, Process(0, 1, torch.device("cpu")), dataset, None)
    batch = next(iter(training_loader(dataset, config.data, 2)))
    detect = InferencePass(training.network, config, torch.device("cpu"))
    with torch.profiler.profile() as profile:
        training.step(batch, 0.001)
        detect(batch.images, batch.image_sizes, batch.original_sizes)
    names = Counter(event.name for event in profile.events() if event.name.startswith("fcos."))
    assert names == {
        "fcos.assignment": 1,
        "fcos.network": 2,
        "fcos.losses": 1,
        "fcos.backward": 1,
        "fcos.optimizer": 1,
        "fcos.postprocessing": 1,
    }
