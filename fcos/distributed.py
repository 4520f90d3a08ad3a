"""One process of several, or the only one: what ``torchrun`` says in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError


@dataclass(frozen=True)
class Process:
    """This process and its device.

    What concerns the host (flags, objects) goes over gloo, so that the GPU is not waited for.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes must ask."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in the main process; [] in the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, group=self.host_group)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """The main process's value."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.host_group)
        return values[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers, such as the statistics of batch norm."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.host_group)


def start_process(device: str = "auto") -> Process:
    """Join the processes that ``torchrun`` started, or be the only one.

    Args:
        device: "auto", or a device as torch names it. With several processes, "auto" and "cuda"
            give each its own GPU, and anything else runs over gloo.

    Raises:
        ConfigError: there is no such device.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device)
    if chosen.type == "cuda" and world_size > 1:
        if chosen.index is not None:
            raise ConfigError(f"train.device must be auto, cuda or cpu with torchrun, got {device}")
        chosen = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Process(rank, world_size, chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Process(rank, world_size, chosen, dist.new_group(backend="gloo"))


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch without CUDA raises AssertionError, for a device it has no module of ImportError
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ConfigError("device meta holds no numbers to compute with")
    return device


def stop_process() -> None:
    """Leave the group of processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
