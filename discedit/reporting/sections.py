"""What a report says, section by section, as plain values. The template makes HTML of them and escapes all strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from discedit.common.state import ClassMoments, State
from discedit.moments.moments import Moments
from discedit.recipes.recipe import Edit, Recipe
from discedit.scoring.scores import Scores

STEPS = 21  # of the colour scale: 0, 0.05, ..., 1
MOST_CLASSES = 40  # columns of a heat map, rows of a plot; more classes are grouped, or only the extremes shown
MOST_COLUMNS = 128  # of the picture of one layer's components
EXTREMES = 12  # classes shown at either end where there are too many
STRONGEST = 5  # components named for each layer
FEW = 20  # samples of a class below which no interval was measured (benchmarks/coverage.md)
NONE = DASH = "\u2013"

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


# ---- numbers and names as text ---------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.{digits}f}\u00a0%"


def number(value: float, digits: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def points(difference: float) -> str:
    """A difference of shares, with its sign."""
    text = NONE if math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "\u2212")
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


def shortened(name: str, most: int = 60) -> str:
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

    def several(self, indices: Sequence[int]) -> tuple[int, str]:
        return len(indices), listed([isolated(self.classes[k]) for k in indices])


# ---- scores ----------------------------------------------------------------------------------------------------------


def about(scores: Scores, moments: Moments | None) -> dict[str, Any]:
    """The first section: what was scored, and how."""
    statistics = [scores.statistic] if isinstance(scores.statistic, str) else scores.statistic
    meanings = {"bound": BOUNDS.get(scores.bound), "witness": WITNESSES.get(scores.witness)}
    meanings |= {"statistic": None, "read": READS.get(scores.read)}
    settings = {name: plain(scores.settings[name]) for name in [*meanings, *scores.settings]}
    settings["statistic"] = " and ".join(statistics)
    facts = {
        "layers": len(scores),
        "components": sum(map(len, scores.values())),
        "classes": scores.num_classes,
        "samples": int(scores.counts.sum()),
    }
    return {
        "facts": facts,
        "settings": [(name, value, meanings.get(name)) for name, value in settings.items()],
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
    return int(((spread == 0).flatten(0, 1).all(0) & (mean == mean[:, :1]).flatten(0, 1).all(0)).sum())


def step(value: float) -> int | str:
    """The place of a score in the colour scale; "n" for NaN."""
    return "n" if math.isnan(value) else round(min(max(value, 0.0), 1.0) * (STEPS - 1))


def best_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest score of each class over the components, NaN where there is none, and which component has it."""
    if not len(values):
        return torch.full(values.shape[1:], torch.nan, dtype=torch.float64), torch.zeros(
            values.shape[1], dtype=torch.int64
        )
    top, component = values.cpu().double().nan_to_num(-1).max(0)
    return torch.where(top < 0, torch.nan, top), component


def _means(values: Tensor, parts: Sequence[range]) -> Tensor:
    """Means of neighbours along the first axis."""
    empty = values.new_empty((0, *values.shape[1:]))
    return torch.stack([values[part[0] : part[-1] + 1].nanmean(0) for part in parts]) if parts else empty


def heat(scores: Scores, names: Names) -> dict[str, Any]:
    """Scores by layer and class: the best and the mean of each layer's components, and each layer's components."""
    columns = groups(scores.num_classes, MOST_CLASSES)
    titles = [names.group(c) if len(c) == 1 else f"classes {c[0]} to {c[-1]}" for c in columns]
    best = torch.stack([best_of(values)[0] for values in scores.values()])
    layers = []
    for (layer, values), top in zip(scores.items(), best, strict=True):
        values, strongest = values.cpu(), best_of(values)[1]
        mean = values.double().nanmean(0)
        rows: list[list[tuple[int | str, str, str]]] = [[], []]
        for group, title, *both in zip(columns, titles, _means(top, columns), _means(mean, columns), strict=True):
            of = f" (component {int(strongest[group[0]])})" if len(group) == 1 and not both[0].isnan() else ""
            told = f"{isolated(layer)}, {isolated(title)}: best {number(float(both[0]))}{of}, mean "
            for row, value in zip(rows, map(float, both), strict=True):
                text = number(value).removeprefix("0") if 0 < round(value, 2) < 1 else f"{value:.0f}"
                row.append((step(value), NONE if math.isnan(value) else text, f"{told}{number(float(both[1]))}"))
        layers.append(
            {
                "name": layer,
                "label": names.layer(layer),
                "components": len(values),
                "best": number(_greatest(top)),
                "mean": number(float(mean.nanmean())),
                "rows": rows,
                "picture": _picture(values, names),
                "strongest": _strongest(values, scores.direction.get(layer), names),
            }
        )
    return {
        "columns": [(names.group(group), title) for group, title in zip(columns, titles, strict=True)],
        "grouped": len(columns[0]),
        "prefix": names.prefix,
        "layers": layers,
        "finding": _finding(list(scores), best, names),
        "binned": any(len(values) > MOST_COLUMNS for values in scores.values()),
    }


def _greatest(values: Tensor) -> float:
    return math.nan if bool(values.isnan().all()) else float(values.nan_to_num(-1).max())


def _finding(layers: list[str], best: Tensor, names: Names) -> dict[str, tuple[str, str]] | None:
    """Which layer tells classes apart best, and which class is told worst and best, each with its score."""
    means = best.nanmean(1)
    if bool(means.isnan().all()):
        return None
    tops = torch.tensor([_greatest(column) for column in best.T])
    layer = int(means.nan_to_num(-1).argmax())
    found = {"hardest": int(tops.nan_to_num(2).argmin()), "easiest": int(tops.nan_to_num(-1).argmax())}
    told = {what: (shortened(names.classes[k]), number(float(tops[k]))) for what, k in found.items()}
    return {"layer": (shortened(layers[layer]), number(float(means[layer]))), **told}


def _picture(values: Tensor, names: Names) -> dict[str, Any]:
    """Components x classes of one layer, the most discriminative component first."""
    top = values.nan_to_num(-1).amax(1) if len(values) else torch.empty(0)
    order = top.argsort(descending=True, stable=True)
    bins, rows = groups(len(values), MOST_COLUMNS), groups(values.shape[1], MOST_CLASSES)
    paths: dict[int | str, str] = {}
    for y, line in enumerate(_means(_means(values[order], bins).T, rows).tolist() if bins else ()):
        x = 0
        for place, run in groupby(map(step, line)):
            length = len(list(run))
            paths[place] = f"{paths.get(place, '')}M{x} {y}h{length}"
            x += length
    titles = []
    for b in bins:
        component = int(order[b[0]])
        found = values[component].nan_to_num(-1).argsort(descending=True, stable=True)[:3].tolist()
        told = [f"{isolated(names.classes[k])} {number(float(values[component, k]))}" for k in found]
        told = [text for text, k in zip(told, found, strict=True) if values[component, k] >= 0]
        titles.append(
            f"component {component}: {', '.join(told) or 'no score'}"
            if len(b) == 1
            else f"ranks {b[0] + 1} to {b[-1] + 1} of {len(values)}: best scores "
            f"{number(float(top[order[b[0] : b[-1] + 1]].mean()))} on average"
        )
    return {
        "width": len(bins),
        "height": len(rows),
        "paths": sorted(paths.items(), key=lambda pair: str(pair[0]).zfill(2)),
        "titles": titles,
        "rows": [names.group(row) for row in rows],
    }


def _strongest(values: Tensor, direction: Tensor | None, names: Names) -> list[tuple[int, str, str, str, str]]:
    """The strongest components of a layer: index, class, score, how active, mean score."""
    rows = []
    top, classes = values.nan_to_num(-1).max(1) if len(values) else (torch.empty(0), torch.empty(0))
    for component in top.argsort(descending=True, stable=True)[:STRONGEST].tolist():
        if top[component] >= 0:
            k = int(classes[component])
            side = {1: "more than", -1: "less than"}.get(0 if direction is None else int(direction[component, k]))
            active = f"{side or 'as much as'} for the rest"
            best, mean = number(float(top[component])), number(float(values[component].nanmean()))
            rows.append((component, names.classes[k], best, active, mean))
    return rows


# ---- edits -----------------------------------------------------------------------------------------------------------


def edit(title: str, made: Edit | Recipe, scores: Scores, names: Names) -> dict[str, Any]:
    """What one edit removed, ablated or erased, and where."""
    whole_edit = made if isinstance(made, Edit) else None
    recipe = _recipe(made)
    rows = []
    for layer, channels in recipe.components.items():
        runs, width = ranges(channels), _width(layer, made, scores)
        row: dict[str, Any] = {"name": layer, "label": names.layer(layer), "gone": len(channels), "width": width}
        row["share"] = len(channels) / width if width else None
        row["strip"] = "".join(f"M{first} 0h{last - first + 1}" for first, last in runs)
        row["indices"] = ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in runs) or "none"
        rows.append(row)
    gone = sum(row["gone"] for row in rows)
    whole = sum(row["width"] for row in rows) if all(row["width"] for row in rows) else None
    # Shown apart where they are what `unlearn` and `prune` write; whatever else is there stays among the settings.
    apart = {name: recipe.settings.get(name) for name in ("directions", "unrepaired")}
    apart = {name: value for name, value in apart.items() if isinstance(value, Mapping)}
    directions = []
    for layer, bounds in (apart.get("directions") or {}).items():
        values = [float(bound) for bound in (bounds if isinstance(bounds, (list, tuple)) else [bounds])]
        told = ", ".join(map(number, values))
        directions.append((layer, names.layer(layer), len(values), told, max(values, default=0.0)))
    return {
        "title": title,
        "kind": recipe.edit,
        "done": {"prune": "removed", "unlearn": "ablated"}.get(recipe.edit, "changed"),
        "rows": rows,
        "gone": gone,
        "whole": whole,
        "share": percent(gone / whole) if whole else None,
        "forgotten": [names.classes[k] for k in forgotten(recipe, len(names.classes))],
        "directions": directions,
        "costs": _costs(whole_edit) if whole_edit else [],
        "reasons": {
            "Layers left alone": _by_reason(whole_edit.skipped if whole_edit else {}),
            "Layers not repaired": _by_reason(apart.get("unrepaired") or {}),
        },
        "settings": table({name: value for name, value in recipe.settings.items() if name not in apart}),
        "changed": len({operation.target for operation in recipe.operations if operation.kind != "attribute"}),
    }


def _recipe(made: Edit | Recipe) -> Recipe:
    return made.recipe if isinstance(made, Edit) else made


def _width(layer: str, made: Edit | Recipe, scores: Scores) -> int | None:
    """Components of a layer before the edit, as far as the edit or the scores tell."""
    known = made.widths.get(layer) if isinstance(made, Edit) else None
    shape = _recipe(made).architecture.get(f"{layer}.weight")
    return known or (shape[0] if shape else len(scores[layer]) if layer in scores else None)


def _costs(made: Edit) -> list[tuple[str, str, str, str]]:
    """What the model cost before and after, and how much less that is."""
    found = []
    for what, before, after in (
        ("parameters", made.parameters_before, made.parameters_after),
        ("multiply-accumulates", made.macs_before, made.macs_after),
    ):
        if before is not None and after is not None:
            less = percent((before - after) / before) if before and after <= before else ""
            found.append((what, f"{before:,}", f"{after:,}", less))
    return found


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    return {reason: [layer for layer in reasons if reasons[layer] == reason] for reason in reasons.values()}


def forgotten(recipe: Recipe, count: int) -> list[int]:
    """The classes that an edit was to forget."""
    classes = recipe.settings.get("classes") if recipe.edit == "unlearn" else None
    return [k for k in classes if isinstance(k, int) and 0 <= k < count] if isinstance(classes, (list, tuple)) else []


# ---- accuracy and size -----------------------------------------------------------------------------------------------


def accuracy(given: Mapping[str, Tensor], edits: Mapping[str, Edit | Recipe], names: Names) -> dict[str, Any]:
    """Accuracy class by class of several models, the first of which is what the others are compared with."""
    titles, values = list(given), torch.stack(list(given.values()))
    changes = values - values[0]
    by_edit = {title: forgotten(_recipe(made), len(names.classes)) for title, made in edits.items()}
    marked = sorted({k for classes in by_edit.values() for k in classes})
    summaries = [
        _summary(title, values[0], column, by_edit.get(title, marked) if i else None, names)
        for i, (title, column) in enumerate(zip(titles, values, strict=True))
    ]
    shown = list(range(len(names.classes)))
    if len(shown) > MOST_CLASSES:
        worst = (changes[1:] if len(titles) > 1 else values).nan_to_num(math.inf).amin(0)
        shown = list(dict.fromkeys([*marked, *worst.argsort(stable=True).tolist()]))[:MOST_CLASSES]
    start = 0.5 if bool((values.nan_to_num(1) >= 0.5).all()) and not bool(values.isnan().all()) else 0.0
    places = ((values - start) / (1 - start) * 100).double()

    def row(k: int) -> dict[str, Any]:
        dots = [(i, round(x, 2)) for i, x in enumerate(places[:, k].tolist()) if not math.isnan(x)]
        shares = [percent(share) for share in values[:, k].tolist()]
        return {
            "name": names.classes[k],
            "forgotten": k in marked,
            "dots": dots,
            "span": (min(x for _, x in dots), max(x for _, x in dots)) if dots else None,
            "label": ", ".join(f"{shortened(title)} {share}" for title, share in zip(titles, shares, strict=True)),
            "shares": shares,
            "changes": [points(change) for change in changes[1:, k].tolist()],
        }

    rows = [row(k) for k in range(len(names.classes))]
    ticks = range(round(10 * start), 11, 1 if start else 2)
    return {
        "titles": titles,
        "summaries": summaries,
        "rows": [rows[k] for k in shown],
        "all": rows,
        "ticks": [(round((t / 10 - start) / (1 - start) * 100, 2), f"{10 * t}") for t in ticks],
    }


def _summary(title: str, before: Tensor, after: Tensor, away: list[int] | None, names: Names) -> dict[str, Any]:
    """One model in a sentence: the classes to forget, the mean of the others, and which of them lost most."""
    first, away = away is None, away or []
    kept = ~after.isnan()
    kept[away] = False
    change = after - before
    lost = torch.where(kept & ~change.isnan(), change, math.inf)
    worst, lowest = int(lost.argmin()), int(torch.where(kept, after, math.inf).argmin())
    told = [(shortened(names.classes[k]), percent(float(before[k])), percent(float(after[k]))) for k in away]
    if len(away) > 3:
        means = [percent(float(shares[away].nanmean())) for shares in (before, after)]
        told = [(f"{len(away)} classes", means[0], means[1])]
    return {
        "title": title,
        "forgotten": told,
        "mean": percent(float(after[kept].mean())),
        "change": None if first else points(float(change[kept].nanmean())),
        "worst": (shortened(names.classes[worst]), points(float(lost[worst]))) if float(lost[worst]) < 0 else None,
        "lowest": (shortened(names.classes[lowest]), percent(float(after[lowest]))) if bool(kept.any()) else None,
    }


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
            *(percent(math.nan if point.get(key) is None else point[key]) for key in ("ratio", "parameters", "macs")),
            percent(point["accuracy"]),
        )
        for point in given
    ]
    return {"titles": titles, "charts": charts, "rows": rows}


# The box of a chart and of its plot, in units of the drawing.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 250, 40, 12, 12, 40


def _chart(given: list[Mapping[str, Any]], titles: list[str], key: str, label: str) -> dict[str, Any]:
    across, up = _ticks([point[key] for point in given]), _ticks([point["accuracy"] for point in given])

    def place(share: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (share - across[0]) / (across[-1] - across[0])
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (accuracy - up[0]) / (up[-1] - up[0])
        return round(x, 1), round(y, 1)

    lines = []
    for title in titles:
        dots = []
        for point in sorted((p for p in given if p["title"] == title), key=lambda p: float(p[key])):
            ratio = f", ratio {point['ratio']:g}" if point.get("ratio") is not None else ""
            what = f"{shortened(title)}{ratio}: {percent(point[key])} {label}, accuracy {percent(point['accuracy'])}"
            dots.append((*place(point[key], point["accuracy"]), what))
        lines.append(dots)
    return {
        "label": label,
        "lines": lines,
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


# ---- classes and settings --------------------------------------------------------------------------------------------


def classes(scores: Scores, names: Names) -> dict[str, Any]:
    """Samples of each class, what tells it best, and how sure the scores are."""
    counts, layers = scores.counts.tolist(), list(scores)
    values, components = map(torch.stack, zip(*map(best_of, scores.values()), strict=True))
    best, where = values.nan_to_num(-1).max(0)
    rows: list[dict[str, Any]] = []
    for k, count in enumerate(counts):
        known, layer = bool(best[k] >= 0), int(where[k])
        row = {"name": names.classes[k], "count": f"{count:,}", "few": count < FEW}
        row["share"] = round(100 * count / max(*counts, 1), 2)
        row |= {"best": number(float(best[k]) if known else math.nan), "bar": round(100 * max(float(best[k]), 0), 2)}
        row |= {"layer": names.layer(layers[layer]) if known else NONE, "whole": layers[layer] if known else ""}
        rows.append({**row, "component": int(components[layer, k]) if known else NONE})
    ranked = torch.where(best < 0, math.inf, best).argsort(stable=True).tolist()
    shown = range(len(rows)) if len(rows) <= MOST_CLASSES else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
    return {
        "least": f"{min(counts, default=0):,}",
        "most": f"{max(counts, default=0):,}",
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
    most = max((high for _, high in both.values() if not math.isnan(high)), default=0.0) or 1.0
    rows = [
        (layer, names.layer(layer), *(0.0 if math.isnan(v) else round(100 * v / most, 2) for v in values),
         *(number(v, 3) for v in values))
        for layer, values in both.items()
    ]  # fmt: skip
    return {"rows": rows, "median": number(_quantile(torch.cat(list(found.values())), 0.5), 3)}


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that is at least as great as this share of all; torch.quantile refuses large tensors."""
    return float(values.sort().values[math.ceil(share * len(values)) - 1]) if len(values) else math.nan


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(settings: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    """Rows of a mapping, those of the mappings within it by dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        whole = f"{parent}{name}"
        rows += table(value, f"{whole}.") if isinstance(value, Mapping) and value else [(whole, plain(value))]
    return rows
