"""CUDA graphs without a GPU: a replay runs the recorded function again, on the recorded tensors.

What a graph demands of its caller is as on a GPU: the function is called no more with new
arguments, so all that changes must come by way of tensors that are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcos.cuda_graph import GraphedFunction, Outputs


class StandInGraph(GraphedFunction):
    """Counts its recordings and replays."""

    recordings = 0
    replays = 0

    def _check(self, device: torch.device) -> None:
        """Any will do."""

    def _run(self, inputs: list[Tensor]) -> Outputs:
        return self._function(*inputs)

    def _record(self, inputs: list[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Unlike a real recording it has no outputs before the first replay."""
        outputs: list[Tensor] = []
        type(self).recordings += 1

        def replay() -> None:
            type(self).replays += 1
            results = self._function(*inputs)
            if not outputs:
                outputs.extend(torch.empty_like(result) for result in results)
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result)

        return replay, outputs
