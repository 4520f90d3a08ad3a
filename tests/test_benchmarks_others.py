"""Other libraries in the benchmarks, by stand-ins that compute what theirs are documented to."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor

from benchmarks import bench_assign_targets, bench_nms, bench_sigmoid_focal_loss, others
from benchmarks.harness import relative_errors, verify
from fcos_ext import sigmoid_focal_loss_ref

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLASSES = 8


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module, and the packages that it is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[parts[0]]


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes + 1)[:, :classes].float()


class Boxes:
    """detectron2's."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Instances(SimpleNamespace):
    """detectron2's."""

    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        super().__init__(**fields)

    def __len__(self) -> int:
        return len(self.gt_boxes.tensor)


class DetectronFCOS:
    """By loops over images, levels and boxes: the smallest box wins that holds the location, is
    near, and has its farthest side in the range of the level."""

    def _match_anchors(self, boxes: Boxes, anchors: list[Boxes]) -> Tensor:
        found = []
        for number, level in enumerate(anchors):
            center = (level.tensor[:, :2] + level.tensor[:, 2:]) / 2
            stride = level.tensor[0, 2] - level.tensor[0, 0]
            low = 0 if number == 0 else 4 * stride
            high = float("inf") if number == len(anchors) - 1 else 8 * stride
            best = torch.full((len(center),), -1)
            area = torch.full((len(center),), float("inf"))
            for index, box in enumerate(boxes.tensor):
                sides = torch.cat([center - box[:2], box[2:] - center], dim=1)
                away = (center - (box[:2] + box[2:]) / 2).abs().amax(dim=1)
                farthest = sides.amax(dim=1)
                good = (sides > 0).all(dim=1) & (farthest > low) & (farthest < high)
                good &= away < self.center_sampling_radius * stride
                size = (box[2:] - box[:2]).prod()
                better = good & (size < area)
                best[better], area[better] = index, size
            found.append(best)
        return torch.cat(found)

    def label_anchors(self, anchors: list[Boxes], instances: list[Instances]) -> Any:
        labels = []
        for image in instances:
            match = self._match_anchors(image.gt_boxes, anchors)
            classes = torch.cat([image.gt_classes, torch.tensor([self.num_classes])])
            labels.append(classes[match])
        return labels, None


@pytest.fixture
def fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    def jit(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
        return torchvision.ops.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)

    install(monkeypatch, "fvcore.nn", sigmoid_focal_loss_jit=jit).__version__ = "0.1"


@pytest.fixture
def mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    def focal(
        rows: Tensor, target: Tensor, gamma: float, alpha: float, weight: None, reduction: str
    ) -> Tensor:
        assert rows.shape[0] == target.shape[0] and target.min() >= 0 and target.max() == CLASSES
        targets = one_hot(target, CLASSES)
        return torchvision.ops.sigmoid_focal_loss(rows, targets, alpha, gamma, reduction)

    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Any:
        keep = torchvision.ops.nms(boxes, scores, iou_threshold)
        return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict[str, Any]) -> Any:
        assert nms_cfg.pop("type") == "nms"
        far = idxs.to(boxes) * (boxes.max() + 1)
        return nms(boxes + far[:, None], scores, **nms_cfg)

    install(
        monkeypatch, "mmcv.ops", sigmoid_focal_loss=focal, nms=nms, batched_nms=batched_nms
    ).__version__ = "2.2"


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    def focal(
        rows: Tensor, target: Tensor, positives: Tensor, classes: int, alpha: float, gamma: float
    ) -> Tensor:
        assert positives.dtype == torch.float32 and positives.numel() == 1
        assert rows.dim() == target.dim() + 1 and classes * rows.element_size() % 16 == 0
        targets = one_hot(torch.where(target < 0, classes, target), classes)
        loss = torchvision.ops.sigmoid_focal_loss(rows, targets, alpha, gamma, "sum")
        return loss / positives[0]

    install(monkeypatch, "apex.contrib.focal_loss.focal_loss", focal_loss=focal)


@pytest.fixture
def detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"nms": torchvision.ops.nms, "batched_nms": torchvision.ops.batched_nms}
    install(monkeypatch, "detectron2.layers", **functions)
    install(monkeypatch, "detectron2.structures", Boxes=Boxes, Instances=Instances)
    module = "detectron2.modeling.meta_arch.fcos"
    install(monkeypatch, module, FCOS=DetectronFCOS).__version__ = "0.6"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none were installed, whatever is."""
    for name in ("fvcore", "mmcv", "apex", "detectron2"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("nothing")
def test_nothing_installed() -> None:
    assert others.focal_losses(CUDA, torch.float32, CLASSES) == {}
    assert others.nms(0.5) == {}
    assert others.assignments(2, 3, [4]) == {}


@pytest.mark.usefixtures("fvcore", "mmcv", "apex")
def test_where_they_apply() -> None:
    def names(*arguments: Any) -> list[str]:
        return list(others.focal_losses(*arguments))

    everything = ["fvcore 0.1, one-hot given", "mmcv 2.2", "apex of no version"]
    assert names(CUDA, torch.float32, 80) == everything
    assert names(CUDA, torch.float16, 80) == everything
    assert names(CUDA, torch.float16, 4) == everything[:2]
    assert names(CUDA, torch.float32, 91) == everything[:2]
    assert names(CUDA, torch.bfloat16, 80) == everything[:1]
    assert names(CPU, torch.float32, 80) == everything[:1]


def test_one_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mmcv")
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)
    assert others.nms(0.5) == {}


@pytest.mark.usefixtures("fvcore", "mmcv", "apex")
@pytest.mark.parametrize("positives", [0, 7])
@pytest.mark.parametrize("form", bench_sigmoid_focal_loss.FORMS)
def test_focal_losses(form: str, positives: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((2, 20), -1)
    labels.view(-1)[: 3 * positives : 3] = torch.arange(positives)
    levels = [torch.randn(2, CLASSES, *size, generator=generator) for size in ((2, 8), (2, 2))]
    logits: Any = levels
    if form == "rows":
        logits, labels = others.as_rows(levels), labels.flatten()
    rows = torch.where(labels < 0, CLASSES, labels).flatten()
    targets, count = one_hot(rows, CLASSES), (labels >= 0).sum()
    exact = [x.double() for x in levels] if form == "levels" else logits.double()
    truth = sigmoid_focal_loss_ref(exact, labels, normalizer=count)
    losses = others.focal_losses(CUDA, torch.float32, CLASSES)
    assert len(losses) == 3
    for name, loss in losses.items():
        found = loss(logits, labels, targets, count)
        assert relative_errors([found], [truth]) < [1e-6], name


@pytest.mark.usefixtures("mmcv", "detectron2")
def test_nms() -> None:
    for case in bench_nms.cases(CPU, quick=True):
        inputs = case.make_inputs(0)
        for name in ("mmcv 2.2", "detectron2 0.6"):
            assert "refused" not in verify(case, name, inputs), (case.name, name)


@pytest.mark.usefixtures("detectron2")
@pytest.mark.parametrize("boxes", [0, 8])
def test_assignment(boxes: int) -> None:
    case = bench_assign_targets.make_case(CPU, 2, (192, 256), boxes, 1)
    row = verify(case, "detectron2 0.6", case.make_inputs(0))
    assert "refused" not in row, row


@pytest.mark.usefixtures("fvcore")
def test_they_take_part() -> None:
    case = bench_sigmoid_focal_loss.cases(CPU, quick=True)[0]
    name = "fvcore 0.1, one-hot given"
    assert "refused" not in verify(case, name, case.make_inputs(0))
