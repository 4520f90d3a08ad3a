"""The libraries, built under one torch, work under another: run by the interpreter of the other.

    python -m venv .venv-abi && .venv-abi/bin/pip install torch==2.13.0 numpy
    PYTHONPATH=. .venv-abi/bin/python tests/abi/check_second_torch.py

Every compiled operator runs on the CPU, forward and backward, and is compared with its reference
in float64. Needs nothing but torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fcos_ext
from fcos_ext import _library


def check_sigmoid_focal_loss() -> None:
    labels = torch.randint(-2, 80, (300,))
    count = (labels >= 0).sum()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(300, 80).mul(3).to(dtype).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        for reduction in ("none", "sum"):
            normalizer = count if reduction == "sum" else None
            loss, truth = (
                function(x, labels, 0.3, 1.5, reduction=reduction, normalizer=normalizer)
                for function, x in (
                    (fcos_ext.sigmoid_focal_loss, logits),
                    (fcos_ext.sigmoid_focal_loss_ref, exact),
                )
            )
            compare(loss, truth)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            compare(gradient, torch.autograd.grad(truth.sum(), exact)[0])
        fused = fcos_ext.sigmoid_focal_loss(logits, labels, fused_gradient=True)
        truth = fcos_ext.sigmoid_focal_loss_ref(exact, labels)
        (gradient,) = torch.autograd.grad(fused, logits, torch.full_like(fused, 2))
        compare(gradient, 2 * torch.autograd.grad(truth, exact)[0])


def check_nms() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        corner, sides = torch.rand(2, 500, 2).mul(100).unbind()
        boxes = torch.cat((corner, corner + sides), dim=1).to(dtype)
        scores, groups = torch.rand(500).to(dtype), torch.randint(-1, 3, (500,))
        for limit in (None, 10):
            kept = fcos_ext.nms(boxes, scores, 0.4, max_detections=limit)
            assert torch.equal(kept, fcos_ext.nms_ref(boxes, scores, 0.4, max_detections=limit))
            kept, exact = (
                function(boxes, scores, groups, 0.4, max_detections=limit)
                for function in (fcos_ext.batched_nms, fcos_ext.batched_nms_ref)
            )
            assert torch.equal(kept, exact)


def check_assign_targets() -> None:
    """Every list and number in turn: the stable ABI does not compare them with the schema."""
    strides, sizes = [8, 16, 32], [(24, 33), (12, 17), (6, 9)]
    ranges = [(0.0, 32.0), (32.0, 64.0), (64.0, float("inf"))]
    standard: dict[str, Any] = {"strides": strides, "feature_sizes": sizes, "size_ranges": ranges}
    changes: list[dict[str, Any]] = [
        {"center_sampling_radius": 0.0},
        {"boundary": "strict"},
        {"boundary": "half_open"},
        {"normalize": True},
        {"ties": "torchvision"},
        {"corners": "pixels"},
    ]
    grid = fcos_ext.Grid(step=(9.0, 10.5), first=(3.0, 5.5), unit=8.0, reach=14.5)
    for change in ({"step": (8.0, 10.5)}, {"first": (3.0, 9.0)}, {"unit": 5.0}, {"reach": 9.0}):
        strides_ = [grid._replace(**change), *strides[1:]]
        changes.append({"strides": strides_, "normalize": True})
    for i in range(3):
        changes.append({"strides": [*strides[:i], strides[i] + 5, *strides[i + 1 :]]})
        for size in ((5, sizes[i][1]), (sizes[i][0], 7)):
            changes.append({"feature_sizes": [*sizes[:i], size, *sizes[i + 1 :]]})
        for ends in ((ranges[i][0] + 25.5, ranges[i][1]), (ranges[i][0], ranges[i][0] + 12.25)):
            changes.append({"size_ranges": [*ranges[:i], ends, *ranges[i + 1 :]]})
    # of sizes that make each change show; by themselves, one on the border between two levels, two
    # whose areas are so close that they are a tie for torchvision, and two whose areas are in
    # another order where they end at pixels
    corner = torch.stack([torch.randint(20, (60,)), torch.randint(50, (60,))], dim=1).mul(4.0)
    boxes = torch.cat([corner, corner + 2.0 ** torch.randint(4, 8, (60, 2))], dim=1)
    boxes[0] = torch.tensor([212.0, 100.0, 276.0, 164.0])
    boxes[1:3] = torch.tensor([[220.0, 8.0, 250.0, 40.0], [220.0, 8.0, 250.0, 39.96]])
    boxes[3:5] = torch.tensor([[109.0, 125.0, 123.0, 139.0], [92.0, 130.0, 140.0, 134.0]])
    labels = torch.randint(80, (60,))
    packed = {"boxes": boxes, "labels": labels, "offsets": torch.tensor([0, 41, 41, 60])}
    padded = {"boxes": boxes.view(3, 20, 4), "labels": labels.view(3, 20).int()}
    padded["counts"] = torch.tensor([20, 0, 13])
    before = None
    for tensors in (packed, padded, packed | {"boxes": boxes.double()}):
        for options in ({}, *changes):
            arguments = tensors | standard | options
            results, truth = (
                function(**arguments)
                for function in (fcos_ext.assign_targets, fcos_ext.assign_targets_ref)
            )
            for actual, exact in zip(results, truth, strict=True):
                assert torch.equal(actual, exact), options
            before = results if not options else before
            assert not options or not all(map(torch.equal, results, before)), options


def check_padded_batched_nms() -> None:
    boxes, scores, labels = candidates()
    for dtype in (torch.float64, torch.float32):
        for class_agnostic in (False, True):
            arguments = boxes, scores.to(dtype), labels, 0.4, 50
            kept, truth = (
                function(*arguments, class_agnostic=class_agnostic)
                for function in (fcos_ext.padded_batched_nms, fcos_ext.padded_batched_nms_ref)
            )
            assert torch.equal(kept.keep, truth.keep) and torch.equal(kept.counts, truth.counts)


def check_soft_nms() -> None:
    arguments = *candidates(), 0.3, 50
    for method in ("linear", "gaussian"):
        for options in ({"score_threshold": 0.1}, {"sigma": 0.2, "class_agnostic": True}):
            kept, truth = (
                function(*arguments, method=method, **options)
                for function in (fcos_ext.padded_soft_nms, fcos_ext.padded_soft_nms_ref)
            )
            assert torch.equal(kept.keep, truth.keep) and torch.equal(kept.counts, truth.counts)
            compare(kept.scores, truth.scores.double())


def check_postprocess() -> None:
    """Every number in turn, as in check_assign_targets."""
    changes: list[dict[str, Any]] = [
        {"strides": (8, 12)},
        {"normalize_ltrb": False},
        {"score": "product"},
        {"score_threshold": 0.3},
        {"threshold_on": "final"},
        {"topk_candidates": 20},
        {"topk_candidates": 20, "topk_by": "class"},
        {"iou_threshold": 0.1},
        {"max_detections": 9},
        {"class_agnostic": True},
        {"clip": False},
        {"locations": "torchvision"},
        {"keep_empty": True},
        {"overlaps": "torchvision"},
        {"corners": "pixels"},
        {"corners": "pixels", "overlaps": "edges"},
        {"centerness": False},
        {"anchors": True},
        {"anchors": True, "normalize_ltrb": False},
        {"anchors": True, "coding": "deltas"},
        {"anchors": True, "coding": "deltas", "delta_limit": 0.3},
        {"anchors": True, "coding": "deltas", "delta_weights": (3.0, 1.0, 1.0, 1.0)},
        {"anchors": True, "coding": "deltas", "delta_weights": (1.0, 3.0, 1.0, 1.0)},
        {"anchors": True, "coding": "deltas", "delta_weights": (1.0, 1.0, 3.0, 1.0)},
        {"anchors": True, "coding": "deltas", "delta_weights": (1.0, 1.0, 1.0, 3.0)},
    ]
    standard: dict[str, Any] = {"strides": (8, 16), "score_threshold": 0.2, "max_detections": 99}
    # the larger ones have more candidates than the buffers of the CUDA kernels
    for levels, mean, options in (
        (((6, 8), (3, 4)), -1.5, ({}, *changes)),
        (((40, 64), (20, 32)), 2.0, ({"max_detections": 20},)),
    ):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            logits, ltrb, centerness = (
                [torch.randn(2, channels, *size) for size in levels] for channels in (5, 4, 1)
            )
            predictions = (
                [(x + mean).to(dtype) for x in logits],
                [x.abs().to(dtype) for x in ltrb],
                [x.to(dtype) for x in centerness],
            )
            for x, distances in zip(predictions[0], predictions[1], strict=True):
                x[:, 1, ::2], distances[:, 0, ::2], distances[:, 2, ::2] = 3.0, -1.0, -1.0
            corners = [torch.rand(height * width, 2) * 40 for height, width in levels]
            anchors = [torch.cat([x, x + 9 + x.flip(1) / 4], dim=1).to(dtype) for x in corners]
            sizes = torch.tensor([[40, 55], [48, 64]])
            standard_results: Any = None
            # of two dtypes, which is enough to see each number arrive
            for changed in options if dtype in (torch.float32, torch.bfloat16) else options[:1]:
                plain = dict(changed)
                given = {"anchors": anchors if plain.pop("anchors", False) else None}
                scored = plain.pop("centerness", True)
                results, truth = (
                    function(
                        predictions if scored else (*predictions[:2], None),
                        sizes,
                        fcos_ext.PostprocessOptions(**(standard | plain)),
                        original_sizes=sizes * 2,
                        **given,
                    )
                    for function in (fcos_ext.postprocess, fcos_ext.postprocess_ref)
                )
                for actual, exact in zip(results, truth, strict=True):
                    assert torch.equal(actual, exact), changed
                if not changed:
                    standard_results = results
                elif standard_results is not None and "overlaps" not in changed:  # a matter of bits
                    pairs = zip(results, standard_results, strict=True)
                    assert not all(torch.equal(*pair) for pair in pairs), changed


def candidates() -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [3, 400, 4], scores, and labels from -1."""
    corner, sides = torch.rand(3, 400, 2) * 300, torch.rand(3, 400, 2) * 50 + 10
    boxes = torch.cat([corner, corner + sides], dim=-1)
    return boxes, torch.rand(3, 400), torch.randint(-1, 3, (3, 400))


def make_boxes(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pred, target = (torch.rand(2, 4, 300) * 9 + 0.1 for _ in range(2))
    pred = pred.to(dtype).transpose(1, 2).requires_grad_()
    return pred, target.transpose(1, 2), torch.rand(2, 300), torch.randint(-2, 9, (2, 300))


def check_iou_loss() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        pred, target, weights, labels = make_boxes(dtype)
        exact = pred.detach().double().requires_grad_()
        for kind in ("iou", "linear_iou", "giou", "diou", "ciou"):
            for reduction in ("none", "sum", "mean"):
                loss, truth = (
                    function(x, target, weights, labels=labels, kind=kind, reduction=reduction)
                    for function, x in (
                        (fcos_ext.iou_loss, pred),
                        (fcos_ext.iou_loss_ref, exact),
                    )
                )
                compare(loss, truth)
                (gradient,) = torch.autograd.grad(loss.sum(), pred)
                compare(gradient, torch.autograd.grad(truth.sum(), exact)[0])


def check_box_and_centerness_loss() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        pred, target, given, labels = make_boxes(dtype)
        scores = torch.randn(2, 300).to(dtype).requires_grad_()
        exact = [x.detach().double().requires_grad_() for x in (pred, scores)]
        for quality in (None, given):
            sums, truth = (
                function(*x, target, labels, centerness_target=quality, kind="ciou")
                for function, x in (
                    (fcos_ext.box_and_centerness_loss, (pred, scores)),
                    (fcos_ext.box_and_centerness_loss_ref, exact),
                )
            )
            assert sums.num_pos.item() == truth.num_pos.item()
            for one, true_one in zip(sums[:3], truth[:3], strict=True):
                compare(one, true_one)
            gradients = torch.autograd.grad(sums.box + sums.centerness, (pred, scores))
            true_gradients = torch.autograd.grad(truth.box + truth.centerness, exact)
            for one, true_one in zip(gradients, true_gradients, strict=True):
                compare(one, true_one)


def make_levels(*dtypes: torch.dtype) -> list[list[Tensor]]:
    """Logits of 5 classes, distances and centerness of two images, on levels of both layouts."""
    sizes = [(8, 12), (4, 6)]
    parts: list[list[Tensor]] = []
    for channels, dtype in zip((5, 4, 1), dtypes, strict=True):
        levels = [torch.randn(2, channels, *size) for size in sizes]
        if channels == 4:
            levels = [level.abs() + 0.1 for level in levels]
        levels[1] = levels[1].contiguous(memory_format=torch.channels_last)
        parts.append([level.to(dtype).requires_grad_() for level in levels])
    return parts


def compare_gradients(terms: Any, exact: Any, leaves: list[Tensor], true_leaves: Any) -> None:
    for share in (1.0, 2.0):
        gradients, truth = (
            torch.autograd.grad(
                x, y, [torch.full_like(term, share) for term in x], retain_graph=True
            )
            for x, y in ((terms, leaves), (exact, true_leaves))
        )
        for one, true_one in zip(gradients, truth, strict=True):
            compare(one, true_one)


def check_box_loss_of_levels() -> None:
    """Every number in turn."""
    changes: list[dict[str, Any]] = [
        {},
        {"num_classes": 4},
        {"kind": "iou"},
        {"weighted": False},
        {"quality": "iou"},
        {"smooth": 1.0},
        {"eps": 0.5},
        {"normalizers": torch.tensor([3.0, 0.5])},
    ]
    for dtype in (torch.float64, torch.bfloat16):
        _, *parts = make_levels(dtype, dtype, dtype)
        exact = [[x.detach().double().requires_grad_() for x in part] for part in parts]
        target, labels = torch.rand(2, 120, 4) * 4 + 0.1, torch.randint(-2, 9, (2, 120))
        before = None
        for options in changes:
            for fused in (False, True):
                sums, truth = (
                    function(*x, target, labels, fused_gradient=fused, **options)
                    for function, x in (
                        (fcos_ext.box_and_centerness_loss, parts),
                        (fcos_ext.box_and_centerness_loss_ref, exact),
                    )
                )
                assert torch.equal(torch.stack(sums[3:]), torch.stack(truth[3:]))
                for one, true_one in zip(sums[:3], truth[:3], strict=True):
                    compare(one, true_one)
                leaves, true_leaves = ([*x[0], *x[1]] for x in (parts, exact))
                compare_gradients(sums[:2], truth[:2], leaves, true_leaves)
            values = torch.stack(sums[:2]).detach()
            before = values if before is None else before
            assert not options or not torch.equal(values, before), options


def check_fcos_loss() -> None:
    corner = torch.rand(9, 2) * 40
    boxes = torch.cat([corner, corner + torch.rand(9, 2) * 50 + 10], dim=1)
    truth = fcos_ext.GroundTruth(boxes, torch.randint(5, (9,)), torch.tensor([0, 4, 9]))
    options = fcos_ext.FCOSLossOptions(
        strides=(8, 16), size_ranges=((0, 32), (32, float("inf"))), quality="iou", iou_smooth=1.0
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        parts = make_levels(dtype, dtype, dtype)
        exact = [[x.detach().double().requires_grad_() for x in part] for part in parts]
        leaves, true_leaves = ([x for part in y for x in part] for y in (parts, exact))
        ours = fcos_ext.fcos_loss(tuple(parts), truth, options)
        best = fcos_ext.fcos_loss_ref(tuple(exact), truth, options)
        assert ours.num_pos.item() == best.num_pos.item() > 0
        for one, true_one in zip(ours[:3], best[:3], strict=True):
            compare(one, true_one)
        compare_gradients(ours[:3], best[:3], leaves, true_leaves)
    labels, values = torch.randint(-2, 5, (2, 500)), torch.rand(2, 500)
    for classes in (None, 3, 4):
        sums = fcos_ext.fcos_normalizers(labels, values, classes)
        exact_sums = fcos_ext.fcos_normalizers_ref(labels, values, classes)
        compare(sums, exact_sums.double())


def compare(actual: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(actual.dtype).eps
    rtol = 1e-12 if actual.dtype == torch.float64 else max(eps, 1e-5)
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=min(eps, 1e-6))


CHECKS: dict[str, Callable[[], None]] = {
    "assign_targets": check_assign_targets,
    "box_and_centerness_loss": check_box_and_centerness_loss,
    "box_and_centerness_loss of levels": check_box_loss_of_levels,
    "fcos_loss": check_fcos_loss,
    "iou_loss": check_iou_loss,
    "nms": check_nms,
    "padded_batched_nms": check_padded_batched_nms,
    "postprocess": check_postprocess,
    "sigmoid_focal_loss": check_sigmoid_focal_loss,
    "soft_nms": check_soft_nms,
}


class CalledOperators(TorchDispatchMode):
    """Takes down the names of our operators that are called, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fcos_ext":
            self.names.add(func.name().removeprefix("fcos_ext::"))
        return func(*args, **(kwargs or {}))


def main() -> None:
    built_with = _library.build_info().get("torch", "an unknown torch")
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {python}, torch {torch.__version__}; libraries built with {built_with}")
    if reason := _library.why_missing("cpu"):
        sys.exit(f"the CPU library does not load: {reason}")

    names = torch._C._dispatch_get_all_op_names()
    operators = {n.removeprefix("fcos_ext::") for n in names if n.startswith("fcos_ext::")}
    for name in sorted(operators):
        if "cpu" not in _library.kernels(name):
            sys.exit(f"{name} has no CPU kernel")

    torch.manual_seed(0)
    with CalledOperators() as called:
        for name, check in CHECKS.items():
            check()
            print(f"{name} agrees with the reference")
    if unchecked := operators - called.names:
        sys.exit(f"operators that this program does not check: {', '.join(sorted(unchecked))}")

    reason = _library.why_missing("cuda")
    if torch.version.cuda is None and reason is None:
        sys.exit("the CUDA library claims to have loaded under a torch without CUDA")
    print(f"CUDA kernels: {'loaded' if reason is None else 'no, ' + reason.strip()}")


if __name__ == "__main__":
    main()
