"""One process of a training run: its state, its steps, and what it saves."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import optim, report
from .checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from .config import Config, ConfigError
from .cuda_graph import GraphedFunction
from .data.batches import Batch, training_loader
from .data.coco import CocoDataset
from .detector import autocast
from .distributed import Process
from .evaluate import CocoMetrics, evaluate_coco
from .inference import InferencePass, detect_dataset
from .interrupt import Interrupted, stop_signals
from .losses import assign, fcos_losses, start_of_moving, step_normalizers
from .model import FCOS
from .progress import TrainingProgress
from .recorder import LOSSES, NonFiniteLossError, Recorder
from .regions import region
from .run_folder import RunFolder
from .weight_average import WeightAverage


class Training:
    """The state of a run, and the steps that change it.

    :func:`train` is what uses it; by itself it is for profiling and for loops of your own.

    Args:
        config: all settings, with ``model.num_classes``.
        process: this process, and its device.
        dataset: of training.
        validation: of evaluation, or None.
        fresh: load the weights of the backbone; False where a checkpoint follows.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        dataset: CocoDataset,
        validation: CocoDataset | None,
        fresh: bool = True,
    ) -> None:
        self.config, self.process = config, process
        self.dataset, self.validation = dataset, validation
        self.iteration = 0
        self.best_ap = -1.0
        self.format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        torch.manual_seed(config.train.seed)
        network: nn.Module = FCOS(config.model, pretrained_backbone=fresh)
        network.to(process.device, memory_format=self.format)  # type: ignore[call-overload]
        if process.world_size > 1 and process.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network
        self.optimizer = optim.build_optimizer(network, config.train)
        self.moving = start_of_moving(process.device)
        self.average = None
        if config.train.ema_decay:
            self.average = WeightAverage(network, config.train.ema_decay)
        self.forward: nn.Module = network
        if config.train.compile:
            self.forward = torch.compile(network, fullgraph=True)  # type: ignore[assignment]
        if process.world_size > 1:
            devices = [process.device] if process.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices)
        self.graphed = None
        if config.train.graph:
            self.graphed = GraphedFunction(self.update, process.device, self.format)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average, if there is one."""
        return self.network if self.average is None else self.average.network

    def run(self, run: RunFolder, bar: TrainingProgress) -> None:
        settings = self.config.train
        recorder = Recorder(self.process, run, bar)
        loader = training_loader(
            self.dataset,
            self.config.data,
            settings.batch_size,
            seed=settings.seed,
            rank=self.process.rank,
            world_size=self.process.world_size,
            start_iteration=self.iteration,
            iterations=settings.iterations,
            accumulation=settings.accumulation,
            fixed=settings.graph,
        )
        with stop_signals() as stop:
            for batch in loader:
                if self.iteration == 0 and self.process.is_main:
                    report.draw_training_batch(run.path, batch, self.dataset, self.config)
                rate = optim.learning_rate(self.iteration, settings)
                losses = self.step(batch, rate)
                self.iteration += 1
                recorder.add(self.iteration, losses, batch.image_ids)
                bar.advance(self.iteration)
                stopping = self.process.any(bool(stop))
                last = self.iteration == settings.iterations
                due = last or self.iteration % settings.eval_every == 0
                if due or stopping or self.iteration % settings.log_every == 0:
                    recorder.flush(rate, settings.batch_size)
                if due or stopping:
                    self.check_weights(run)
                if due:
                    self.evaluate_and_save(run, bar)
                elif stopping:
                    self.save(run)
                if stopping and not last:
                    number = stop[0] if stop else signal.SIGTERM
                    raise Interrupted(
                        number,
                        f"stopped after iteration {self.iteration} and saved. Go on with: "
                        f"fcos train --resume {run.path}",
                    )
        if self.process.is_main:
            report.plot_training_curves(run)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One optimiser step. Returns this process's share of the three losses, detached."""
        self.network.train()
        optim.set_learning_rate(self.optimizer, rate)
        if self.graphed is not None:
            return self.graphed(batch.images, batch.boxes, batch.labels, batch.counts)[0]
        batch = batch.to(self.process.device, self.format)
        return self.update(batch.images, batch.boxes, batch.labels, batch.counts)[0]

    def update(
        self, images: Tensor, boxes: Tensor, labels: Tensor, counts: Tensor
    ) -> tuple[Tensor]:
        """As :meth:`step`, of the tensors of a batch on the device.

        Nothing in here waits for the device or depends on values: a CUDA graph can hold it.
        """
        settings = self.config.train
        self.optimizer.zero_grad(set_to_none=True)
        parts = images.chunk(settings.accumulation)
        truths = zip(
            *(x.chunk(settings.accumulation) for x in (boxes, labels, counts)), strict=True
        )
        size = (images.shape[2], images.shape[3])
        with region("assignment"):
            targets = [assign(size, self.config.model, *truth) for truth in truths]
            normalizers = step_normalizers(targets, self.config.loss, self.moving)
        total = torch.zeros(len(LOSSES), device=self.process.device)
        for i, (part, target) in enumerate(zip(parts, targets, strict=True)):
            exchange: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if isinstance(self.forward, DistributedDataParallel) and i < len(parts) - 1:
                exchange = self.forward.no_sync()  # gradients are exchanged once a step
            with exchange:
                with region("network"), autocast(settings.amp, self.process.device):
                    predictions = self.forward(part)
                with region("losses"):
                    terms = fcos_losses(predictions, target, normalizers, self.config.loss)
                    losses = torch.stack([terms[name] for name in LOSSES])
                with region("backward"):
                    # of the processes' gradients, the average is taken, but their losses add up
                    (losses.sum() * self.process.world_size).backward()
            total += losses.detach()
        with region("optimizer"):
            if settings.clip_gradient_norm:
                nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_gradient_norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.network)
        return (total,)

    def check_weights(self, run: RunFolder) -> None:
        """Raises NonFiniteLossError: a finite loss can have a gradient that is not."""
        state = self.network.state_dict().items()
        if bad := [name for name, value in state if not value.isfinite().all()]:
            raise NonFiniteLossError(
                f"{len(bad)} weights, {bad[0]} among them, are not finite at iteration "
                f"{self.iteration}",
                run,
            )

    def evaluate_and_save(self, run: RunFolder, bar: TrainingProgress) -> None:
        metrics = self.evaluate(run)
        improved = False
        if metrics is not None:
            ap = metrics.AP or 0.0
            improved, self.best_ap = ap > self.best_ap, max(ap, self.best_ap)
            run.add_row(iteration=self.iteration, ap=ap, ap50=metrics.AP50 or 0.0)
            best = " (best so far)" if improved else ""
            bar.say(f"{self.iteration:>7}  AP {ap:.3f}  AP50 {metrics.AP50 or 0.0:.3f}{best}")
        self.save(run, best=improved)

    def evaluate(self, run: RunFolder) -> CocoMetrics | None:
        """Metrics on the validation images, in the main process; None in the others, or without."""
        annotations = self.config.data.val_annotations
        if self.validation is None or annotations is None:
            return None
        self.process.share_buffers(self.evaluated)
        amp = self.config.train.amp
        detect = InferencePass(self.evaluated, self.config, self.process.device, amp=amp)
        results = detect_dataset(detect, self.validation, self.config, self.process)
        if not self.process.is_main:
            return None
        metrics = evaluate_coco(annotations, results, image_ids=self.validation.image_ids)
        report.write_evaluation(run.path, metrics, results, self.validation, annotations)
        return metrics

    def save(self, run: RunFolder, best: bool = False) -> None:
        """Write last.pt, with all that resuming needs, and best.pt, with what prediction needs."""
        if self.process.is_main:
            content: dict[str, Any] = {
                "config": self.config,
                "class_names": self.dataset.class_names,
                "category_ids": self.dataset.category_ids,
                "iteration": self.iteration,
                "model": self.evaluated.state_dict(),
            }
            if best:
                save_checkpoint(run.best, content)
            state: dict[str, Any] = {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best_ap": self.best_ap,
                "moving": self.moving,
                "random": torch.get_rng_state(),
            }
            if self.average is not None:
                state["average_started"] = self.average.started
            save_checkpoint(run.last, {**content, "training": state})
        self.process.barrier()

    def restore(self, path: Path) -> None:
        """Continue from a last.pt. Raises CheckpointError."""
        content = load_checkpoint(path)
        if "training" not in content:
            raise CheckpointError(f"{path}: holds no training state to resume from")
        _check_unchanged(content["config"], self.config)
        if tuple(content["class_names"]) != self.dataset.class_names:
            raise CheckpointError(
                f"{path}: was trained on the classes {', '.join(content['class_names'])}, the "
                f"annotations have {', '.join(self.dataset.class_names)}"
            )
        state = content["training"]
        load_weights(self.network, state["network"], str(path))
        # a run that has no average yet starts it with the first step
        if self.average is not None and state.get("average_started"):
            load_weights(self.average.network, content["model"], str(path))
            self.average.started = True
        # the groups hold the weight decay and the like, which may have been changed
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if "moving" in state:
            self.moving.copy_(state["moving"])
        self.iteration, self.best_ap = content["iteration"], state["best_ap"]
        torch.set_rng_state(state["random"])


def _check_unchanged(before: Config, now: Config) -> None:
    """Raises ConfigError for a setting that a resumed run cannot change."""
    fixed = [("model", f.name) for f in fields(before.model)] + [("train", "optimizer")]
    for section, name in fixed:
        old, new = (getattr(getattr(c, section), name) for c in (before, now))
        if old != new:
            raise ConfigError(
                f"{section}.{name} cannot change when a run is resumed: it is {old}, got {new}"
            )
