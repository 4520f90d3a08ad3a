"""Checkpoints of every known layout are converted whole, each tensor to its place."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_cases import ADELAIDET, CASES, D2, MMDET, ORIGINAL
from foreign_checkpoints import Checkpoint, build

from fcos.checkpoint import load_weights
from fcos.convert.conversion import Converted, convert_weights
from fcos.convert.errors import ConvertError
from fcos.convert.reading import ForeignFile
from fcos.model import FCOS

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(checkpoint: Checkpoint, name: str = "any.pth", source: str = "auto") -> Converted:
    return convert_weights(ForeignFile(checkpoint.state, ()), Path(name), source)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_finds_its_place(case: str) -> None:
    name, layout, expected = CASES[case]
    checkpoint = build(layout)
    result = converted(checkpoint, name)
    unused = [key for key in checkpoint.state if re.search(r"level[34].project", key)]
    assert result.family.startswith(layout.family) and result.ignored == unused

    with torch.device("meta"):
        network = FCOS(result.config.model, pretrained_backbone=False)
    load_weights(network, {k: v.to("meta") for k, v in result.state.items()}, case)
    # every tensor holds a number of its own
    number = {key: tensor.flatten()[0].item() for key, tensor in checkpoint.state.items()}
    found = {key: tensor.flatten()[0].item() for key, tensor in result.state.items()}
    for role, theirs in checkpoint.roles.items():
        assert found.pop(role) == number[theirs], f"{role} is not {theirs}"
    if layout.scales:
        assert result.state["head.scales"].tolist() == [number[key] for key in checkpoint.scales]
        found.pop("head.scales")
    assert all(key.endswith("num_batches_tracked") for key in found), found

    tricks = " tricks" in case or "LSJ" in case
    assert result.preset == {
        "original": "original-imprv" if "imprv" in case else "original",
        "adelaidet": "adelaidet-rt" if " RT" in case else "adelaidet",
        "mmdet": "mmdet-tricks" if tricks else "mmdet",
    }.get(layout.family, layout.family)
    for setting, value in expected.items():
        section, _, setting = setting.rpartition(".")
        actual = getattr(getattr(result.config, section or "model"), setting)
        assert actual == value, f"{setting} is {actual}"
    assert len(result.config.model.size_ranges) == layout.levels
    assert result.class_names[:2] == ("person", "bicycle") and result.category_ids[-1] == 90


def test_left_out_on_purpose() -> None:
    checkpoint = build(ADELAIDET)
    statistics = {
        "pixel_mean": torch.tensor(D2).view(3, 1, 1),
        "pixel_std": torch.tensor((57.375, 57.12, 58.395)).view(3, 1, 1),
    }
    counter = {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(3)}
    anchors = {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(1, 4)}
    checkpoint.state.update({**statistics, **counter, **anchors})
    result = converted(checkpoint)
    assert set(result.ignored) == {*statistics, *counter, *anchors}
    # and what they say is used
    assert result.config.data.std == (57.375, 57.12, 58.395)
    assert result.config.data.mean == D2


def test_source_decides_where_the_weights_do_not() -> None:
    checkpoint = build(ORIGINAL)
    assert converted(checkpoint, source="original").config.model.activation == "exp"
    assert converted(checkpoint, source="original-imprv").config.model.activation == "relu"


def test_class_names() -> None:
    checkpoint = build(replace(MMDET, classes=3))
    path = Path("any.pth")
    result = convert_weights(ForeignFile(checkpoint.state, ("a", "b", "c")), path)
    assert (result.class_names, result.category_ids) == (("a", "b", "c"), (1, 2, 3))
    result = convert_weights(ForeignFile(checkpoint.state, ("a", "b")), path)
    assert result.class_names == ("class 1", "class 2", "class 3")
    result = convert_weights(ForeignFile(checkpoint.state, ()), path, class_names="xyz")
    assert result.class_names == ("x", "y", "z")
    with pytest.raises(ConvertError, match="has 3 classes, but 2 names were given"):
        convert_weights(ForeignFile(checkpoint.state, ()), path, class_names="xy")
