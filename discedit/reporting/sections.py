"""What a report says, section by section, as plain values. The template makes HTML of them and escapes all strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor

from discedit.recipes.damage import ClassDamage
from discedit.recipes.recipe import Edit, Recipe
from discedit.scoring.scores import Scores

STEPS = 21  # of the colour scale: 0, 0.05, ..., 1
MOST_CLASSES = 40  # columns of a heat map, rows of a plot; more classes are grouped, or only the extremes shown
MOST_DAMAGED = 5
MOST_COLUMNS = 128  # of the picture of one layer's components
EXTREMES = 12  # classes shown at either end where there are too many
STRONGEST = 5  # components named for each layer
FEW = 20  # samples of a class below which no interval was measured (benchmarks/coverage.md)
NONE = DASH = "\u2013"
SETTINGS = ("bound", "witness", "statistic", "read")  # that come first


# ---- numbers and names as text ---------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.{digits}f}\u00a0%"


def number(value: float, digits: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def points(difference: float) -> str:
    """A difference of shares, with its sign."""
    text = NONE if math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "\u2212")
    return "0.0" if text[1:] == "0.0" else text


def short(value: float) -> str:
    """A score without the leading zero."""
    return number(value).removeprefix("0") if 0 < round(value, 2) < 1 else number(value, 0)


def listed(words: Sequence[str], most: int = EXTREMES) -> str:
    """The words in a sentence; of many, how many more there are."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most:,} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"


def ranges(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of neighbours."""
    runs = groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0])
    found = [[index for _, index in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]


def shortened(name: object, most: int = 60) -> str:
    """A name, or a number that serves as one; one that is long loses its middle: layers differ at the end."""
    name = str(name)
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
        self.classes = list(map(str, classes))
        parents = [layer.split(".")[:-1] for layer in layers]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
        self.prefix = "".join(f"{parts[0]}." for parts in shared) if len(parents) > 1 else ""

    def layer(self, layer: str) -> str:
        return shortened(layer.removeprefix(self.prefix), 28)

    def group(self, group: range) -> str:
        """One class by its name, several by their indices."""
        return self.classes[group[0]] if len(group) == 1 else f"{group[0]}{DASH}{group[-1]}"

    def several(self, indices: Sequence[int]) -> tuple[int, str]:
        return len(indices), listed([isolated(self.classes[k]) for k in indices])


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(settings: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    """Rows of a mapping, those of the mappings within it by dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        whole = f"{parent}{name}"
        rows += table(value, f"{whole}.") if isinstance(value, Mapping) and value else [(whole, plain(value))]
    return rows


# ---- scores ----------------------------------------------------------------------------------------------------------


def about(scores: Scores) -> dict[str, Any]:
    """The first section: what was scored, and how."""
    statistics = [scores.statistic] if isinstance(scores.statistic, str) else scores.statistic
    settings = {name: plain(scores.settings[name]) for name in [*SETTINGS, *scores.settings]}
    settings["statistic"] = " and ".join(statistics)
    return {
        "facts": {
            "layers": len(scores),
            "components": sum(map(len, scores.values())),
            "classes": scores.num_classes,
            "samples": int(scores.counts.sum()),
        },
        "settings": settings,
        "bound": scores.bound,
        "level": percent(1 - float(scores.options.get("alpha", 0.05)), 0),
    }


def step(value: float) -> int | str:
    """The place of a score in the colour scale; "n" for NaN."""
    return "n" if math.isnan(value) else round(min(max(value, 0.0), 1.0) * (STEPS - 1))


def best_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest score of each class over the components, NaN where there is none, and which component has it."""
    known = values.cpu().double().nan_to_num(-1)
    if not len(known):
        known = torch.full((1, values.shape[1]), -1.0, dtype=torch.float64)
    top, component = known.max(0)
    return torch.where(top < 0, torch.nan, top), component


def _greatest(values: Tensor) -> float:
    return float(best_of(values[:, None])[0])


def _means(values: Tensor, parts: Sequence[range]) -> Tensor:
    """Means of neighbours along the first axis."""
    return torch.stack([values[part[0] : part[-1] + 1].nanmean(0) for part in parts])


def heat(scores: Scores, names: Names) -> dict[str, Any]:
    """Scores by layer and class: the best and the mean of each layer's components, and each layer's components."""
    columns = groups(scores.num_classes, MOST_CLASSES)
    best, strongest = map(torch.stack, zip(*map(best_of, scores.values()), strict=True))
    layers = []
    for i, (layer, values) in enumerate(scores.items()):
        values, mean = values.cpu(), values.cpu().double().nanmean(0)
        layers.append(
            {
                "name": layer,
                "label": names.layer(layer),
                "components": len(values),
                "top": _greatest(best[i]),
                "average": float(mean.nanmean()),
                "best": _means(best[i], columns).tolist(),
                "mean": _means(mean, columns).tolist(),
                "component": [int(strongest[i, group[0]]) if len(group) == 1 else None for group in columns],
                **(_components(values, scores.direction.get(layer), names) if len(values) else {}),
            }
        )
    return {
        "columns": [
            (names.group(group), names.group(group) if len(group) == 1 else f"classes {group[0]} to {group[-1]}")
            for group in columns
        ],
        "grouped": len(columns[0]),
        "prefix": names.prefix,
        "layers": layers,
        "finding": _finding(list(scores), best, names),
        "binned": any(len(values) > MOST_COLUMNS for values in scores.values()),
    }


def _finding(layers: list[str], best: Tensor, names: Names) -> dict[str, tuple[str, float]] | None:
    """Which layer tells classes apart best, and which class is told worst and best, each with its score."""
    means = best.nanmean(1)
    if bool(means.isnan().all()):
        return None
    tops = best_of(best)[0]
    layer = int(means.nan_to_num(-1).argmax())
    # A class without samples is neither: NaN becomes a number beyond all scores, each time at the other end.
    found = {"hardest": int(tops.nan_to_num(2).argmin()), "easiest": int(tops.nan_to_num(-1).argmax())}
    told = {what: (shortened(names.classes[k]), float(tops[k])) for what, k in found.items()}
    return {"layer": (shortened(layers[layer]), float(means[layer])), **told}


def _components(values: Tensor, direction: Tensor | None, names: Names) -> dict[str, Any]:
    """Components x classes of one layer as a picture, the most discriminative component first; and the first few."""
    known = values.nan_to_num(-1)
    top, best = known.max(1)
    order = top.argsort(descending=True, stable=True)
    bins, rows = groups(len(values), MOST_COLUMNS), groups(values.shape[1], MOST_CLASSES)
    paths: dict[int | str, str] = {}
    for y, line in enumerate(_means(_means(values[order], bins).T, rows).tolist()):
        x = 0
        for place, run in groupby(map(step, line)):
            length = len(list(run))
            paths[place] = f"{paths.get(place, '')}M{x} {y}h{length}"
            x += length
    titles = []
    for b in bins:
        component = int(order[b[0]])
        classes = [k for k in known[component].argsort(descending=True, stable=True)[:3].tolist()
                   if known[component, k] >= 0]  # fmt: skip
        told = ", ".join(f"{isolated(names.classes[k])} {number(float(values[component, k]))}" for k in classes)
        title = f"component {component}: {told or 'no score'}"
        if len(b) > 1:
            average = number(float(top[order[b[0] : b[-1] + 1]].mean()))
            title = f"ranks {b[0] + 1} to {b[-1] + 1} of {len(values)}: best scores {average} on average"
        titles.append(title)
    strongest = []
    for component in [c for c in order[:STRONGEST].tolist() if top[c] >= 0]:
        k = int(best[component])
        side = {1: "more than", -1: "less than"}.get(0 if direction is None else int(direction[component, k]))
        mean = float(values[component].nanmean())
        strongest.append((component, names.classes[k], float(top[component]), side or "as much as", mean))
    picture = {
        "width": len(bins),
        "height": len(rows),
        "paths": sorted(paths.items(), key=lambda pair: str(pair[0]).zfill(2)),
        "titles": titles,
        "rows": [names.group(row) for row in rows],
    }
    return {"picture": picture, "strongest": strongest}


# ---- edits -----------------------------------------------------------------------------------------------------------


def edit(title: str, made: Edit | Recipe, scores: Scores, names: Names) -> dict[str, Any]:
    """What one edit removed, ablated or erased, and where; what it cost and skipped, a recipe does not know."""
    recipe, whole = (made.recipe, made) if isinstance(made, Edit) else (made, None)
    widths = whole.widths if whole else {}
    costs = [
        ("parameters", whole.parameters_before, whole.parameters_after),
        ("multiply-accumulates", whole.macs_before, whole.macs_after),
        ("milliseconds", *(time and round(time, 1) for time in (whole.latency_before, whole.latency_after))),
    ] if whole else []  # fmt: skip
    rows = []
    for layer, channels in recipe.components.items():
        shape = recipe.architecture.get(f"{layer}.weight", [len(scores.get(layer, ()))])
        runs, width = ranges(channels), widths.get(layer) or shape[0] or None
        row: dict[str, Any] = {"name": layer, "label": names.layer(layer), "gone": len(channels), "width": width}
        row["share"] = len(channels) / width if width else None
        row["strip"] = "".join(f"M{first} 0h{last - first + 1}" for first, last in runs)
        row["indices"] = ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in runs) or "none"
        rows.append(row)
    # Shown apart where they are what `unlearn` and `prune` write; whatever else is there stays among the settings.
    apart = {name: found for name in ("directions", "unrepaired")
             if isinstance(found := recipe.settings.get(name), Mapping)}  # fmt: skip
    return {
        "title": title,
        "kind": recipe.edit,
        "done": {"prune": "removed", "unlearn": "ablated"}.get(recipe.edit, "changed"),
        "rows": rows,
        "gone": sum(row["gone"] for row in rows),
        "whole": sum(row["width"] for row in rows) if all(row["width"] for row in rows) else None,
        "forgotten": [names.classes[k] for k in forgotten(recipe, len(names.classes))],
        "directions": [(layer, names.layer(layer), bounds) for layer, bounds in apart.get("directions", {}).items()],
        "costs": [cost for cost in costs if None not in cost],
        "damage": _damage(whole.damage, names) if whole and whole.damage else None,
        "reasons": {
            "Layers left alone": _by_reason(whole.skipped if whole else {}),
            "Layers not repaired": _by_reason(apart.get("unrepaired", {})),
        },
        "settings": table({name: value for name, value in recipe.settings.items() if name not in apart}),
        "changed": len({operation.target for operation in recipe.operations if operation.kind != "attribute"}),
    }


def _damage(damage: ClassDamage, names: Names) -> dict[str, Any]:
    """How many answers change, and the classes that lose most."""
    order = [k for k in damage.worst_first[:MOST_DAMAGED] if damage.loss[k] > 0]
    of_class = [names.classes[k] if len(damage.loss) == len(names.classes) else str(k) for k in order]
    lost = (damage.right_before - damage.right_after).tolist()
    return {
        "changed": int(damage.changed.sum()),
        "samples": int(damage.samples.sum()),
        "classes": [(of_class[i], lost[k], int(damage.samples[k])) for i, k in enumerate(order)],
    }


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    return {reason: [layer for layer in reasons if reasons[layer] == reason] for reason in reasons.values()}


def forgotten(made: Edit | Recipe, count: int) -> list[int]:
    """The classes that an edit was to forget."""
    recipe = made.recipe if isinstance(made, Edit) else made
    classes = recipe.settings.get("classes", ()) if recipe.edit == "unlearn" else ()
    return [k for k in classes if k in range(count)]


# ---- accuracy and size -----------------------------------------------------------------------------------------------


def accuracy(given: Mapping[str, Tensor], edits: Mapping[str, Edit | Recipe], names: Names) -> dict[str, Any]:
    """Accuracy class by class of several models, the first of which is what the others are compared with."""
    titles, values = list(given), torch.stack(list(given.values()))
    changes = values - values[0]
    by_edit = {title: forgotten(made, len(names.classes)) for title, made in edits.items()}
    marked = sorted({k for classes in by_edit.values() for k in classes})
    shown = list(range(len(names.classes)))
    if len(shown) > MOST_CLASSES:
        worst = (changes[1:] if len(titles) > 1 else values).nan_to_num(math.inf).amin(0)
        shown = list(dict.fromkeys([*marked, *worst.argsort(stable=True).tolist()]))[:MOST_CLASSES]
    # Where all accuracies are high the axis begins at a half, or small losses could not be seen.
    start = 0.5 if bool((values.nan_to_num(1) >= 0.5).all()) and not bool(values.isnan().all()) else 0.0
    places = ((values - start) / (1 - start) * 100).double()
    rows = []
    for k, name in enumerate(names.classes):
        dots = [(i, round(x, 2)) for i, x in enumerate(places[:, k].tolist()) if not math.isnan(x)]
        shares = values[:, k].tolist()
        told = [f"{shortened(title)} {percent(share)}" for title, share in zip(titles, shares, strict=True)]
        rows.append(
            {
                "name": name,
                "forgotten": k in marked,
                "dots": dots,
                "span": (min(x for _, x in dots), max(x for _, x in dots)) if dots else None,
                "label": ", ".join(told),
                "shares": shares,
                "changes": changes[:, k].tolist(),
            }
        )
    ticks = range(round(10 * start), 11, 1 if start else 2)
    return {
        "titles": titles,
        "summaries": [
            {"title": title, **_summary(values[0], column, by_edit.get(title, marked) if i else None, names)}
            for i, (title, column) in enumerate(zip(titles, values, strict=True))
        ],
        "rows": [rows[k] for k in shown],
        "all": rows,
        "ticks": [(round((t / 10 - start) / (1 - start) * 100, 2), f"{10 * t}") for t in ticks],
    }


def _summary(before: Tensor, after: Tensor, away: list[int] | None, names: Names) -> dict[str, Any]:
    """One model in a sentence: the classes to forget, the mean of the others, and which of them lost most."""
    first, away = away is None, away or []
    kept = ~after.isnan()
    kept[away] = False
    change = after - before
    lost = torch.where(kept & ~change.isnan(), change, math.inf)
    worst, lowest = int(lost.argmin()), int(torch.where(kept, after, math.inf).argmin())
    told = [(shortened(names.classes[k]), float(before[k]), float(after[k])) for k in away]
    if len(away) > 3:
        told = [(f"{len(away)} classes", float(before[away].nanmean()), float(after[away].nanmean()))]
    return {
        "forgotten": told,
        "mean": float(after[kept].mean()),
        "change": None if first else float(change[kept].nanmean()),
        "worst": (shortened(names.classes[worst]), float(lost[worst])) if float(lost[worst]) < 0 else None,
        "lowest": (shortened(names.classes[lowest]), float(after[lowest])) if bool(kept.any()) else None,
    }


def curve(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy against what is left of the parameters and of the work."""
    titles = list(dict.fromkeys(point["title"] for point in given))
    labels = {"parameters": "parameters left", "macs": "multiply-accumulates left"}
    have = {key: [point for point in given if point.get(key) is not None] for key in labels}
    return {
        "titles": titles,
        "charts": [_chart(found, titles, key, labels[key]) for key, found in have.items() if found],
        "points": given,
    }


# The box of a chart and of its plot, in units of the drawing.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 250, 40, 12, 12, 40


def _chart(given: list[Mapping[str, Any]], titles: list[str], key: str, label: str) -> dict[str, Any]:
    across, up = _ticks([point[key] for point in given]), _ticks([point["accuracy"] for point in given])

    def place(share: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (share - across[0]) / (across[-1] - across[0])
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (accuracy - up[0]) / (up[-1] - up[0])
        return round(x, 1), round(y, 1)

    lines: dict[str, list[tuple[float, float, str]]] = {title: [] for title in titles}
    for point in sorted(given, key=lambda point: float(point[key])):
        ratio = f", ratio {point['ratio']:g}" if point.get("ratio") is not None else ""
        what = f"{shortened(point['title'])}{ratio}: {percent(point[key])} {label}, accuracy"
        lines[point["title"]].append((*place(point[key], point["accuracy"]), f"{what} {percent(point['accuracy'])}"))
    return {
        "label": label,
        "lines": list(lines.values()),
        "across": [(place(t, up[0])[0], f"{100 * t:.4g}") for t in across],
        "up": [(place(across[0], t)[1], f"{100 * t:.4g}") for t in up],
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """Two to seven round shares around the values, within 0 and 1."""
    low, high = min(values), max(values)
    for each in (0.01, 0.02, 0.05, 0.1, 0.2):
        first, last = math.floor(low / each + 1e-9), math.ceil(high / each - 1e-9)
        first, last = (first - 1, last + 1) if first == last else (first, last)
        first, last = max(0, first), min(round(1 / each), last)
        if last - first <= 6:
            break
    return [round(i * each, 6) for i in range(first, last + 1)]


# ---- classes ---------------------------------------------------------------------------------------------------------


def classes(scores: Scores, names: Names) -> dict[str, Any]:
    """Samples of each class, what tells it best, and how sure the scores are."""
    counts, layers = scores.counts.tolist(), list(scores)
    values, components = map(torch.stack, zip(*map(best_of, scores.values()), strict=True))
    best, where = best_of(values)
    rows: list[dict[str, Any]] = []
    for k, (count, top, layer) in enumerate(zip(counts, best.tolist(), where.tolist(), strict=True)):
        row = {"name": names.classes[k], "count": count, "few": count < FEW, "best": top}
        row |= {
            "share": round(100 * count / max(*counts, 1), 2),
            "bar": 0,
            "layer": NONE,
            "whole": "",
            "component": NONE,
        }
        if not math.isnan(top):
            row |= {"bar": round(100 * top, 2), "layer": names.layer(layers[layer]), "whole": layers[layer]}
            row["component"] = int(components[layer, k])
        rows.append(row)
    ranked = best.nan_to_num(math.inf).argsort(stable=True).tolist()
    shown = range(len(rows)) if len(rows) <= MOST_CLASSES else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
    return {
        "least": min(counts),
        "most": max(counts),
        "rows": [rows[k] for k in shown],
        "all": rows,
        "without": names.several([k for k, count in enumerate(counts) if count == 0]),
        "single": names.several([k for k, count in enumerate(counts) if count == 1]),
        "few": names.several([k for k, count in enumerate(counts) if 1 < count < FEW]),
        "threshold": FEW,
        "errors": _errors(scores, names) if scores.errors else None,
    }


def _errors(scores: Scores, names: Names) -> dict[str, Any]:
    """Standard errors of the scores by layer: median and 95 % quantile over components and classes."""
    found = {layer: error[error.isfinite()].cpu() for layer, error in scores.standard_error().items()}
    both = {layer: (_quantile(error, 0.5), _quantile(error, 0.95)) for layer, error in found.items()}
    return {
        "rows": [(layer, names.layer(layer), *values) for layer, values in both.items()],
        "most": max((high for _, high in both.values() if not math.isnan(high)), default=0.0) or 1.0,
        "median": _quantile(torch.cat(list(found.values())), 0.5),
    }


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that is at least as great as this share of all; torch.quantile refuses large tensors."""
    return float(values.sort().values[math.ceil(share * len(values)) - 1]) if len(values) else math.nan
