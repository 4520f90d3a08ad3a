"""What the plots of docs/benchmarks.md show, drawn into a figure from the committed rows."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import COMPILED, EAGER, GOALS, Figures, Row, by_case
from .harness import OURS

_OURS, _OTHER, _THIRD, _LINE = "#2364aa", "#b8b8b8", "#ea7317", "#222222"
_NAMES = {OURS: "ours", EAGER: "our reference, eager", COMPILED: "the same, torch.compile"}
_COLORS = {OURS: _OURS, EAGER: _OTHER, COMPILED: _THIRD, "torchvision": _LINE}


_NETWORK = "network alone"
_FOCAL_STEP: dict[str, object] = {"mode": "forward + backward", "form": "levels"}
_FEW: dict[str, object] = {"candidates": 650, "layout": "channels_last"}


def goals(figure: Figure, figures: Figures) -> None:
    measured = [(goal, min(ratios)) for goal in GOALS if (ratios := figures.ratios(goal))]
    axes = figure.subplots()
    places = range(len(measured))
    values = [value for _, value in measured]
    colors = [_OURS if value >= goal.at_least else _THIRD for goal, value in measured]
    axes.barh(places, values, color=colors, height=0.7)
    axes.scatter(
        [goal.at_least for goal, _ in measured], places, marker="|", s=140, color=_LINE, zorder=3
    )
    short = {EAGER: "eager", COMPILED: "torch.compile"}
    titles = [
        f"{goal.title.replace('`', '')}  vs {short.get(goal.against, goal.against)}"
        for goal, _ in measured
    ]
    axes.set_yticks(places, titles, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(1, 2 * max(values))
    axes.set_ylim(len(measured) - 0.4, -0.6)
    for place, (goal, value) in zip(places, measured, strict=True):
        text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        axes.text(max(value, goal.at_least) * 1.05, place, text, va="center", fontsize=8)
    axes.set_xlabel("times our time")
    _plain(axes)


def assignment(figure: Figure, figures: Figures) -> None:
    time, memory = figure.subplots(1, 2)
    for provider in (OURS, EAGER, "torchvision"):
        rows = [
            case[provider]
            for case in by_case(figures.rows("assign_targets", {}))
            if provider in case and case[provider]["boxes"]
        ]
        style = {"marker": "o", "color": _COLORS[provider], "label": _NAMES.get(provider, provider)}
        boxes = [row["boxes"] for row in rows]
        time.plot(boxes, [row["median_ms"] for row in rows], **style)
        memory.plot(boxes, [row["peak_extra_bytes"] / 2**20 for row in rows], **style)
    for axes, label in ((time, "ms"), (memory, "MiB beyond the inputs")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("boxes an image")
        axes.set_ylabel(label)
        _plain(axes)
    time.legend(frameon=False, fontsize=8)


def nms(figure: Figure, figures: Figures) -> None:
    boxes, images = figure.subplots(1, 2)
    for mode, line in (("keep all", "-"), ("keep 100", ":")):
        for provider in (OURS, "torchvision"):
            where = {"mode": mode, "boxes": "random", "groups": 1}
            rows = [
                case[provider] for case in by_case(figures.rows("nms", where)) if provider in case
            ]
            rows.sort(key=lambda row: int(row["shape"][0]))
            _times(boxes, [row["shape"][0] for row in rows], rows, provider, line, f", {mode}")
    boxes.set_xlabel("boxes of one class")
    for candidates, line in ((1000, "-"), (5000, ":")):
        for provider in (OURS, "torchvision, image by image"):
            rows = [
                case[provider]
                for case in by_case(figures.rows("padded_batched_nms", {}))
                if provider in case and case[provider]["shape"][1] == candidates
            ]
            count = f", {candidates:,}"
            _times(images, [row["shape"][0] for row in rows], rows, provider, line, count)
    images.set_xlabel("images of 1,000 or 5,000 boxes, first 100")


def memory(figure: Figure, figures: Figures) -> None:
    providers = {
        "focal loss": (OURS, f"{OURS}, fused gradient", EAGER, "torchvision, one-hot made"),
        "loss section": (OURS, "torchvision"),
    }
    for axes, (section, names) in zip(figure.subplots(1, 2), providers.items(), strict=True):
        where = {"section": section, "axis": "classes"}
        for provider in names:
            rows = [
                case[provider]
                for case in by_case(figures.rows("scaling", where))
                if provider in case
            ]
            axes.plot(
                [row["value"] for row in rows],
                [row["peak_extra_bytes"] / 2**20 for row in rows],
                "--" if "fused" in provider else "-",
                marker="o",
                color=_color(provider),
                label=_name(provider),
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"classes ({section})")
        axes.set_ylabel("MiB beyond the inputs")
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)


def growth(figure: Figure, figures: Figures) -> None:
    sections = {"focal loss": ", one-hot made", "loss section": "", "post-processing": ""}
    for axes, (section, form) in zip(figure.subplots(1, 3), sections.items(), strict=True):
        for axis, line in (("images", "-"), ("classes", ":")):
            where = {"section": section, "axis": axis}
            for provider in (OURS, f"torchvision{form}"):
                rows = [
                    case[provider]
                    for case in by_case(figures.rows("scaling", where))
                    if provider in case
                ]
                _times(axes, [row["value"] for row in rows], rows, provider, line, f", {axis}")
        axes.set_title(section, fontsize=9)
        axes.set_xlabel("images, or classes")


def roofline(figure: Figure, figures: Figures) -> None:
    """What moves much; NMS and assignment look at pairs of boxes."""
    line_up: list[tuple[str, str, dict[str, object]]] = [
        ("focal loss", "sigmoid_focal_loss", {"mode": "forward", "form": "levels"}),
        ("focal loss + gradient", "sigmoid_focal_loss", _FOCAL_STEP),
        ("box and centerness loss + gradient", "iou_loss", {"mode": "forward + backward"}),
        ("loss section + gradient", "fcos_loss", {}),
        ("assignment, 8 boxes an image", "assign_targets", {"boxes": 8}),
        ("post-processing, 650 candidates", "postprocess", _FEW),
    ]
    axes = figure.subplots()
    place, ticks, titles = 0.0, [], []
    for title, op, where in line_up:
        for case in by_case(figures.rows(op, where)):
            start = place
            for provider, row in case.items():
                if "given" in provider or "percent_of_copy" not in row:
                    continue
                share = row["percent_of_copy"]
                hatch = "//" if "fused" in provider else None
                axes.barh(place, share, 0.9, color=_color(provider), hatch=hatch, ec="white")
                text = f"{share:.0f}" if share >= 10 else f"{share:.1f}"
                axes.text(share * 1.08, place, text, va="center", fontsize=7)
                place += 1
            ticks.append((start + place - 1) / 2)
            titles.append(title)
            place += 0.8
    axes.axvline(100, color=_LINE, lw=1)
    axes.set_yticks(ticks, titles, fontsize=8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("% of what a copy of a large tensor reaches, of the bytes that must be moved")
    seen = {_name(name): _color(name) for name in (OURS, COMPILED, EAGER, "torchvision")}
    handles = [Patch(color=color, label=name) for name, color in seen.items()]
    handles.append(Patch(fc=_OURS, ec="white", hatch="//", label="ours, gradient with the loss"))
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    _plain(axes)


def steps(figure: Figure, figures: Figures) -> None:
    """The network, which all have, and what comes on top of it."""
    axes = figure.subplots()
    places, titles = [], []
    for op, title in (("train_step", "training step"), ("inference", "inference")):
        for case in by_case(figures.rows(op, {})):
            network = case[_NETWORK]["median_ms"]
            images, *size = case[OURS]["shape"]
            for provider in [name for name in case if name != _NETWORK]:
                time = case[provider]["median_ms"]
                place = len(places)
                axes.barh(place, min(network, time), color="#dddddd")
                axes.barh(place, max(time - network, 0), left=network, color=_color(provider))
                text = f"{time:.0f} ms, {max(time - network, 0):.1f} beyond the network"
                axes.text(time * 1.01, place, text, va="center", fontsize=8)
                places.append(place)
                titles.append(f"{title}, {images} of {size[0]} x {size[1]}: {_name(provider)}")
    axes.set_yticks(places, titles, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max((bar.get_x() + bar.get_width() for bar in axes.patches), default=1))
    axes.set_xlabel("ms; grey: the network alone")
    _plain(axes)


def _times(
    axes: Axes, x: Sequence[int], rows: Sequence[Row], provider: str, line: str, more: str
) -> None:
    times = [row["median_ms"] for row in rows]
    label = f"{_name(provider)}{more}"
    axes.plot(x, times, line, marker="o", ms=4, color=_color(provider), label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=7)
    _plain(axes)


def _color(provider: str) -> str:
    return _COLORS[next(name for name in _COLORS if provider.startswith(name))]


def _name(provider: str) -> str:
    return _NAMES.get(provider, provider.replace(OURS, "ours"))


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
