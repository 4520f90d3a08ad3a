"""Writes docs/accuracy.md: how far losses and gradients are from the exact ones, by dtype.

    python -m benchmarks.accuracy [--check]

Every function gets the same numbers, already rounded to the dtype; the truth is our reference in
float64 on those numbers. What is compared: our functions, their references in plain PyTorch,
torchvision's, and the exact values rounded once to the dtype, which nothing can beat.

``docs/accuracy.md`` is made from the rows in ``benchmarks/results/accuracy.json``, to the letter.
The rows themselves may differ between processors, by how their vector units compute exponentials
and whether they fuse multiplications with additions; ``--check`` allows for that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision.ops
from torch import Tensor

from fcos_ext import iou_loss, iou_loss_ref, sigmoid_focal_loss, sigmoid_focal_loss_ref

from . import shapes

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "accuracy.json"
PAGE = ROOT / "docs" / "accuracy.md"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS, REFERENCE, TORCHVISION = "fcos_ext", "reference, eager", "torchvision"
EXACT = "exact, rounded once"

#: Loss of each row or logit from the inputs; differentiable in the first of them.
Loss = Callable[..., Tensor]
Row = dict[str, Any]

FOCAL_ROWS, BOXES = 1000, 20_000
#: Mean and standard deviation of the logits; None: +100 and -100 in turn.
FOCAL_SETTINGS: dict[str, tuple[float, float] | None] = {
    "initial prior: mean logit -4.6": (shapes.LOGITS_MEAN, shapes.LOGITS_STD),
    "trained: mean logit -8": (-8.0, shapes.LOGITS_STD),
    "logits of +100 and -100": None,
}
IOU_KINDS = ("giou", "diou", "ciou")
TORCHVISION_IOU = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}


def relative_errors(actual: Tensor, exact: Tensor) -> dict[str, Any]:
    """Median and largest relative error, the share of elements that came out as 0, and how many
    came out as NaN or infinite; of those whose exact value is not 0 in float32 either."""
    chosen = exact.abs() >= torch.finfo(torch.float32).tiny
    actual, exact = actual.double()[chosen], exact[chosen]
    finite = actual.isfinite()
    errors = ((actual - exact) / exact).abs()[finite]
    return {
        "median": errors.median().item(),
        "max": errors.max().item(),
        "zeros": (actual == 0).double().mean().item(),
        "not_finite": int((~finite).sum()),
    }


def compare(
    settings: Row,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    truth: Loss,
    losses: dict[str, Loss],
) -> Iterator[Row]:
    """A row for each of ``losses``, and one for the rounding alone."""

    def run(loss: Loss, first: Tensor) -> tuple[Tensor, Tensor]:
        first = first.detach().requires_grad_()
        each = loss(first, *inputs[1:])
        return each.detach(), torch.autograd.grad(each.sum(), first)[0]

    exact = run(truth, inputs[0].double())
    results = {name: run(loss, inputs[0]) for name, loss in losses.items()}
    results[EXACT] = (exact[0].to(dtype), exact[1].to(dtype))
    for name, (loss, gradient) in results.items():
        yield settings | {
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            "loss": relative_errors(loss, exact[0]),
            "gradient": relative_errors(gradient, exact[1]),
        }


def focal_rows() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    classes = shapes.NUM_CLASSES
    labels = shapes.make_labels(FOCAL_ROWS, classes, generator)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), classes) * (labels >= 0)[:, None]
    noise = torch.randn(FOCAL_ROWS, classes, generator=generator)
    signs = torch.where(torch.rand(noise.shape, generator=generator) < 0.5, -1.0, 1.0)
    losses: dict[str, Loss] = {
        OURS: lambda x, y, t: sigmoid_focal_loss(x, y, reduction="none"),
        REFERENCE: lambda x, y, t: sigmoid_focal_loss_ref(x, y, reduction="none"),
        TORCHVISION: lambda x, y, t: torchvision.ops.sigmoid_focal_loss(x, t.to(x.dtype)),
    }
    for (name, parameters), dtype in itertools.product(FOCAL_SETTINGS.items(), DTYPES):
        logits = 100 * signs if parameters is None else noise * parameters[1] + parameters[0]
        settings = {"op": "sigmoid_focal_loss", "setting": name}
        inputs = (logits.to(dtype), labels, one_hot)
        yield from compare(settings, dtype, inputs, losses[REFERENCE], losses)


def iou_rows() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    target = 4 + 120 * torch.rand(BOXES, 4, generator=generator)
    pred = target * torch.exp(0.3 * torch.randn(BOXES, 4, generator=generator))
    height, width = shapes.IMAGE_SIZE
    locations = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width, height])

    def corners(ltrb: Tensor, locations: Tensor) -> Tensor:
        return torch.cat((locations - ltrb[:, :2], locations + ltrb[:, 2:]), dim=1)

    for kind, dtype in itertools.product(IOU_KINDS, DTYPES):

        def ours(x: Tensor, y: Tensor, at: Tensor, kind: Any = kind) -> Tensor:
            return iou_loss(x, y, kind=kind, reduction="none")

        def reference(x: Tensor, y: Tensor, at: Tensor, kind: Any = kind) -> Tensor:
            return iou_loss_ref(x, y.to(x.dtype), kind=kind, reduction="none")

        def theirs(x: Tensor, y: Tensor, at: Tensor, kind: Any = kind) -> Tensor:
            return TORCHVISION_IOU[kind](corners(x, at), corners(y, at))

        settings = {"op": "iou_loss", "setting": kind}
        inputs = (pred.to(dtype), target.to(dtype), locations.to(dtype))
        losses: dict[str, Loss] = {OURS: ours, REFERENCE: reference, TORCHVISION: theirs}
        yield from compare(settings, dtype, inputs, reference, losses)


def make_rows() -> list[Row]:
    return [*focal_rows(), *iou_rows()]


# ---- the page -----------------------------------------------------------------------------------

INTRODUCTION = """\
# Accuracy

Written by `python -m benchmarks.accuracy` from
[benchmarks/results/accuracy.json](../benchmarks/results/accuracy.json); CPU kernels.

Every function gets the same numbers, already rounded to the dtype. Errors are relative, element by
element, against float64 on those numbers: median and largest over the elements that are at least
1.2e-38, the smallest ordinary float32. "flushed" is the share of their gradients that came out as
0, an error of 100 %; "NaN, inf" counts what came out as no number. "exact, rounded once" is what
no function that returns this dtype can beat: in float16 small gradients vanish, whoever computes
them, which is what loss scaling is for. Losses are unreduced; their gradient is that of the sum.
"""

SECTIONS = {
    "sigmoid_focal_loss": f"""\
{FOCAL_ROWS:,} locations of {shapes.NUM_CLASSES} classes, {shapes.POSITIVE_SHARE:.1%} positive,
alpha 0.25, gamma 2.
Ours computes in float32 and rounds once; of a float32 logit it takes 1 - p from e^x, instead of
subtracting.
torchvision's takes one-hot targets in the dtype of the logits and computes in that dtype; of logits
that are cast to float32 first it has the errors of the float32 rows, for twice the memory.
""",
    "iou_loss": f"""\
{BOXES:,} pairs of boxes with sides of 8 to 250 pixels at random places of a picture of
{shapes.IMAGE_SIZE[0]} x {shapes.IMAGE_SIZE[1]}.
torchvision's functions compute in float32, but take corners: distances are added to locations
first, in the dtype. That is where the error comes from in half precision, as coordinates around
1,000 lie 4 apart in bfloat16 and 0.5 in float16.
""",
}


def page(rows: Sequence[Row]) -> str:
    parts = [INTRODUCTION]
    for op, text in SECTIONS.items():
        parts.append(f"\n## {op}\n\n{text}")
        of_op = [row for row in rows if row["op"] == op]
        for setting, group in itertools.groupby(of_op, lambda row: row["setting"]):
            parts.append(f"\n### {setting}\n\n" + "\n".join(_table(list(group))) + "\n")
    return "".join(parts)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| dtype | function | loss: median | max | gradient: median | max | flushed | NaN, inf |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        loss, gradient = row["loss"], row["gradient"]
        cells = [row["dtype"], row["provider"]]
        cells += [f"{part[key]:.1e}" for part in (loss, gradient) for key in ("median", "max")]
        cells += [f"{gradient['zeros']:.1%}", str(loss["not_finite"] + gradient["not_finite"])]
        yield f"| {' | '.join(cells)} |"


def differences(rows: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """What in one measurement is not as in another: the median of errors by more than a factor of
    2, or the largest, which hangs on one element, by 10, where that is more than the last bits of
    float32; shares by more than half a point."""
    names = ("op", "setting", "dtype", "provider")
    if [[row[n] for n in names] for row in rows] != [[row[n] for n in names] for row in others]:
        return ["the rows are of other cases"]
    found = []
    for row, other in zip(rows, others, strict=True):
        for part, key in itertools.product(("loss", "gradient"), row["loss"]):
            a, b = row[part][key], other[part][key]
            low, high = sorted((a, b))
            if key == "zeros":
                same = high - low <= 0.005
            elif key == "not_finite":
                same = a == b
            else:
                same = high <= (2 if key == "median" else 10) * low + 1e-6
            if not same:
                found.append(f"{', '.join(row[n] for n in names)}: {part} {key} {a}, was {b}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    rows = make_rows()
    if not options.check:
        ROWS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        PAGE.write_text(page(rows))
        return 0
    kept = json.loads(ROWS.read_text())
    found = differences(rows, kept)
    if PAGE.read_text() != page(kept):
        found.append(f"{PAGE.name} is not made from {ROWS.name}")
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
