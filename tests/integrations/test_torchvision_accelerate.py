"""accelerate() and restore(): what they do to a model, when they refuse, and what they report."""

from __future__ import annotations

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from fcos_ext.integrations.torchvision import (
    AcceleratedFCOS,
    AcceleratedRetinaNet,
    Refused,
    Report,
    accelerate,
    known,
    restore,
    swap,
)
from tests.integrations.torchvision_models import (
    ACCELERATED,
    MODELS,
    Backbone,
    assert_same_detections,
    box_tolerance,
    make_model,
    make_targets,
)

IMAGES = [torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def small(cls: type, **options: Any) -> Any:
    return make_model(cls, 4, min_size=160, max_size=256, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", MODELS)
def test_accelerate_and_restore(cls: type, training: bool) -> None:
    model = small(cls).train(training)
    model.head.eval()  # modes may differ
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes, state = set(vars(model)), torch.get_rng_state()
    for _ in range(2):
        assert isinstance(accelerate(model), Report)
        assert type(model) is ACCELERATED[cls] and isinstance(model, cls)
    assert set(vars(model)) == attributes
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for _ in range(2):
        restore(model)
        assert type(model) is cls


def test_restore_leaves_others_alone() -> None:
    module = nn.Linear(1, 1)
    restore(module)
    assert type(module) is nn.Linear


@pytest.mark.parametrize("cls", MODELS)
def test_report(cls: type) -> None:
    model = small(cls)
    report = accelerate(model)
    text = str(report)
    assert text.startswith(f"torchvision {cls.__name__}, now Accelerated{cls.__name__}\n")
    for part in ("compute_loss", "postprocess_detections", "TorchScript", "on cpu"):
        assert part in text
    lines = re.findall(r"^ +(.+\S) +differs by (\S+), limit (\S+)$", text, re.M)
    names = [name for name, *_ in lines]
    assert "loss classification" in names and "gradient of cls_logits" in names
    assert "weighted gradient of bbox_regression" in names and "detected boxes" in names
    assert len(lines) == len(report.figures) == (13 if cls is FCOS else 10)
    assert all(figure.agrees for figure in report.figures)
    again = str(accelerate(model))
    assert "nothing was done" in again and "differs" not in again


@pytest.mark.parametrize("cls", MODELS)
def test_copies_and_checkpoints(cls: type, tmp_path: Path) -> None:
    model = small(cls).eval()
    truth, tolerance = model(IMAGES), box_tolerance(model)
    plain_state = copy.deepcopy(model.state_dict())
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    fresh = small(cls, seed=1).eval()
    accelerate(fresh)
    fresh.load_state_dict(plain_state)
    for twin in (copy.deepcopy(model), loaded, fresh):
        assert type(twin) is ACCELERATED[cls]
        assert_same_detections(twin(IMAGES), truth, model.detections_per_img, tolerance)
        restore(twin)
        assert_same_detections(twin(IMAGES), truth, model.detections_per_img, tolerance)
    plain = small(cls, seed=1).eval()
    plain.load_state_dict(model.state_dict())
    assert_same_detections(plain(IMAGES), truth, model.detections_per_img, tolerance)


@pytest.mark.parametrize("cls", MODELS)
def test_training_goes_on_after_a_switch(cls: type) -> None:
    """Training and evaluation in turn, with one optimiser through all of it."""
    losses = []
    for switches in (False, True):
        model = small(cls)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        history = []
        for step in range(4):
            if switches and step == 1:
                accelerate(model)
            if switches and step == 3:
                restore(model)
            model.eval()(IMAGES[:1])
            terms = model.train()(IMAGES, make_targets([(120, 160)] * 2, (5, 0), 4, step))
            total = sum(terms.values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append(total.item())
        losses.append(history)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_torchvisions_own_builder() -> None:
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    report = accelerate(model)
    assert type(model) is AcceleratedFCOS and report.figures


def test_half_precision_weights() -> None:
    model = small(FCOS).to(torch.bfloat16)
    accelerate(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


# ---- refusals -----------------------------------------------------------------------------------


class OwnLoss(FCOS):
    def compute_loss(self, *arguments: Any) -> Any:
        return super().compute_loss(*arguments)


class OwnHead(FCOSHead):
    def compute_loss(self, *arguments: Any) -> Any:
        return super().compute_loss(*arguments)


class OwnAnchors(AnchorGenerator):
    def forward(self, *arguments: Any) -> Any:
        return super().forward(*arguments)


def with_own_head() -> FCOS:
    return FCOS(Backbone(), 4, head=OwnHead(32, 1, 4))


def with_own_anchors() -> FCOS:
    sizes = ((8,), (16,), (32,), (64,), (128,))
    return FCOS(Backbone(), 4, anchor_generator=OwnAnchors(sizes, ((1.0,),) * 5))


def with_oblong_anchors() -> FCOS:
    sizes = ((8,), (16,), (32,), (64,), (128,))
    return FCOS(Backbone(), 4, anchor_generator=AnchorGenerator(sizes, ((2.0,),) * 5))


def with_method_on_the_instance() -> FCOS:
    model = small(FCOS)
    model.postprocess_detections = lambda *arguments: []
    return model


def with_other_coder() -> FCOS:
    model = small(FCOS)
    model.head.box_coder.normalize_by_size = False
    return model


def retinanet_with_fcos_head() -> RetinaNet:
    return RetinaNet(Backbone(), 4, head=FCOSHead(32, 9, 4))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OwnLoss(Backbone(), 4), "OwnLoss is a class of its own.*AcceleratedFCOS instead"),
        (with_own_head, "its head, a OwnHead, overrides FCOSHead.compute_loss"),
        (with_own_anchors, "its anchor generator, a OwnAnchors, overrides AnchorGenerator.forward"),
        (with_oblong_anchors, r"its anchors must be squares, one for each location, got \[\["),
        (with_method_on_the_instance, "has a postprocess_detections of its own, set on the inst"),
        (with_other_coder, "its box coders must normalize by size"),
        (retinanet_with_fcos_head, "its head must be a RetinaNetHead, got FCOSHead"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    model = make()
    before = type(model)
    with pytest.raises(Refused, match=f"^accelerate: .*{message}"):
        accelerate(model)
    assert type(model) is before


@pytest.mark.parametrize("module", [nn.Linear(1, 1), nn.Sequential(small(FCOS))], ids=["a", "b"])
def test_other_modules(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="must be a torchvision FCOS or RetinaNet, got"):
        accelerate(module)


def test_patched_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other libraries do it, for the whole process."""

    def compute_loss(self: Any, *arguments: Any) -> Any:
        return {}

    monkeypatch.setattr(FCOS, "compute_loss", compute_loss)
    with pytest.raises(Refused, match="FCOS.compute_loss has been replaced by one of"):
        accelerate(small(FCOS))


def test_changed_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = known.FINGERPRINTS | {(RetinaNet, "compute_loss"): "0"}
    monkeypatch.setattr(known, "FINGERPRINTS", changed)
    with pytest.raises(Refused, match="RetinaNet.compute_loss of this torchvision is not the one"):
        accelerate(small(RetinaNet))


def test_fingerprints() -> None:
    def plain(x, y=2):  # type: ignore[no-untyped-def]
        z = x + y
        return z

    def same(x: int, y: float = 2) -> float:
        """With words."""
        z: float = x + y  # and a comment
        return z

    def other(x, y=2):  # type: ignore[no-untyped-def]
        z = x - y
        return z

    first, second, third = (known.fingerprint(function) for function in (plain, same, other))
    assert first == second != third
    for (cls, method), expected in known.FINGERPRINTS.items():
        assert known.fingerprint(getattr(cls, method)) == expected


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references would be slower than torchvision."""
    monkeypatch.setattr(swap, "kernels", lambda op: frozenset())
    monkeypatch.setattr(swap, "why_missing", lambda device: "not built: no compiler")
    with pytest.raises(Refused, match="there are no kernels for cpu: not built: no compiler"):
        accelerate(small(FCOS))


@pytest.mark.parametrize("cls, name", [(FCOS, "bbox_ctrness"), (RetinaNet, "classification")])
def test_wrong_losses_are_found(cls: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A term off by a thousandth: refused with the figures, and everything is as it was."""
    ours = ACCELERATED[cls]
    right = ours.compute_loss  # type: ignore[attr-defined]

    def wrong(self: Any, *arguments: Any) -> Any:
        losses = right(self, *arguments)
        return losses | {name: losses[name] * 1.001}

    monkeypatch.setattr(ours, "compute_loss", wrong)
    model = small(cls)
    with pytest.raises(Refused, match=rf"(?s)loss {name} +differs by 1.0e-03.*<- too much"):
        accelerate(model)
    assert type(model) is cls


@pytest.mark.parametrize("cls", MODELS)
def test_wrong_detections_are_found(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ACCELERATED[cls]
    right = ours.postprocess_detections  # type: ignore[attr-defined]

    def wrong(self: Any, *arguments: Any) -> Any:
        detections = right(self, *arguments)
        return [{name: value[:-1] for name, value in each.items()} for each in detections]

    monkeypatch.setattr(ours, "postprocess_detections", wrong)
    with pytest.raises(Refused, match=r"number of detections +differs by .*<- too much"):
        accelerate(small(cls))


def test_errors_of_the_check_restore_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        raise KeyError("broken")

    monkeypatch.setattr(AcceleratedRetinaNet, "compute_loss", broken)
    model = small(RetinaNet)
    with pytest.raises(KeyError, match="broken"):
        accelerate(model)
    assert type(model) is RetinaNet


# ---- imports and processes ----------------------------------------------------------------------


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_else_imports_torchvision() -> None:
    run("import fcos_ext, fcos_ext.integrations, sys; assert 'torchvision' not in sys.modules")


def test_without_torchvision() -> None:
    program = """
import sys
sys.modules["torchvision"] = None  # as if it were not there
try:
    import fcos_ext.integrations.torchvision
except ImportError as error:
    print(error)
"""
    assert "fcos_ext.integrations.torchvision: torchvision must be installed" in run(program)


DDP_PROGRAM = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FCOS, RetinaNet
from fcos_ext.integrations.torchvision import accelerate
from tests.integrations.torchvision_models import make_model, make_targets

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for cls in (FCOS, RetinaNet):
        gradients = []
        for ours in (False, True):
            model = make_model(cls, 4, min_size=160, max_size=256).train()
            if ours:
                accelerate(model)
            wrapped = DistributedDataParallel(model)
            images = [torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(rank))]
            targets = make_targets([(120, 160)], [6 * rank], 4, rank)  # the first has no boxes
            sum(wrapped(images, targets).values()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        theirs, ours = gradients
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
    print("equal")
"""


def test_ddp(tmp_path: Path) -> None:
    """Two processes over gloo, one of which has no positives."""
    program = tmp_path / "ddp.py"
    program.write_text(DDP_PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "rendezvous")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
