"""`score` and `Scores`: how well each component tells each class from the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discedit import ops
from discedit.backends import NAMES, arguments
from discedit.common import files, validation
from discedit.common.by_layer import ByLayer
from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.common.warning import warn
from discedit.moments.moments import READ_ONCE, Moments, Scale, Statistic
from discedit.scoring.uncertainty import jackknife, separation, shrink, standard_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVER_CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda values: values.max(dim=1).values,
    "mean": lambda values: values.mean(dim=1),
    "min": lambda values: values.min(dim=1).values,
}
OVER_PAIRS = ("pairwise_min", "pairwise_mean")
REDUCTIONS = (*OVER_CLASSES, *OVER_PAIRS)
NEVER_NEGATIVE = ("l2", "rms", "absmax", "positive_fraction")


@dataclass(eq=False, repr=False)
class Scores(ByLayer[Tensor]):
    """Scores of every component: a mapping from layer name to a tensor (channels, classes), float64, in [0, 1].

    ``dict(scores)`` is the same as a plain dictionary of tensors.

    Attributes:
        layers: the tensors.
        direction: layer name -> int8 (channels, classes): 1 where the component is more active for the class than for
            the rest, -1 where less, 0 where equal. More active: a larger mean of the statistic, of the first one where
            there are several; for the witness "exp" a smaller mean of exp(-scale t), which falls as t grows.
        counts: samples per class, int64 (classes,).
        bound, witness, statistic, scale, read, norms: what the numbers are; the last four as in `Moments`.
        options: those of the bound, as in `ops.one_vs_rest`.
        pairs: layer name -> (channels, 2) float64: smallest and mean bound over all pairs of classes. Empty unless
            `score` was asked for them.
        errors: layer name -> (channels, classes) float64: standard errors of the separation sqrt(b / (1 - b)) of a
            score b; empty likewise.
        degrees: degrees of freedom of the errors, float64 (classes,); NaN without errors.
    """

    layers: dict[str, Tensor]
    direction: dict[str, Tensor]
    counts: Tensor
    _: KW_ONLY
    bound: str
    witness: str
    statistic: Statistic
    norms: dict[str, str]
    scale: Scale = None
    read: str = "consumer"
    options: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    degrees: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.degrees):
            self.degrees = torch.full_like(self.counts, torch.nan, dtype=torch.float64)

    def __repr__(self) -> str:
        channels = sum(len(values) for values in self.values())
        return (
            f"Scores({len(self)} layers, {channels} channels, {self.num_classes} classes, "
            f"bound={self.bound!r}, witness={self.witness!r})"
        )

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers are, as JSON has it: bound, witness, statistic, where the layers were read, and the scale
        of the witness "exp"."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("bound", "witness", "statistic", "read")}
        if isinstance(self.statistic, tuple):
            found["statistic"] = list(self.statistic)
        if self.options:
            found["options"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return found if self.scale is None else {**found, "scale": self.scale}

    def reduce(self, reduction: str = "max") -> dict[str, Tensor]:
        """One number per component: layer name -> (channels,), over the classes that the layer has samples of.

        Args:
            reduction: of the scores of a class against the rest, "max" (the class it tells best), "mean", or "min" (as
                the published DISCEDIT-SP code does); of the scores of all pairs of classes, "pairwise_min" (as
                WitnessPrune and TVSPrune do) or "pairwise_mean", for which `score` takes ``pairs=True``.

        Raises:
            ValueError: unknown reduction, fewer than two classes have samples, or pairs were not scored.
        """
        op = "Scores.reduce"
        validation.choice(op, "reduction", reduction, REDUCTIONS)
        if reduction in OVER_PAIRS and not self.pairs:
            raise ValueError(f"{op}: reduction={reduction!r} needs the scores of pairs: score(moments, pairs=True).")
        reduced = {}
        for layer, values in self.items():
            seen = int((~values.isnan().all(dim=0)).sum())
            if len(values) and seen < 2:
                raise ValueError(
                    f"{op}: at least two classes must have samples to be told apart, layer {layer!r} has "
                    f"{int((self.counts > 0).sum())} of {self.num_classes}."
                )
            if reduction in OVER_PAIRS:
                reduced[layer] = self.pairs[layer][:, OVER_PAIRS.index(reduction)]
            else:
                reduced[layer] = over_classes(values, reduction)
        return reduced

    def select(self, components: Mapping[str, Tensor | Sequence[int]]) -> Scores:
        """The same scores of fewer components, such as those that pruning has left.

        Args:
            components: layer -> indices of the components to keep, in the order in which the result has them; layers
                not named stay whole.

        Raises:
            ValueError: an unknown layer, or an index out of range.
        """
        kept = {}
        for layer, indices in components.items():
            if layer not in self:
                raise ValueError(
                    f"Scores.select: components must name layers of the scores, {layer!r} is none of {list(self)}."
                )
            kept[layer] = _checked_indices(layer, indices, self[layer])

        def part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {layer: t[kept[layer]] if layer in kept else t for layer, t in tensors.items()}

        layers, direction, pairs, errors = map(part, (self.layers, self.direction, self.pairs, self.errors))
        return replace(self, layers=layers, direction=direction, pairs=pairs, errors=errors)

    def standard_error(self) -> dict[str, Tensor]:
        """Standard error of every score b: layer name -> (channels, classes), float64.

        By the delta method from that of the separation r: 2 r / (1 + r^2)^2 times its. Near 0 it understates, because b
        is flat in r there: `interval` does not.

        Raises:
            ValueError: `score` was not asked for errors.
        """
        self._has_errors("standard_error")
        r = {layer: separation(values) for layer, values in self.items()}
        return {layer: 2 * r[layer] / (1 + r[layer] ** 2) ** 2 * self.errors[layer] for layer in self}

    def interval(self, confidence: float = 0.95) -> dict[str, Tensor]:
        """Confidence interval of every score: layer name -> (channels, classes, 2), float64, lower end first.

        Of the value that the bound would have were the samples without end, not of the total variation itself: for that
        see the bound "certified". r plus or minus Student's quantile times its error, carried to b; where Hotelling's
        test of equal means does not reject at the same level, the interval begins at 0. Needs SciPy.

        Args:
            confidence: for each interval by itself, above 0 and below 1.

        Raises:
            ValueError: a confidence out of range, or `score` was not asked for errors.
        """
        level = validation.alpha("Scores.interval", confidence, "confidence")
        self._has_errors("interval")
        from scipy.stats import chi2, t

        quantile = torch.from_numpy(t.ppf((1 + level) / 2, self.degrees.cpu().numpy()))
        own = self.counts.double()
        rest = (own.sum() - own).clamp(min=1)
        dimension = {"quadratic": 2, "vector": len(self.statistic)}.get(self.witness, 1)
        # Of equal laws r^2 is about (1 / n1 + 1 / n2) / 4 times a chi squared of so many degrees of freedom.
        equal = float(chi2.ppf(level, dimension)) * (1 / own.clamp(min=1) + 1 / rest) / 4 if dimension > 1 else 0 * own
        found = {}
        for layer, values in self.items():
            r, reach = separation(values), quantile.to(values.device) * self.errors[layer]
            low = torch.where(r**2 <= equal.to(values.device), 0.0, (r - reach).clamp(min=0))
            ends = torch.stack([low, r + reach], dim=-1) ** 2
            found[layer] = torch.where(ends.isinf(), 1.0, ends / (1 + ends))
        return found

    def _has_errors(self, op: str) -> None:
        if not self.errors:
            raise ValueError(
                f"Scores.{op}: scores must have been computed with errors: score(moments, errors=True), or score of "
                f"the blocks of collect_blocks."
            )

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per (layer, channel, class), with standard errors where there are any. Needs
        pandas."""
        import pandas as pd

        columns = {"score": self.layers, "direction": self.direction}
        if self.errors:
            columns["standard_error"] = self.standard_error()
        frames = []
        for layer, values in self.items():
            channels, classes = (axis.flatten().numpy() for axis in torch.ones_like(values).nonzero().T.cpu())
            frame = pd.DataFrame({"layer": layer, "channel": channels, "class": classes})
            frame = frame.assign(**{name: part[layer].cpu().flatten().numpy() for name, part in columns.items()})
            frames.append(frame.assign(samples=self.counts.cpu().numpy()[classes]))
        return pd.concat(frames, ignore_index=True)

    def plot(self, path: str | os.PathLike[str] | None = None, *, class_names: list[str] | None = None) -> Figure:
        """Heat map of every component's score for every class, layers side by side. Needs matplotlib.

        Args:
            path: where to save the picture (its suffix is the format); by default it is only returned.
            class_names: one name per class for the axis.
        """
        from discedit.scoring.plot import plot

        return plot(self, path, class_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        files.save_tensors(path, "scores", *self.contents())

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the file format."""
        tensors = {"counts": self.counts} | ({"degrees": self.degrees} if self.errors else {})
        parts = {"score": self.layers, "direction": self.direction, "pairs": self.pairs, "error": self.errors}
        for index, layer in enumerate(self):
            tensors |= {f"{index}.{name}": part[layer] for name, part in parts.items() if part}
        header = {
            **self.settings,
            "pairs": bool(self.pairs),
            "errors": bool(self.errors),
            "num_classes": self.num_classes,
            "layers": {layer: len(values) for layer, values in self.items()},
            "norms": self.norms,
        }
        return header, tensors

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged or foreign file.
        """
        header, tensors = files.load_tensors(path, "scores")
        statistic = files.field(header, "statistic", (str, list), path)
        classes = files.field(header, "num_classes", int, path)
        layers = files.field(header, "layers", dict, path)
        has_pairs, has_errors = (files.field(header, name, (bool, type(None)), path) for name in ("pairs", "errors"))

        def part(name: str, columns: int = classes, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
            sizes = {layer: (f"{index}.{name}", (layers[layer], columns)) for index, layer in enumerate(layers)}
            return {layer: files.take(tensors, *size, dtype, path) for layer, size in sizes.items()}

        scores = cls(
            part("score"),
            part("direction", dtype=torch.int8),
            files.take(tensors, "counts", (classes,), torch.int64, path),
            bound=files.field(header, "bound", str, path),
            witness=files.field(header, "witness", str, path),
            statistic=statistic if isinstance(statistic, str) else tuple(statistic),
            scale=files.field(header, "scale", (float, dict, type(None)), path),
            read=READ_ONCE if "read" not in header else files.field(header, "read", str, path),
            norms=files.field(header, "norms", dict, path),
            options=files.field(header, "options", (dict, type(None)), path) or {},
            pairs=part("pairs", 2) if has_pairs else {},
            errors=part("error") if has_errors else {},
        )
        if has_errors:
            scores.degrees = files.take(tensors, "degrees", (classes,), torch.float64, path)
        files.nothing_else(header, tensors, scores.contents(), path)
        return scores


def score(
    moments: Moments | Sequence[Moments],
    *,
    bound: str = "minimax",
    witness: str | None = None,
    pairs: bool = False,
    errors: bool = False,
    shrinkage: str | float | None = "auto",
    backend: str = "auto",
    **options: Any,
) -> Scores:
    """Score every component by a lower bound on the total variation between each class and the rest.

    Args:
        moments: what `collect_moments` returned; or blocks of samples, as from `collect_blocks`, which are scored
            together and give standard errors by the jackknife.
        bound: "minimax" (the tightest from two moments), "fisher" (the published one), or another of `ops.one_vs_rest`.
        witness: "quadratic" (t and t^2 of the pooled map t) or "linear" (t alone), of moments collected for either;
            by default the former, for the bounds of one number the latter. Of other moments their own.
        pairs: also score all pairs of classes, for the reductions "pairwise_min" and "pairwise_mean".
        errors: also compute standard errors, from a single `Moments` by the delta method: for the bounds "minimax" and
            "fisher" and the witnesses "linear" and "exp". Blocks always give errors, but for "certified".
        shrinkage: of covariances, for the witness "vector", as in `uncertainty.shrink`; None: none.
        options: of the bound, as for `ops.one_vs_rest`. For "certified", alpha is shared over all scores.

    Returns:
        `Scores`. A class without samples has NaN scores and is left out of every reduction; a warning names those, and
        classes with one sample, which have no spread to judge by.

    Raises:
        ValueError: `moments` holds no layer, an argument is not one of its choices, or does not fit the moments or the
            bound.
        TypeError: an option is not one of the bound's, or moments is neither a `Moments` nor a sequence of them.

    >>> import torch, discedit
    >>> moments, labels = discedit.Moments(2), torch.tensor([0, 0, 1, 1])
    >>> moments.update("conv", torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), labels)
    >>> discedit.score(moments)["conv"]
    tensor([[1., 1.],
            [0., 0.]], dtype=torch.float64)
    """
    blocks = _blocks(moments)
    moments = _together(blocks)
    if not moments:
        raise ValueError("score: moments must hold at least one layer, it is empty.")
    witness = _witness(moments, witness, bound)
    validation.choice("score", "backend", backend, ("auto", *NAMES))
    by_jackknife = len(blocks) > 1 and bound != "certified"
    if errors and not by_jackknife:
        _has_delta_method(bound, witness)
    fullest = max((state.count for state in moments.values()), key=lambda count: int(count.sum()))
    counts = fullest.detach().cpu().clone()
    _report_thin_classes(counts, len(blocks) if by_jackknife else 0)
    if bound == "certified":
        options = _certified_options(moments, witness, pairs, counts, options)
    chosen: dict[str, Any] = {"bound": bound, "witness": witness, "backend": backend, **options}
    values, found_pairs, found_errors = {}, {}, {}
    for layer, state in moments.items():
        shrunk = shrink(state, shrinkage) if isinstance(state, VectorMoments) and shrinkage is not None else state
        values[layer] = ops.one_vs_rest(shrunk, **chosen)
        if pairs:
            of_pairs = [ops.pairwise_min(shrunk, **chosen)[0], ops.pairwise_mean(shrunk, **chosen)]
            found_pairs[layer] = torch.stack(of_pairs, dim=-1)
        if by_jackknife:
            parts = [block[layer] for block in blocks if layer in block]
            found_errors[layer] = jackknife(parts, shrinkage=shrinkage, **chosen)
        elif errors and isinstance(state, ClassMoments):
            found_errors[layer] = standard_error(state, bound=bound, witness=witness)
    # Of freedom: of a jackknife its blocks less one, else by the side with fewer samples.
    degrees = torch.full((len(counts),), float(len(blocks) - 1), dtype=torch.float64)
    if not by_jackknife:
        degrees = (torch.minimum(counts, counts.sum() - counts) - 1).clamp(min=1).double()
    return Scores(
        values,
        {layer: _direction(state, -1 if witness == "exp" else 1) for layer, state in moments.items()},
        counts,
        bound=bound,
        witness=witness,
        **{name: getattr(moments, name) for name in ("statistic", "scale", "read")},
        norms=dict(moments.norms),
        options=options,
        pairs=found_pairs,
        errors=found_errors,
        degrees=degrees,
    )


def over_classes(values: Tensor, reduction: str) -> Tensor:
    """(channels, classes) -> (channels,): over the classes that are not NaN everywhere, which have no samples."""
    return OVER_CLASSES[reduction](values[:, ~values.isnan().all(dim=0)])


def _checked_indices(layer: str, indices: Any, values: Tensor) -> Tensor:
    index = torch.as_tensor(indices, device=values.device)
    whole = not index.numel() or not (index.is_floating_point() or index.dtype == torch.bool)
    index = index.long()
    inside = whole and (not index.numel() or 0 <= int(index.min()) <= int(index.max()) < len(values))
    if index.ndim != 1 or not inside:
        raise ValueError(
            f"Scores.select: components[{layer!r}] must be indices in 0..{len(values) - 1}, got {indices!r}."
        )
    return index


def _blocks(moments: Any) -> list[Moments]:
    if isinstance(moments, Moments):
        return [moments]
    if not isinstance(moments, Sequence) or not all(isinstance(block, Moments) for block in moments):
        raise TypeError(f"score: moments must be a Moments or a sequence of them, got {type(moments).__name__}.")
    if not moments:
        raise ValueError("score: moments must hold at least one block, it is empty.")
    return list(moments)


def _together(blocks: list[Moments]) -> Moments:
    if len(blocks) == 1:
        return blocks[0]
    together = blocks[0].rows(slice(None))
    for block in blocks[1:]:
        together.merge(block)
    return together


def _has_delta_method(bound: str, witness: str) -> None:
    if bound not in ("minimax", "fisher") or witness not in ("linear", "exp"):
        raise ValueError(
            f"score: errors must be False for bound={bound!r} and witness={witness!r}, or moments blocks from "
            f"collect_blocks: from one Moments errors have a formula for the bounds 'minimax' and 'fisher' and the "
            f"witnesses 'linear' and 'exp' alone."
        )


def _certified_options(
    moments: Moments, witness: str, pairs: bool, counts: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """With one share of alpha for every number that `score` returns."""
    names = (moments.statistic,) if isinstance(moments.statistic, str) else moments.statistic
    if witness == "exp" and "value_range" not in options and names[0] not in NEVER_NEGATIVE:
        raise ValueError(
            f"score: value_range must be given for bound='certified' with statistic={names[0]!r}, which may be "
            f"negative: value_range=(0, 1) says that exp(-scale t) never leaves it, because t is never negative."
        )
    classes = int((counts > 0).sum())
    each = classes + (classes * (classes - 1) // 2 if pairs else 0)
    values = each * sum(state.channels for state in moments.values())
    return {"comparisons": max(1, values), **options}


def _witness(moments: Moments, witness: str | None, bound: str) -> str:
    validation.choice("score", "bound", bound, arguments.BOUNDS)
    serves = ("quadratic", "linear") if moments.witness in ("quadratic", "linear") else (moments.witness,)
    if witness is None:
        witness = serves[-1 if bound in arguments.OF_ONE_NUMBER else 0]
    if witness not in serves:
        raise ValueError(
            f"score: witness must be one of {validation.quoted(serves)} for moments collected with "
            f"witness={moments.witness!r}, got {witness!r}."
        )
    arguments.fits("score", bound, witness)
    return witness


def _report_thin_classes(counts: Tensor, blocks: int) -> None:
    numbers = counts.tolist()
    empty = [k for k, n in enumerate(numbers) if n == 0]
    single = [k for k, n in enumerate(numbers) if n == 1]
    thin = [k for k, n in enumerate(numbers) if 0 < n < blocks]
    texts = {
        f"classes without samples: {empty}. Their scores are NaN and they are never chosen.": empty,
        "fewer than two classes have samples, so there is nothing to tell apart.": len(numbers) - len(empty) < 2,
        f"classes with one sample: {single}. One sample shows no spread, so their scores are too high.": single,
        f"classes with fewer samples than there are blocks ({blocks}): {thin}. Their errors are NaN.": thin,
    }
    for text, applies in texts.items():
        if applies:
            warn(f"score: {text}")


def _direction(state: State, factor: int) -> Tensor:
    """Sign of (class mean - mean of the rest): the sign of (class mean - overall mean), a mean of both."""
    mean = state.mean[0] if isinstance(state, VectorMoments) else state.mean
    seen = state.count > 0
    anchor = mean[int(seen.to(torch.int8).argmax())]
    # Relative to one class's mean, so that equal constants give exactly 0.
    relative = torch.where(seen[:, None], mean - anchor, 0.0)
    overall = (state.count[:, None] * relative).sum(0) / state.count.sum().clamp(min=1)
    sign = torch.where(seen[:, None], (relative - overall).sign(), 0.0)
    return (factor * sign).T.contiguous().to(torch.int8)
