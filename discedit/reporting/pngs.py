"""The figures of a report as PNGs. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discedit.recipes.recipe import Edit, Recipe
from discedit.reporting import colours as _colours
from discedit.reporting import sections
from discedit.scoring.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#30363f", "#0068ad", "#c24e00", "#00805c", "#a8448a", "#8a6a00")  # as in report.css
MARKS = "osD^vP"
MOST_TICKS = 60


def figures(
    scores: Scores,
    names: sections.Names,
    edits: Mapping[str, Edit | Recipe],
    accuracy: Mapping[str, Tensor] | None,
    curve: Sequence[Mapping[str, Any]] | None,
) -> dict[str, bytes]:
    """Name of the figure -> PNG, of those for which there is something to show.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "report: pngs=True needs matplotlib: pip install 'discedit[report]'", name="matplotlib"
        ) from error
    drawn = {"scores": _scores(scores, names)}
    cut = {title: sections.edit(title, made, scores, names)["rows"] for title, made in edits.items()}
    cut = {title: rows for title, rows in cut.items() if any(row["share"] is not None for row in rows)}
    if cut:
        drawn["edits"] = _edits(cut)
    if accuracy is not None:
        drawn["accuracy"] = _accuracy(sections.accuracy(accuracy, edits, names))
    if curve is not None:
        drawn["curve"] = _curve(curve)
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _text(name: str, most: int = 28) -> str:
    """A name as matplotlib shows it: short, on one line, and with no mathematics in it."""
    return re.sub(r"\s+", " ", sections.shortened(name, most)).encode("utf-8", "replace").decode().replace("$", r"\$")


def _every(labels: Iterable[str]) -> tuple[list[int], list[str]]:
    """Positions and labels of ticks that do not crowd each other."""
    whole = list(labels)
    step = -(-len(whole) // MOST_TICKS)
    return list(range(0, len(whole), step)), [_text(label) for label in whole[::step]]


def _scores(scores: Scores, names: sections.Names) -> Figure:
    from matplotlib.colors import ListedColormap

    heat = sections.heat_values(scores)
    groups = sections.groups(scores.num_classes, sections.MOST_CLASSES)
    figure = _figure(4.5 + 0.5 * len(groups), 2.2 + 0.17 * min(len(scores), 120))
    both: Any = figure.subplots(1, 2, sharey=True)
    colours = ListedColormap(_colours.scale()).with_extremes(bad="#e1ddd1")
    for axes, values, title in zip(both, heat, ("the best component", "the mean of the components"), strict=True):
        binned = torch.stack([values[:, g[0] : g[-1] + 1].nanmean(1) for g in groups], dim=1)
        image = axes.imshow(binned.numpy(), aspect="auto", vmin=0, vmax=1, cmap=colours, interpolation="nearest")
        axes.set_title(f"{title} of each layer", fontsize="medium")
        axes.set_xticks(*_every(names.group(group) for group in groups), rotation=90)
        axes.set_yticks(*_every(map(names.layer, scores)))
    label = "squared Hellinger distance" if scores.bound == "hellinger" else "lower bound on total variation"
    figure.colorbar(image, ax=both, label=label, pad=0.01)
    return figure


def _edits(cut: Mapping[str, list[dict[str, Any]]]) -> Figure:
    rows = max(map(len, cut.values()))
    figure = _figure(1 + 4 * len(cut), 1.4 + 0.2 * min(rows, 120))
    for axes, (title, layers) in zip(figure.subplots(1, len(cut), squeeze=False)[0], cut.items(), strict=True):
        axes.barh(range(len(layers)), [100 * (row["share"] or 0) for row in layers], color=SERIES[1])
        axes.set_yticks(*_every(row["label"] for row in layers))
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of components, %")
        axes.set_title(_text(title), fontsize="medium")
    return figure


def _accuracy(found: Mapping[str, Any]) -> Figure:
    rows = found["rows"]
    figure = _figure(7, 1.6 + 0.26 * len(rows))
    axes = figure.subplots()
    for i, title in enumerate(found["titles"]):
        have = [(y, share) for y, row in enumerate(rows) for j, share in row["values"] if j == i]
        axes.scatter([s for _, s in have], [y for y, _ in have], label=_text(title), zorder=3, **_style(i, size="s"))
    labels = [f"{_text(row['name'])} (to forget)" if row["forgotten"] else _text(row["name"]) for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(color="#e1ddd1")
    axes.set_xlabel("accuracy, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _curve(points: Sequence[Mapping[str, Any]]) -> Figure:
    titles = list(dict.fromkeys(point["title"] for point in points))
    charts = [key for key in ("parameters", "macs") if any(point.get(key) is not None for point in points)]
    figure = _figure(1 + 4.5 * len(charts), 3.6)
    both: list[Axes] = list(figure.subplots(1, len(charts), squeeze=False)[0])
    for axes, key in zip(both, charts, strict=True):
        for i, title in enumerate(titles):
            own = [point for point in points if point["title"] == title and point.get(key) is not None]
            line = sorted((100 * float(point[key]), 100 * float(point["accuracy"])) for point in own)
            axes.plot([x for x, _ in line], [y for _, y in line], label=_text(title), **_style(i, size="markersize"))
        axes.set_xlabel("parameters left, %" if key == "parameters" else "multiply-accumulates left, %")
        axes.set_ylabel("accuracy, %")
        axes.grid(color="#e1ddd1")
    both[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _style(i: int, *, size: str) -> dict[str, Any]:
    """Shape and colour of a series, as on the page."""
    return {"marker": MARKS[i % 6], "color": SERIES[(i + i // 6) % 6], size: 30 if size == "s" else 5}
