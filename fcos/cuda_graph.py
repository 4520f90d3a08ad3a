"""A function of tensors that a GPU replays without the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


class GraphedFunction:
    """Records a function as a CUDA graph, for each set of shapes that it is called with.

    A replay launches all that the function launched, with one call: small kernels then follow each
    other without a gap, however slow the CPU. Tensors that the function uses besides its arguments,
    such as weights, are read and changed in place. What it decides in Python is decided once.

    The first calls with given shapes run as they are, in which libraries set themselves up and
    optimisers make their state. Shapes that come no more often are never recorded. The graphs share
    their memory, as only one runs at a time.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs says what a function must not
    do: wait for the device, or have shapes that depend on values.

    Args:
        function: takes tensors and returns a tuple of tensors.
        device: a GPU.
        memory_format: of arguments with four dimensions.
        warmup: calls with given shapes before these are recorded, at least 1.

    Raises:
        ConfigError: the device is no GPU.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        warmup: int = 3,
    ) -> None:
        self._check(device)
        self._function = function
        self._device, self._format, self._warmup = device, memory_format, warmup
        self._calls: dict[tuple[torch.Size, ...], _Call] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @property
    def recorded(self) -> int:
        """How many sets of shapes have a graph."""
        return sum(call.replay is not None for call in self._calls.values())

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Results of the function; they are the caller's, and no later call changes them.

        Args:
            inputs: on any device, each always of the same dtype. Those in page-locked memory are
                copied without waiting.
        """
        key = tuple(value.shape for value in inputs)
        if key not in self._calls:
            self._calls[key] = _Call([self._empty(value) for value in inputs])
        call = self._calls[key]
        for static, value in zip(call.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        if call.replay is None and call.seen < self._warmup:
            call.seen += 1
            return self._run(call.inputs)
        if call.replay is None:
            call.replay, call.outputs = self._record(call.inputs)
        call.replay()
        # The graph's own memory is overwritten by the next replay, be it another graph's.
        return tuple(output.clone() for output in call.outputs)

    def _check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"graph needs a GPU, got device {device}; compile works anywhere")

    def _empty(self, value: Tensor) -> Tensor:
        layout = self._format if value.ndim == 4 else torch.contiguous_format
        return torch.empty(
            value.shape, dtype=value.dtype, device=self._device, memory_format=layout
        )

    def _run(self, inputs: list[Tensor]) -> Outputs:
        """The function itself, on the stream of the recording.

        Gradients are accumulated on the stream where their parameter was first used, which must not
        be one outside the recording.
        """
        stream = self._side_stream()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        for output in outputs:
            output.record_stream(torch.cuda.current_stream(self._device))
        return outputs

    def _record(self, inputs: list[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream()):
            outputs = self._function(*inputs)
        return graph.replay, outputs

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream


class _Call:
    """What belongs to one set of shapes."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        """What the graph reads."""
        self.seen = 0
        self.replay: Callable[[], None] | None = None
        self.outputs: Sequence[Tensor] = ()
