"""Arguments for every operator, taken from what ``tests/abi/check_second_torch.py`` calls.

That program must call each operator, on a CPU; here the calls are written down, to be repeated on
another device. An operator that it does not know has no sample, which a test does not let pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fcos_ext  # noqa: F401  registers the operators
from tests.abi.check_second_torch import CHECKS

NAMESPACE = "fcos_ext"


@dataclass(frozen=True)
class Call:
    """Of one operator, with tensors on the CPU."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any
    """What it returned, and, after that, the arguments that it wrote to."""

    @property
    def name(self) -> str:
        return str(self.op.name()).removeprefix(f"{NAMESPACE}::")

    def describe(self) -> str:
        tensors = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        shapes = ", ".join(f"{str(x.dtype)[6:]} {list(x.shape)}" for x in tensors)
        return f"{self.name} of {shapes}"


class Recorder(TorchDispatchMode):
    """Writes down the calls of operators of a namespace."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != self.namespace:
            return func(*args, **kwargs)
        args_before, kwargs_before = tree_map(_copy, (args, kwargs))
        returned = func(*args, **kwargs)
        results = (returned, written(func, args, kwargs))
        self.calls.append(Call(func, args_before, kwargs_before, tree_map(_copy, results)))
        return returned


def written(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Those arguments that the schema says an operator writes to."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    is_write = {
        a.name: a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments
    }
    return [value for name, value in given.items() if is_write[name]]


def run_call(call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The results with other arguments, as ``Call.results`` holds them."""
    returned = call.op(*args, **kwargs)
    return returned, written(call.op, args, kwargs)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def operators() -> set[str]:
    """Names of all that are registered."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("fcos_ext::") for n in names if n.startswith("fcos_ext::")}


def record_calls(seed: int) -> list[Call]:
    """What the checks call, forward and backward, with random numbers from ``seed``."""
    torch.manual_seed(seed)
    recorder = Recorder()
    with recorder:
        for check in CHECKS.values():
            check()
    return recorder.calls


def missing_samples(calls: Sequence[Call]) -> list[str]:
    return sorted(operators() - {call.name for call in calls})


def moved(value: Any, device: str) -> Any:
    """Arguments or results with their tensors copied to a device."""
    return tree_map(lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x, value)


def same_shapes(a: Call, b: Call) -> bool:
    """Whether two calls differ in nothing but the values of tensors."""

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.stride()
        return value

    key_a, key_b = ([shape(x) for x in tree_leaves((call.args, call.kwargs))] for call in (a, b))
    return a.op is b.op and key_a == key_b


def has_fixed_shapes(call: Call) -> bool:
    """Whether the shapes of the results follow from those of the arguments: then nothing may wait
    for the device."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args, kwargs = tree_map(
        lambda x: mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x,
        (call.args, call.kwargs),
    )
    with mode:
        results = call.op(*args, **kwargs)
    tensors = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)
