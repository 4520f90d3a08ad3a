"""Network and post-processing as one module: eager, compiled, exported, and as a graph."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fcos import inference
from fcos.config import Config, ConfigError, DataConfig, ModelConfig, PostprocessConfig, TrainConfig
from fcos.detector import Detector
from fcos.inference import InferencePass
from fcos.model import FCOS
from fcos.postprocess import PaddedDetections, postprocess
from fcos.predict import Predictor
from tests.detector.stand_in_graph import StandInGraph

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Config(
    model=ModelConfig(
        num_classes=3,
        backbone="resnet10_half",
        backbone_weights="none",
        frozen_batch_norm=True,
        frozen_stages=0,
        strides=(8, 16, 32),
        size_ranges=((0, 32), (32, 64), (64, math.inf)),
        fpn_channels=64,
        tower_convs=1,
    ),
    postprocess=PostprocessConfig(score_threshold=0.3, max_detections=20),
    data=DataConfig(min_sizes=(64,), max_size=128),
)


@pytest.fixture(scope="module")
def network() -> FCOS:
    """Random, with detections everywhere."""
    torch.manual_seed(0)
    network = FCOS(CONFIG.model).eval()
    with torch.no_grad():
        network.head.cls_logits.weight.mul_(30)
        network.head.cls_logits.bias.fill_(-0.5)
        network.head.ltrb.bias.fill_(1.0)
    return network


# Steps between locations that follow from the size of the images.
LIKE_TORCHVISION = replace(
    CONFIG,
    model=replace(CONFIG.model, locations="torchvision"),
    postprocess=replace(
        CONFIG.postprocess, threshold_on="final", keep_empty=True, overlaps="torchvision"
    ),
)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, LIKE_TORCHVISION], ids=["", "torchvision"])


def batch(images: int = 2, height: int = 64, width: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    sizes = torch.tensor([[height - 4, width - 2 * i] for i in range(images)])
    return torch.randn(images, 3, height, width, generator=generator), sizes, sizes * 2


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """But for rounding, which other kernels for convolutions have otherwise."""
    found, expected = PaddedDetections(*a), PaddedDetections(*b)
    assert torch.equal(found.counts.cpu(), expected.counts.cpu())
    assert torch.equal(found.labels.cpu(), expected.labels.cpu())
    torch.testing.assert_close(found.scores.cpu(), expected.scores.cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes.cpu(), rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_is_network_and_postprocessing(network: FCOS) -> None:
    images, sizes, originals = batch()
    found = Detector(network, CONFIG)(images, sizes, originals)
    expected = postprocess(network(images), sizes, originals, CONFIG.model, CONFIG.postprocess)
    assert expected.counts.min() > 3
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@CONFIGS
def test_compiles_whole(config: Config, network: FCOS) -> None:
    torch._dynamo.reset()
    detector = Detector(network, config)
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
    for arguments in (batch(), batch(1), batch(2, 96, 64)):
        assert_same(compiled(*arguments), detector(*arguments))


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@CONFIGS
def test_exports_whole(strict: bool, config: Config, network: FCOS, tmp_path: Path) -> None:
    detector = Detector(network, config)
    images = torch.export.Dim("images", min=1, max=64)
    height, width = (32 * torch.export.Dim(name, min=1, max=64) for name in ("h", "w"))
    shapes = ({0: images, 2: height, 3: width}, {0: images}, {0: images})
    program = torch.export.export(detector, batch(), dynamic_shapes=shapes, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "fcos_ext.postprocess.default" in called
    torch.export.save(program, tmp_path / "detector.pt2")
    loaded = torch.export.load(tmp_path / "detector.pt2").module()
    for arguments in (batch(), batch(1), batch(3, 96, 160)):
        assert_same(loaded(*arguments), detector(*arguments))


def test_exported_program_needs_the_kernels_alone(network: FCOS, tmp_path: Path) -> None:
    arguments = batch()
    program = torch.export.export(Detector(network, CONFIG), arguments)
    torch.export.save(program, tmp_path / "detector.pt2")
    torch.save(arguments, tmp_path / "batch.pt")
    code = (
        "import sys, torch, fcos_ext\n"
        "detect = torch.export.load('detector.pt2').module()\n"
        "torch.save(detect(*torch.load('batch.pt')), 'found.pt')\n"
        "assert 'fcos' not in sys.modules and 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        assert_same(torch.load(tmp_path / "found.pt"), Detector(network, CONFIG)(*arguments))


@torch.no_grad()
def test_bfloat16(network: FCOS) -> None:
    arguments = batch()
    exact = PaddedDetections(*Detector(network, CONFIG)(*arguments))
    half = PaddedDetections(*Detector(network, CONFIG, amp="bf16")(*arguments))
    assert half.boxes.dtype == half.scores.dtype == torch.float32
    assert not torch.equal(half.scores, exact.scores)
    torch.testing.assert_close(half.scores[:, 0], exact.scores[:, 0], rtol=0.05, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_inference_pass(
    channels_last: bool, graph: bool, device: str, network: FCOS, monkeypatch: pytest.MonkeyPatch
) -> None:
    if graph and device == "cpu":
        monkeypatch.setattr(inference, "GraphedFunction", StandInGraph)
        StandInGraph.replays = 0
    config = replace(CONFIG, train=TrainConfig(channels_last=channels_last))
    network = copy.deepcopy(network).to(device)
    detect = InferencePass(network, config, torch.device(device), graph=graph)
    for arguments in (batch(1), batch(2), *[batch(2)] * 6, batch(1)):
        with torch.no_grad():
            expected = Detector(network, config)(*(x.to(device) for x in arguments))
        found = detect(*arguments)
        assert found.boxes.device.type == device
        assert_same(found, expected)
    assert not network.training
    if graph and device == "cpu":
        assert StandInGraph.replays == 4


def test_graph_needs_a_gpu(network: FCOS) -> None:
    with pytest.raises(ConfigError, match="graph needs a GPU, got device cpu"):
        Predictor(network, CONFIG, "abc", device="cpu", graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_waits_for_nothing(graph: bool, network: FCOS) -> None:
    detect = InferencePass(copy.deepcopy(network).cuda(), CONFIG, torch.device("cuda"), graph=graph)
    pinned = [value.pin_memory() for value in batch()]
    for _ in range(5):
        detect(*pinned)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = detect(*pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.boxes.is_cuda
