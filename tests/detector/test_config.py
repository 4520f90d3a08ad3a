"""Settings to YAML and back, and what is said about settings that are wrong."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fcos.config import Config, ConfigError, ModelConfig
from fcos.config_files import from_dict, load_yaml, save_yaml, to_dict
from fcos.limits import check
from fcos.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_round_trip(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]()
    config = replace(
        config,
        model=replace(config.model, num_classes=3),
        data=replace(config.data, train_annotations=Path("a folder/annotations: 1.json")),
        train=replace(config.train, output=Path("~/runs/#1"), learning_rate=1e-5),
    )
    save_yaml(config, tmp_path / "config.yaml")
    loaded = load_yaml(tmp_path / "config.yaml")
    assert loaded == config
    # equality takes lists for tuples of other types, text for nothing
    assert type(loaded.model.size_ranges[-1]) is tuple
    assert loaded.model.size_ranges[-1][1] == math.inf
    assert isinstance(loaded.data.train_annotations, Path)
    assert loaded.data.val_annotations is None
    assert [type(lower) for lower, _ in loaded.model.size_ranges] == [float] * len(
        loaded.model.strides
    )


def test_file_holds_plain_values(tmp_path: Path) -> None:
    """A person reads and edits it: no tags of Python's, and the order of the dataclasses."""
    save_yaml(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "!!" not in text
    assert list(yaml.safe_load(text)) == ["model", "loss", "postprocess", "data", "train"]
    assert to_dict(Config())["data"]["train_annotations"] is None


def test_settings_not_given_keep_their_default(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {iterations: 7}\n")
    assert load_yaml(path) == replace(Config(), train=replace(Config().train, iterations=7))
    path.write_text("# nothing\n")
    assert load_yaml(path) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {iteration: 7}", r"unknown setting train.iteration; did you mean iterations\?"),
        ("trian: {}", r"unknown setting trian; did you mean train\?"),
        ("train: {zzz: 7}", "unknown setting train.zzz; known are output, iterations"),
        ("train: {iterations: 7.5}", "train.iterations must be int, got 7.5"),
        ("train: {iterations: true}", "train.iterations must be int, got True"),
        ("train: {learning_rate: fast}", "train.learning_rate must be float, got 'fast'"),
        ("train: {learning_rate: true}", "train.learning_rate must be float, got True"),
        ("train: {compile: 1}", "train.compile must be bool, got 1"),
        ("model: {activation: elu}", "model.activation must be one of exp, relu, got 'elu'"),
        ("model: {strides: 8}", "model.strides must be .*, got 8"),
        ("model: {strides: [8, a]}", r"model.strides must be .*, got \[8, 'a'\]"),
        ("model: {size_ranges: [[0, 1, 2]]}", "model.size_ranges must be .*"),
        ("data: {mean: [0.1, 0.2]}", "data.mean must be .*"),
        ("data: {train_images: 3}", r"data.train_images must be .*Path.*, got 3"),
        ("train: 3", "train must be a mapping, got 3"),
        ("[]", r"the settings must be a mapping, got \[\]"),
        ("3", "the settings must be a mapping, got 3"),
        ("train: {iterations: 7", "not valid YAML"),
        ("\t- a", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_errors(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.yaml: cannot be read"):
        load_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="binary.yaml: cannot be read"):
        load_yaml(tmp_path / "binary.yaml")


def test_numbers_as_people_write_them() -> None:
    """YAML 1.1 reads 1e-3 as text, as it lacks a point."""
    document = yaml.safe_load("{train: {learning_rate: 1e-3, warmup_factor: 1}}")
    train = from_dict(document, "here").train
    assert (train.learning_rate, train.warmup_factor) == (0.001, 1.0)
    assert isinstance(train.warmup_factor, float)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_within_the_limits(preset: str) -> None:
    config = PRESETS[preset]()
    if config.data.color_order == "bgr":  # torchvision's weights will not do
        config = replace(config, model=replace(config.model, backbone_weights="msra.pkl"))
    check(config)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("train", "iterations", 0, "train.iterations must be >= 1, got 0"),
        ("train", "learning_rate", math.nan, "train.learning_rate must be positive, got nan"),
        ("train", "learning_rate", -1.0, "train.learning_rate must be positive, got -1.0"),
        ("train", "ema_decay", 1.0, "train.ema_decay"),
        ("train", "seed", -1, "train.seed"),
        ("train", "milestones", (0.5, 2.0), "train.milestones"),
        ("data", "min_sizes", (), "data.min_sizes"),
        ("data", "flip_probability", 1.5, "data.flip_probability"),
        ("data", "std", (0.2, 0.0, 0.2), "data.std"),
        ("loss", "focal_alpha", 2.0, "loss.focal_alpha"),
        ("postprocess", "topk_candidates", 0, "postprocess.topk_candidates"),
        ("postprocess", "score_threshold", math.nan, "postprocess.score_threshold"),
    ],
)
def test_limits(section: str, field: str, value: object, message: str) -> None:
    config = Config()
    changed = replace(getattr(config, section), **{field: value})
    with pytest.raises(ConfigError, match=message):
        check(replace(config, **{section: changed}))


def test_batch_must_divide_into_equal_shares() -> None:
    config = replace(Config(), train=replace(Config().train, batch_size=12, accumulation=2))
    check(config, world_size=3)
    with pytest.raises(ConfigError, match=r"processes x accumulation = 8, got 12"):
        check(config, world_size=4)


def test_frozen_random_stages() -> None:
    model = ModelConfig(backbone_weights="none")
    with pytest.raises(ConfigError, match="random stages would never be trained"):
        check(Config(model=model))
    check(Config(model=replace(model, frozen_stages=0)))
