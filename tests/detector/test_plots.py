"""The figures are written and show their data."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fcos.colors import class_color
from fcos.confusion import Confusion
from fcos.evaluate import PrecisionRecall
from fcos.plots import plot_confusion, plot_label_counts, plot_precision_recall, plot_training


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def shows(image: np.ndarray, color: tuple[int, int, int]) -> int:
    """Pixels about as coloured as this."""
    return int((np.abs(image - color).max(axis=2) < 12).sum())


def write_metrics(path: Path, last_line: str = "") -> Path:
    lines = ["iteration,lr,cls,box,centerness,total,images_per_second,ap,ap50"]
    for i in range(20, 401, 20):
        ap = "0.25,0.5" if i % 100 == 0 else ","
        lines.append(f"{i},0.01,{1 / i},{2 / i},0.6,{3 / i + 0.6},31.5,{ap}")
    path.write_text("\n".join(lines) + "\n" + last_line)
    return path


def test_training(tmp_path) -> None:
    plot_training(write_metrics(tmp_path / "metrics.csv"), tmp_path / "results.png")
    image = pixels(tmp_path / "results.png")
    assert image.shape[0] > 600 and image.shape[1] > 1000
    for label in range(3):  # three parts of the loss
        assert shows(image, class_color(label)) > 100


def test_training_with_few_columns_and_a_line_cut_off(tmp_path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("iteration,cls,ap\n1,0.5,\n2,0.4,\n3,0.")
    plot_training(metrics, tmp_path / "one.png")
    assert pixels(tmp_path / "one.png").shape[1] < 800  # one panel
    # what was cut off does not count, so the picture is the same without it
    metrics.write_text("iteration,cls,ap\n1,0.5,\n2,0.4,\n")
    plot_training(metrics, tmp_path / "two.png")
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "two.png")).all()
    metrics.write_text("iteration,cls,ap\n")
    plot_training(metrics, tmp_path / "nothing_yet.png")
    assert (pixels(tmp_path / "nothing_yet.png") == 255).all()


def test_training_errors(tmp_path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,cls\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: must have a column \"iteration\", got"):
        plot_training(metrics, tmp_path / "results.png")
    metrics.write_text("iteration,cls\n1,much\n")
    with pytest.raises(ValueError, match="column 'cls' must hold numbers: .*much"):
        plot_training(metrics, tmp_path / "results.png")


def curves(classes: int) -> PrecisionRecall:
    grid = np.linspace(0, 1, 101)
    precision = np.stack([np.maximum(0, 1 - grid**k) for k in range(1, classes + 1)])
    precision[-1] = np.nan  # a class without boxes
    f1 = np.where(np.isnan(precision), np.nan, 4 * grid * (1 - grid) * 0.9)
    return PrecisionRecall(tuple(f"class {k}" for k in range(classes)), grid, precision, grid, f1)


@pytest.mark.parametrize("classes", [1, 4, 40])
def test_precision_recall(classes: int, tmp_path) -> None:
    plot_precision_recall(curves(classes), tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    assert (image.max() == 255) and image.shape[1] > 1200
    if classes == 4:
        assert all(shows(image, class_color(k)) > 200 for k in range(3))
        assert shows(image, class_color(3)) == 0  # nothing to draw for the class without boxes


@pytest.mark.parametrize("classes", [1, 3, 30])
def test_confusion(classes: int, tmp_path) -> None:
    counts = np.eye(classes + 1, dtype=np.int64) * 50
    counts[-1, -1] = 0
    names = tuple(f"a name {k}" for k in range(classes))
    plot_confusion(Confusion(names, counts, 0.5, 0.3), tmp_path / "confusion.png")
    image = pixels(tmp_path / "confusion.png")
    darkest = np.array(matplotlib.colormaps["Blues"](1.0)[:3]) * 255
    assert shows(image, tuple(darkest.round().astype(int))) > 1000  # the diagonal


def test_label_counts(tmp_path) -> None:
    plot_label_counts(["a", "b"], [30, 10], tmp_path / "labels.png")
    image = pixels(tmp_path / "labels.png")
    ratio = shows(image, class_color(0)) / shows(image, class_color(1))
    assert ratio == pytest.approx(3, rel=0.1)
    with pytest.raises(ValueError, match=r"one number per name \(2\), got 1"):
        plot_label_counts(["a", "b"], [30], tmp_path / "labels.png")
