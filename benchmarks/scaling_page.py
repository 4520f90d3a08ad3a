"""The tables of docs/scaling.md, by the names of their marks in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import bench_processes
from .figures import Figures, Row, Settings, by_case
from .harness import OURS

Format = Callable[[Row], str]
_FUSED = f"{OURS}, fused gradient"


def tables(figures: Figures) -> dict[str, str]:
    """Empty ones where nothing has been measured."""
    return {
        "images": _sections(
            figures, "images", "images of 640 x 640", lambda row: str(row["value"])
        ),
        "image size": _sections(figures, "image size", "size of two images", _size),
        "classes": _sections(figures, "classes", "classes", lambda row: f"{row['value']:,}"),
        "boxes": _table(
            "boxes in each of two images",
            figures.rows("assign_targets", {"shape": [2, 22400]}),
            lambda row: "those of COCO" if row["boxes"] == "COCO" else f"{row['boxes']:,}",
        ),
        "suppressed": _table(
            "boxes, 80 classes",
            sorted_by_size(figures.rows("nms", _NMS)),
            lambda row: f"{row['shape'][0]:,}",
        ),
        "suppressed images": _table(
            "images of 1,000 boxes",
            [r for r in figures.rows("padded_batched_nms", {}) if r["shape"][1] == 1000],
            lambda row: str(row["shape"][0]),
        ),
        "processes": _processes(figures),
        "loading": _loading(figures),
    }


#: What docs/scaling.md assumes of a GPU in training.
GPU_IMAGES_PER_S = 160
_NMS: Settings = {"mode": "keep all", "boxes": "random", "groups": 80}


def sorted_by_size(rows: Sequence[Row]) -> list[Row]:
    """In the order of the first number of their shapes; rows of one case stay together."""
    return sorted(rows, key=lambda row: int(row["shape"][0]))


def _value(row: Row) -> str:
    return f"{row['value']:,}"


def _size(row: Row) -> str:
    sizes = {640 * 640: "640 x 640", 800 * 1344: "800 x 1344", 1344 * 1344: "1344 x 1344"}
    return sizes[row["value"]]


def _sections(figures: Figures, axis: str, title: str, value: Format) -> str:
    """One table for each section of the detector."""
    texts = []
    for section in ("focal loss", "loss section", "post-processing"):
        rows = figures.rows("scaling", {"section": section, "axis": axis})
        if table := _table(title, rows, value):
            texts.append(f"{section.capitalize()}:\n\n{table}")
    return "\n".join(texts)


def _table(title: str, rows: Sequence[Row], value: Format) -> str:
    """Ours, and the first of torchvision's providers as a multiple of it."""
    cases = [case for case in by_case(rows) if OURS in case]
    if not cases:
        return ""
    lines = [
        f"| {title} | ours | torchvision | memory of ours | torchvision's |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        ours = case[OURS]
        theirs = next((row for name, row in case.items() if name.startswith("torchvision")), None)
        cells = [value(ours), milliseconds(ours["median_ms"])]
        cells.append("" if theirs is None else f"{times(theirs, ours)} x")
        cells.append(mebibytes(ours["peak_extra_bytes"]))
        cells.append("" if theirs is None else mebibytes(theirs["peak_extra_bytes"]))
        lines.append("| " + " | ".join(cells).replace("|  |", "| |").rstrip() + " |")
    return "\n".join(lines) + "\n"


def _processes(figures: Figures) -> str:
    rows = figures.rows(bench_processes.OP, {"threads": 1})
    if not rows:
        return ""
    lines = [
        "| images | one process | two | images a second | efficiency | exchange of gradients |",
        "|---|---|---|---|---|---|",
    ]
    for of in bench_processes.figures(rows):
        images = f"{of['images']} in " + ("all" if of["scaling"] == "strong" else "each")
        cells = [images, milliseconds(of["step_ms_of_one"]), milliseconds(of["step_ms"])]
        cells.append(f"{of['images_per_s_of_one']:.0f} to {of['images_per_s']:.0f}")
        cells += [
            f"{of[share]:.0%}".replace("%", " %") for share in ("efficiency", "exchange_share")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _loading(figures: Figures) -> str:
    """Images a second of one core, and how many cores keep a GPU busy."""
    rows = figures.rows("data_loading", {"threads": 1, "workers": 0})
    lines = []
    for case in by_case(rows):
        for provider, row in case.items():
            rate = row["shape"][0] / row["median_ms"] * 1e3
            name = provider.replace(OURS, "ours")
            cores = f"{GPU_IMAGES_PER_S / rate:.1f}"
            lines.append(f"| {row['mode']}, {name} | {rate:.0f} | {cores} |")
    if not lines:
        return ""
    title = f"| | images a second of a core | cores for {GPU_IMAGES_PER_S} images a second |"
    return "\n".join([title, "|---|---|---|", *lines]) + "\n"


def times(theirs: Row, ours: Row) -> str:
    ratio = theirs["median_ms"] / ours["median_ms"]
    return f"{ratio:,.{1 if ratio < 15 else 0}f}"


def milliseconds(time: float) -> str:
    return f"{time:.2g} ms" if time < 100 else f"{time:,.0f} ms"


def mebibytes(count: float) -> str:
    size = count / 2**20
    return f"{size:.2f} MiB" if size < 1 else f"{size:,.{1 if size < 10 else 0}f} MiB"
