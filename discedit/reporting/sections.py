"""What a report says, section by section, as plain values. The template makes HTML of them and escapes all strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from discedit.common.state import ClassMoments, State
from discedit.moments.moments import Moments
from discedit.recipes.recipe import Edit, Recipe
from discedit.reporting import colours
from discedit.scoring.scores import Scores

MOST_CLASSES = 40  # columns of a heat map, rows of a plot; more classes are grouped, or only the extremes shown
MOST_COLUMNS = 128  # of the picture of one layer's components
EXTREMES = 12  # classes shown at either end where there are too many
STRONGEST = 5  # components named for each layer
FEW = 20  # samples of a class below which no interval was measured (benchmarks/coverage.md)
LONGEST = 60  # characters of a name that is repeated for every cell
NONE = DASH = "\u2013"
MINUS = "\u2212"

BOUNDS = {
    "minimax": "the tightest lower bound that means and covariances allow",
    "fisher": "the published lower bound, from the Fisher discriminant",
    "minimax_published": "the published, looser lower bound from the minimax problem",
    "robust": "the Fisher lower bound at the worst means that the samples leave possible",
    "hellinger": "squared Hellinger distance of Gaussians with the same moments; no bound where they are not",
    "witness": "a lower bound from the first two moments of one number",
    "witness_published": "the published, looser lower bound from the first two moments of one number",
    "certified": "a lower bound that holds with a stated probability over the samples, for all scores at once",
}
WITNESSES = {
    "linear": "the statistic itself",
    "quadratic": "the statistic and its square",
    "exp": "exp(-scale t) of the statistic t",
    "vector": "several statistics together",
}
READS = {
    "consumer": "as the next layer gets them, behind norm and activation",
    "norm": "behind the norm, before the activation",
    "output": "at the layer's own output",
}


def percent(share: float, digits: int = 1) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.{digits}f}\u00a0%"


def number(value: float, digits: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def points(difference: float) -> str:
    """A difference of shares, with its sign."""
    text = NONE if math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def listed(words: Sequence[str], most: int = EXTREMES) -> str:
    """The words in a sentence; of many, how many more there are."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most:,} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


def ranges(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of neighbours."""
    runs = groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0])
    found = [[index for _, index in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]


def shortened(name: str, most: int = LONGEST) -> str:
    """A name that is long loses its middle: layers differ at the end."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


def isolated(name: str) -> str:
    """A short name for text without markup, where one that runs the other way must not turn what surrounds it."""
    name = shortened(name)
    return name if name.isascii() else f"\u2068{name}\u2069"


def groups(count: int, most: int) -> list[range]:
    """0..count-1 in at most so many runs of equal length, the last one perhaps shorter."""
    size = max(1, math.ceil(count / most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Names:
    """Names of layers and classes: whole, and short where room is short."""

    def __init__(self, layers: Iterable[str], classes: Sequence[str]) -> None:
        self.classes = list(classes)
        parts = [layer.split(".")[:-1] for layer in layers]
        shared = 0
        while len(parts) > 1 and all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
            shared += 1
        self.prefix = "".join(f"{part}." for part in parts[0][:shared]) if parts else ""

    def layer(self, layer: str) -> str:
        return shortened(layer.removeprefix(self.prefix), 28)

    def group(self, group: range) -> str:
        """One class by its name, several by their indices."""
        return self.classes[group[0]] if len(group) == 1 else f"{group[0]}{DASH}{group[-1]}"

    def several(self, indices: Iterable[int]) -> str:
        return listed([isolated(self.classes[k]) for k in indices])


@dataclass(frozen=True)
class Cell:
    """One field of a heat map; without a place in the scale where there is no score."""

    step: int | None
    text: str
    title: str


def about(scores: Scores, moments: Moments | None) -> dict[str, Any]:
    """The first section: what was scored, and how."""
    channels = [len(values) for values in scores.values()]
    settings = scores.settings
    named = {
        "bound": (settings["bound"], BOUNDS.get(scores.bound, "")),
        "witness": (settings["witness"], WITNESSES.get(scores.witness, "")),
        "statistic": (" and ".join([scores.statistic] if isinstance(scores.statistic, str) else scores.statistic), ""),
        "read": (settings["read"], READS.get(scores.read, "")),
    }
    rest = {name: (plain(value), "") for name, value in settings.items() if name not in named}
    return {
        "facts": [
            ("layers", f"{len(channels):,}"),
            ("components", f"{sum(channels):,}"),
            ("classes", f"{scores.num_classes:,}"),
            ("samples", f"{int(scores.counts.sum()):,}"),
        ],
        "settings": [(name, value, meaning) for name, (value, meaning) in {**named, **rest}.items()],
        "bound": scores.bound,
        "level": percent(1 - float(scores.options.get("alpha", 0.05)), 0),
        "constant": sum(_constant(moments[layer]) for layer in scores) if moments is not None else None,
    }


def _constant(state: State) -> int:
    """Components that gave one and the same value on all samples."""
    seen = state.count > 0
    if not bool(seen.any()):
        return 0
    mean = state.mean if state.mean.ndim == 3 else state.mean[None]
    spread = state.m2[None] if isinstance(state, ClassMoments) else state.scatter
    mean, spread = mean[:, seen], spread[:, seen]
    flat = (spread == 0).flatten(0, 1).all(0) & (mean == mean[:, :1]).flatten(0, 1).all(0)
    return int(flat.sum())


def heat(scores: Scores, names: Names) -> dict[str, Any]:
    """Scores by layer and class: the best and the mean of each layer's components, and each layer's components."""
    columns = groups(scores.num_classes, MOST_CLASSES)
    best, mean = heat_values(scores)
    strongest = [_strongest(values) for values in scores.values()]
    layers = []
    for i, (layer, values) in enumerate(scores.items()):
        rows = []
        for which in (best, mean):
            cells = []
            for group in columns:
                value = float(which[i, group[0] : group[-1] + 1].nanmean())
                title = f"{isolated(layer)}, {_told(group, names)}: "
                if len(group) > 1:
                    title += f"{number(value)}, the mean of {len(group)} classes"
                elif math.isnan(value):
                    title += "no score"
                else:
                    component = int(strongest[i][group[0]])
                    title += f"best {number(float(best[i, group[0]]))} (component {component})"
                    title += f", mean {number(float(mean[i, group[0]]))}"
                cells.append(Cell(colours.step(value), _short(value), title))
            rows.append(cells)
        layers.append(
            {
                "name": layer,
                "label": names.layer(layer),
                "components": len(values),
                "best": number(_greatest(best[i])),
                "mean": number(float(mean[i].nanmean())),
                "rows": rows,
                "picture": _picture(values.cpu(), names),
                "table": _table(values.cpu(), scores.direction.get(layer), names),
            }
        )
    return {
        "columns": [(names.group(group), _told(group, names)) for group in columns],
        "grouped": len(columns[0]),
        "prefix": names.prefix,
        "layers": layers,
        "finding": _finding(scores, best, names),
        "binned": any(len(values) > MOST_COLUMNS for values in scores.values()),
    }


def heat_values(scores: Scores) -> tuple[Tensor, Tensor]:
    """The best and the mean of each layer's components for each class, both (layers, classes), float64."""
    best = torch.stack([_best(values) for values in scores.values()])
    return best, torch.stack([_mean(values) for values in scores.values()])


def _best(values: Tensor) -> Tensor:
    """Greatest score of each class over the components; NaN where there is none."""
    if not len(values):
        return torch.full(values.shape[1:], torch.nan, dtype=torch.float64)
    return torch.where(values.isnan().all(0), torch.nan, values.nan_to_num(-1).amax(0)).cpu().double()


def _mean(values: Tensor) -> Tensor:
    return values.nanmean(0).cpu().double()


def _strongest(values: Tensor) -> Tensor:
    return values.nan_to_num(-1).argmax(0).cpu() if len(values) else torch.zeros(values.shape[1], dtype=torch.int64)


def _greatest(values: Tensor) -> float:
    return float("nan") if bool(values.isnan().all()) else float(values.nan_to_num(-1).max())


def _short(value: float) -> str:
    """A score in as few characters as two digits take."""
    whole = {"1.00": "1", "0.00": "0"}
    text = number(value)
    return whole.get(text, text.removeprefix("0"))


def _told(group: range, names: Names) -> str:
    return isolated(names.classes[group[0]]) if len(group) == 1 else f"classes {group[0]} to {group[-1]}"


def _finding(scores: Scores, best: Tensor, names: Names) -> dict[str, str] | None:
    """Which layer tells classes apart best, and which class is told worst."""
    means = best.nanmean(1)
    if bool(means.isnan().all()):
        return None
    layer = int(means.nan_to_num(-1).argmax())
    tops = torch.where(best.isnan().all(0), torch.nan, best.nan_to_num(-1).amax(0))
    hardest, easiest = int(tops.nan_to_num(2).argmin()), int(tops.nan_to_num(-1).argmax())
    return {
        "layer": shortened(list(scores)[layer]),
        "value": number(float(means[layer])),
        "hardest": shortened(names.classes[hardest]),
        "hardest_value": number(float(tops[hardest])),
        "easiest": shortened(names.classes[easiest]),
        "easiest_value": number(float(tops[easiest])),
    }


def _picture(values: Tensor, names: Names) -> dict[str, Any]:
    """Components x classes of one layer, the most discriminative component first."""
    top = values.nan_to_num(-1).amax(1) if len(values) else torch.empty(0)
    order = top.argsort(descending=True, stable=True)
    bins, rows = groups(len(values), MOST_COLUMNS), groups(values.shape[1], MOST_CLASSES)
    matrix = torch.empty(len(rows), 0)
    if bins:
        binned = torch.stack([values[order[b[0] : b[-1] + 1]].nanmean(0) for b in bins], dim=1)
        matrix = torch.stack([binned[r[0] : r[-1] + 1].nanmean(0) for r in rows])
    paths: dict[int | None, list[str]] = {}
    for y, line in enumerate(matrix.tolist()):
        x = 0
        for step, run in groupby(map(colours.step, line)):
            length = len(list(run))
            paths.setdefault(step, []).append(f"M{x} {y}h{length}")
            x += length
    titles = []
    for b in bins:
        members = order[b[0] : b[-1] + 1].tolist()
        if len(members) == 1:
            titles.append(_component(values[members[0]], members[0], names))
        else:
            found = float(top[members].mean())
            titles.append(f"ranks {b[0] + 1} to {b[-1] + 1} of {len(values)}: best scores {number(found)} on average")
    return {
        "width": len(bins),
        "height": len(rows),
        "paths": [(step, "".join(parts)) for step, parts in sorted(paths.items(), key=lambda p: (p[0] is None, p[0]))],
        "titles": titles,
        "rows": [names.group(row) for row in rows],
    }


def _component(values: Tensor, component: int, names: Names) -> str:
    found = [k for k in values.nan_to_num(-1).argsort(descending=True, stable=True)[:3].tolist() if values[k] >= 0]
    best = ", ".join(f"{isolated(names.classes[k])} {number(float(values[k]))}" for k in found)
    return f"component {component}: {best or 'no score'}"


def _table(values: Tensor, direction: Tensor | None, names: Names) -> list[tuple[int, str, str, str, str]]:
    """The strongest components of a layer: index, class, score, how active, mean score."""
    rows = []
    top = values.nan_to_num(-1).amax(1) if len(values) else torch.empty(0)
    for component in top.argsort(descending=True, stable=True)[:STRONGEST].tolist():
        if top[component] < 0:
            continue
        k = int(values[component].nan_to_num(-1).argmax())
        side = {1: "more", -1: "less"}.get(0 if direction is None else int(direction[component, k]), "as")
        mean = number(float(values[component].nanmean()))
        rows.append((component, names.classes[k], number(float(values[component, k])), side, mean))
    return rows


def edit(title: str, made: Edit | Recipe, scores: Scores, names: Names) -> dict[str, Any]:
    """What one edit removed, silenced or erased, and where."""
    recipe = made.recipe if isinstance(made, Edit) else made
    widths = made.widths if isinstance(made, Edit) else {}
    rows, gone, whole = [], 0, 0
    for layer, channels in recipe.components.items():
        width = widths.get(layer) or _width(layer, recipe, scores)
        runs = ranges(channels)
        gone, whole = gone + len(channels), whole + (width or 0)
        rows.append(
            {
                "name": layer,
                "label": names.layer(layer),
                "gone": len(channels),
                "width": width,
                "share": len(channels) / width if width else None,
                "strip": "".join(f"M{first} 0h{last - first + 1}" for first, last in runs),
                "indices": ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in runs) or "none",
            }
        )
    known = all(row["width"] for row in rows)
    # Shown apart where they are what `unlearn` and `prune` write; whatever else is there stays among the settings.
    apart = {name: recipe.settings.get(name) for name in ("directions", "unrepaired")}
    apart = {name: value for name, value in apart.items() if isinstance(value, Mapping)}
    directions = apart.get("directions") or {}
    settings = {name: value for name, value in recipe.settings.items() if name not in apart}
    costs = []
    if isinstance(made, Edit):
        for what, before, after in (
            ("parameters", made.parameters_before, made.parameters_after),
            ("multiply-accumulates", made.macs_before, made.macs_after),
        ):
            if before is not None and after is not None:
                share = percent((before - after) / before) if before else NONE
                costs.append((what, f"{before:,}", f"{after:,}", share if after <= before else ""))
    return {
        "title": title,
        "kind": recipe.edit,
        "done": {"prune": "removed", "unlearn": "silenced"}.get(recipe.edit, "changed"),
        "rows": rows,
        "gone": gone,
        "whole": whole if known else None,
        "share": percent(gone / whole) if known and whole else None,
        "forgotten": [names.classes[k] for k in forgotten(recipe, len(names.classes))],
        "directions": [_direction(layer, bounds, names) for layer, bounds in directions.items()],
        "costs": costs,
        "skipped": _by_reason(made.skipped) if isinstance(made, Edit) else [],
        "unrepaired": _by_reason(apart.get("unrepaired") or {}),
        "settings": table(settings),
        "changed": len({operation.target for operation in recipe.operations if operation.kind != "attribute"}),
    }


def _by_reason(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(layer)
    return list(layers.items())


def _width(layer: str, recipe: Recipe, scores: Scores) -> int | None:
    """Components of a layer before the edit, as far as the recipe or the scores tell."""
    shape = recipe.architecture.get(f"{layer}.weight")
    if shape:
        return shape[0]
    return len(scores[layer]) if layer in scores else None


def _direction(layer: str, bounds: Any, names: Names) -> dict[str, Any]:
    values = [float(bound) for bound in (bounds if isinstance(bounds, (list, tuple)) else [bounds])]
    return {
        "name": layer,
        "label": names.layer(layer),
        "count": len(values),
        "share": max(values, default=0.0),
        "bounds": ", ".join(number(value) for value in values),
    }


def forgotten(recipe: Recipe, count: int) -> list[int]:
    """The classes that an edit was to forget."""
    classes = recipe.settings.get("classes") if recipe.edit == "unlearn" else None
    return [k for k in classes if isinstance(k, int) and 0 <= k < count] if isinstance(classes, (list, tuple)) else []


def accuracy(given: Mapping[str, Tensor], edits: Mapping[str, Edit | Recipe], names: Names) -> dict[str, Any]:
    """Accuracy class by class of several models, the first of which is what the others are compared with."""
    titles, columns = list(given), [values.tolist() for values in given.values()]
    by_edit = {title: forgotten(_recipe(made), len(names.classes)) for title, made in edits.items()}
    marked = sorted({k for classes in by_edit.values() for k in classes})
    before = columns[0]
    losses = [[after - old for after, old in zip(column, before, strict=True)] for column in columns[1:]]
    summaries = []
    for i, (title, column) in enumerate(zip(titles, columns, strict=True)):
        away = [] if i == 0 else by_edit.get(title, marked)
        kept = [k for k in range(len(column)) if k not in away and not math.isnan(column[k])]
        lost = [k for k in kept if i and not math.isnan(losses[i - 1][k])]
        worst = min(lost, key=lambda k: losses[i - 1][k], default=None)
        low = min(kept, key=lambda k: column[k], default=None)
        summaries.append(
            {
                "title": title,
                "forgotten": _forgetting(away, before, column, names),
                "mean": percent(_average([column[k] for k in kept])),
                "change": points(_average([losses[i - 1][k] for k in lost])) if i else None,
                "worst": shortened(names.classes[worst]) if worst is not None and losses[i - 1][worst] < 0 else None,
                "worst_change": points(losses[i - 1][worst]) if worst is not None else NONE,
                "lowest": shortened(names.classes[low]) if low is not None else None,
                "lowest_value": percent(column[low]) if low is not None else NONE,
            }
        )
    shown = list(range(len(names.classes)))
    if len(shown) > MOST_CLASSES:
        by_loss = sorted(shown, key=lambda k: _least([loss[k] for loss in losses] or [before[k]]))
        shown = list(dict.fromkeys([*marked, *by_loss]))[:MOST_CLASSES]
    values = [value for column in columns for value in column if not math.isnan(value)]
    start = 0.5 if min(values, default=0.0) >= 0.5 else 0.0

    def place(share: float) -> float:
        return round(100 * (share - start) / (1 - start), 2)

    def row(k: int) -> dict[str, Any]:
        shares = [column[k] for column in columns]
        real = [place(share) for share in shares if not math.isnan(share)]
        return {
            "name": names.classes[k],
            "index": k,
            "forgotten": k in marked,
            "dots": [(i, place(share)) for i, share in enumerate(shares) if not math.isnan(share)],
            "values": [(i, 100 * share) for i, share in enumerate(shares) if not math.isnan(share)],
            "span": (min(real), max(real)) if real else None,
            "label": ", ".join(f"{shortened(title)} {percent(s)}" for title, s in zip(titles, shares, strict=True)),
            "shares": [percent(share) for share in shares],
            "changes": [points(loss[k]) for loss in losses],
        }

    return {
        "titles": titles,
        "summaries": summaries,
        "rows": [row(k) for k in shown],
        "all": [row(k) for k in range(len(names.classes))],
        "shown": len(shown),
        "ticks": [(place(t / 10), f"{10 * t}") for t in range(round(10 * start), 11, 2 if start == 0 else 1)],
    }


def _forgetting(away: list[int], before: list[float], after: list[float], names: Names) -> list[tuple[str, str, str]]:
    """What became of each class to forget; of more than a sentence holds, on average."""
    if len(away) <= 3:
        return [(shortened(names.classes[k]), percent(before[k]), percent(after[k])) for k in away]
    means = [_average([column[k] for k in away if not math.isnan(column[k])]) for column in (before, after)]
    return [(f"{len(away)} classes", percent(means[0]), percent(means[1]))]


def _recipe(made: Edit | Recipe) -> Recipe:
    return made.recipe if isinstance(made, Edit) else made


def _least(values: Sequence[float]) -> float:
    """The least that is a number; where none is, more than any."""
    return min((value for value in values if not math.isnan(value)), default=math.inf)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def curve(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy against what is left of the parameters and of the work."""
    titles = list(dict.fromkeys(point["title"] for point in given))
    charts = []
    for key, label in (("parameters", "parameters left"), ("macs", "multiply-accumulates left")):
        have = [point for point in given if point.get(key) is not None]
        if have:
            charts.append(_chart(have, titles, key, label))
    rows = [
        (
            point["title"],
            *(percent(point[key]) if point.get(key) is not None else NONE for key in ("ratio", "parameters", "macs")),
            percent(point["accuracy"]),
        )
        for point in given
    ]
    return {"titles": titles, "charts": charts, "rows": rows}


# The box of a chart and of its plot, in units of the drawing.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 250, 40, 12, 12, 40


def _chart(given: list[Mapping[str, Any]], titles: list[str], key: str, label: str) -> dict[str, Any]:
    across, up = _ticks([point[key] for point in given]), _ticks([point["accuracy"] for point in given])

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[key] - across[0]) / (across[-1] - across[0])
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point["accuracy"] - up[0]) / (up[-1] - up[0])
        return round(x, 1), round(y, 1)

    lines = []
    for i, title in enumerate(titles):
        own = sorted((point for point in given if point["title"] == title), key=lambda point: float(point[key]))
        dots = []
        for point in own:
            x, y = place(point)
            ratio = f", ratio {point['ratio']:g}" if point.get("ratio") is not None else ""
            what = f"{shortened(title)}{ratio}: {percent(point[key])} {label}, accuracy {percent(point['accuracy'])}"
            dots.append((x, y, what))
        lines.append({"index": i, "line": " ".join(f"{x},{y}" for x, y, _ in dots), "dots": dots})
    return {
        "label": label,
        "lines": lines,
        "across": [(place({key: t, "accuracy": up[0]})[0], f"{100 * t:.4g}") for t in across],
        "up": [(place({key: across[0], "accuracy": t})[1], f"{100 * t:.4g}") for t in up],
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """Two to seven round shares around the values, within 0 and 1."""
    low, high = min(values), max(values)
    for each in (0.01, 0.02, 0.05, 0.1, 0.2):
        first, last = math.floor(low / each + 1e-9), math.ceil(high / each - 1e-9)
        first, last = (first - 1, last + 1) if first == last else (first, last)
        first, last = max(0, first), min(round(1 / each), last)
        if last - first <= 6:
            return [round(i * each, 6) for i in range(first, last + 1)]
    raise AssertionError("shares lie between 0 and 1")


def classes(scores: Scores, names: Names) -> dict[str, Any]:
    """Samples of each class, what tells it best, and how sure the scores are."""
    counts = scores.counts.tolist()
    values = torch.stack([_best(layer) for layer in scores.values()])
    component = torch.stack([_strongest(layer) for layer in scores.values()])
    layer = values.nan_to_num(-1).argmax(0)
    most = max(max(counts, default=0), 1)
    rows = []
    for k, count in enumerate(counts):
        where = int(layer[k])
        best = float(values[where, k])
        rows.append(
            {
                "name": names.classes[k],
                "index": k,
                "count": f"{count:,}",
                "share": round(100 * count / most, 2),
                "few": count < FEW,
                "best": number(best),
                "bar": 0.0 if math.isnan(best) else round(100 * best, 2),
                "layer": NONE if math.isnan(best) else names.layer(list(scores)[where]),
                "whole": "" if math.isnan(best) else list(scores)[where],
                "component": NONE if math.isnan(best) else f"{int(component[where, k])}",
            }
        )
    ranked = sorted(range(len(rows)), key=lambda k: (math.isnan(b := float(values[int(layer[k]), k])), b, k))
    shown = rows if len(rows) <= MOST_CLASSES else [rows[k] for k in (*ranked[:EXTREMES], *ranked[-EXTREMES:])]
    without = [k for k, count in enumerate(counts) if count == 0]
    single = [k for k, count in enumerate(counts) if count == 1]
    few = [k for k, count in enumerate(counts) if 1 < count < FEW]
    return {
        "least": f"{min(counts, default=0):,}",
        "most": f"{max(counts, default=0):,}",
        "rows": shown,
        "all": rows,
        "without": (len(without), names.several(without)),
        "single": (len(single), names.several(single)),
        "few": (len(few), names.several(few)),
        "threshold": FEW,
        "errors": _errors(scores, names) if scores.errors else None,
    }


def _errors(scores: Scores, names: Names) -> dict[str, Any]:
    """Standard errors of the scores by layer: median and 95 % quantile over components and classes."""
    found = {layer: error[error.isfinite()].cpu() for layer, error in scores.standard_error().items()}
    medians = {layer: float(error.median()) if len(error) else float("nan") for layer, error in found.items()}
    high = {layer: float(_quantile(error, 0.95)) if len(error) else float("nan") for layer, error in found.items()}
    most = max((value for value in high.values() if not math.isnan(value)), default=0.0) or 1.0
    rows = [
        {
            "name": layer,
            "label": names.layer(layer),
            "median": number(medians[layer], 3),
            "high": number(high[layer], 3),
            "bars": [0.0 if math.isnan(v) else round(100 * v / most, 2) for v in (medians[layer], high[layer])],
        }
        for layer in found
    ]
    whole = torch.cat(list(found.values()))
    return {"rows": rows, "median": number(float(whole.median()) if len(whole) else float("nan"), 3)}


def _quantile(values: Tensor, share: float) -> Tensor:
    """The smallest value that is at least as great as this share of all; torch.quantile refuses large tensors."""
    return values.sort().values[max(0, math.ceil(share * len(values)) - 1)]


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(settings: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    """Rows of a mapping, those of the mappings within it by dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        whole = f"{parent}{name}"
        rows += table(value, f"{whole}.") if isinstance(value, Mapping) and value else [(whole, plain(value))]
    return rows
