"""`score` and `Scores`: how well each component tells each class from the rest."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discedit import _checks, _files, ops
from discedit._state import State, VectorMoments
from discedit.moments import Moments, Scale, Statistic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda values: values.max(dim=1).values,
    "mean": lambda values: values.mean(dim=1),
    "min": lambda values: values.min(dim=1).values,
}


class Scores(Mapping[str, Tensor]):
    """Scores of every component: a mapping from layer name to a tensor (channels, classes), float64, in [0, 1].

    Attributes:
        direction: layer name -> int8 (channels, classes): 1 where the component is more active for the class than for
            the rest, -1 where less, 0 where equal. More active: a larger mean of the statistic, of the first one where
            there are several; for the witness "exp" a smaller mean of exp(-scale t), which falls as t grows.
        counts: samples per class, int64 (classes,).
        bound, witness, statistic, scale: what the numbers are; statistic and scale as in `Moments`.
        norms: as in `Moments`.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        direction: dict[str, Tensor],
        counts: Tensor,
        *,
        bound: str,
        witness: str,
        statistic: Statistic,
        norms: dict[str, str],
        scale: Scale = None,
    ) -> None:
        self._values = values
        self.direction = direction
        self.counts = counts
        self.bound = bound
        self.witness = witness
        self.statistic = statistic
        self.scale = scale
        self.norms = norms

    # A mapping of tensors has no equality of its own: identity, as for tensors' owners elsewhere.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> Tensor:
        return self._values[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

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
        """What the numbers are, as JSON has it: bound, witness and statistic, and the scale of the witness "exp"."""
        statistic = self.statistic if isinstance(self.statistic, str) else list(self.statistic)
        settings = {"bound": self.bound, "witness": self.witness, "statistic": statistic}
        return settings if self.scale is None else {**settings, "scale": self.scale}

    def reduce(self, reduction: str = "max") -> dict[str, Tensor]:
        """One number per component: layer name -> (channels,), over the classes that the layer has samples of.

        Args:
            reduction: "max" (the class it tells best), "mean", or "min" (as the published DISCEDIT-SP code does).

        Raises:
            ValueError: unknown reduction, or fewer than two classes have samples.
        """
        _checks.choice("Scores.reduce", "reduction", reduction, REDUCTIONS)
        reduced = {}
        for layer, values in self.items():
            seen = ~values.isnan().all(dim=0)
            if len(values) and int(seen.sum()) < 2:
                raise ValueError(
                    f"Scores.reduce: at least two classes must have samples to be told apart, layer {layer!r} has "
                    f"{int((self.counts > 0).sum())} of {self.num_classes}."
                )
            reduced[layer] = REDUCTIONS[reduction](values[:, seen])
        return reduced

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per (layer, channel, class). Needs pandas."""
        import pandas as pd

        frames = []
        for layer, values in self.items():
            channels, classes = values.shape
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "channel": torch.arange(channels).repeat_interleave(classes).numpy(),
                        "class": torch.arange(classes).repeat(channels).numpy(),
                        "score": values.cpu().flatten().numpy(),
                        "direction": self.direction[layer].cpu().flatten().numpy(),
                        "samples": self.counts.cpu().repeat(channels).numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def plot(self, path: str | os.PathLike[str] | None = None, *, class_names: list[str] | None = None) -> Figure:
        """Heat map of every component's score for every class, layers side by side. Needs matplotlib.

        Args:
            path: where to save the picture (its suffix is the format); by default it is only returned.
            class_names: one name per class for the axis.
        """
        from matplotlib.figure import Figure

        if class_names is not None and len(class_names) != self.num_classes:
            raise ValueError(
                f"Scores.plot: class_names must name {self.num_classes} classes, got {len(class_names)} names."
            )
        columns, edges = [], [0]
        for values in self.values():
            order = values.nan_to_num().amax(1).argsort(descending=True)
            columns.append(values[order].T.cpu())
            edges.append(edges[-1] + len(values))
        figure = Figure(figsize=(12, 1.8 + 0.28 * self.num_classes), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            torch.cat(columns, dim=1).numpy(), aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest"
        )
        for edge in edges[1:-1]:
            axes.axvline(edge - 0.5, color="white", linewidth=0.4 if len(self) > 12 else 1.0)
        # With many layers the names would overlap: name every k-th.
        step = -(-len(self) // 28)
        middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
        names = [f"{layer} ({len(values)})" for layer, values in self.items()]
        few = len(self) <= 8
        axes.set_xticks(middles[::step], names[::step], rotation=0 if few else 60, ha="center" if few else "right")
        axes.set_yticks(range(self.num_classes), class_names or [str(k) for k in range(self.num_classes)])
        axes.set_xlabel("layer (channels, the most discriminative first)")
        axes.set_ylabel("class")
        axes.set_title(f"How well each component tells each class from the rest ({self.bound}, {self.witness})")
        figure.colorbar(image, ax=axes, label="lower bound on total variation", pad=0.01)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"counts": self.counts}
        for index, (layer, values) in enumerate(self.items()):
            tensors[f"{index}.score"] = values
            tensors[f"{index}.direction"] = self.direction[layer]
        header = {
            **self.settings,
            "num_classes": self.num_classes,
            "layers": {layer: len(values) for layer, values in self.items()},
            "norms": self.norms,
        }
        _files.save_tensors(path, "scores", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file. ValueError: a damaged or foreign file.
        """
        header, tensors = _files.load_tensors(path, "scores")
        statistic = _files.field(header, "statistic", (str, list), path)
        classes = _files.field(header, "num_classes", int, path)
        values, direction = {}, {}
        for index, (layer, channels) in enumerate(_files.field(header, "layers", dict, path).items()):
            values[layer] = _files.take(tensors, f"{index}.score", (channels, classes), torch.float64, path)
            direction[layer] = _files.take(tensors, f"{index}.direction", (channels, classes), torch.int8, path)
        return cls(
            values,
            direction,
            _files.take(tensors, "counts", (classes,), torch.int64, path),
            bound=_files.field(header, "bound", str, path),
            witness=_files.field(header, "witness", str, path),
            statistic=statistic if isinstance(statistic, str) else tuple(statistic),
            scale=_files.field(header, "scale", (float, dict, type(None)), path),
            norms=_files.field(header, "norms", dict, path),
        )


def score(moments: Moments, *, bound: str = "minimax", witness: str | None = None, backend: str = "auto") -> Scores:
    """Score every component by a lower bound on the total variation between each class and the rest.

    Args:
        moments: what `collect_moments` returned.
        bound: "minimax" (the tightest from two moments) or "fisher" (the published DISCEDIT bound).
        witness: "quadratic" (t and t^2 of the pooled map t) or "linear" (t alone), of moments collected for either;
            "exp" or "vector" of moments collected for that. By default the moments' own, and "quadratic" of those that
            serve both.
        backend: as in `discedit.ops`.

    Returns:
        `Scores`. A class without samples has NaN scores, is reported in one warning, and is left out of every
        reduction; a class with one sample has no spread to judge by, which is reported in the same way.

    Raises:
        ValueError: `moments` holds no layer, an argument is not one of its choices, or the witness is not one that the
            moments were collected for.

    >>> import torch, discedit
    >>> moments, labels = discedit.Moments(2), torch.tensor([0, 0, 1, 1])
    >>> moments.update("conv", torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), labels)
    >>> discedit.score(moments)["conv"]
    tensor([[1., 1.],
            [0., 0.]], dtype=torch.float64)
    """
    if not moments:
        raise ValueError("score: moments must hold at least one layer, it is empty.")
    witness = _witness(moments, witness)
    fullest = max((state.count for state in moments.values()), key=lambda count: int(count.sum()))
    counts = fullest.detach().cpu().clone()
    _report_thin_classes(counts)
    values = {
        layer: ops.one_vs_rest(state, bound=bound, witness=witness, backend=backend) for layer, state in moments.items()
    }
    return Scores(
        values,
        {layer: _direction(state, -1 if witness == "exp" else 1) for layer, state in moments.items()},
        counts,
        bound=bound,
        witness=witness,
        statistic=moments.statistic,
        scale=moments.scale,
        norms=dict(moments.norms),
    )


def _witness(moments: Moments, witness: str | None) -> str:
    serves = ("quadratic", "linear") if moments.witness in ("quadratic", "linear") else (moments.witness,)
    if witness is None:
        return serves[0]
    if witness not in serves:
        raise ValueError(
            f"score: witness must be one of {_checks.quoted(serves)} for moments collected with "
            f"witness={moments.witness!r}, got {witness!r}."
        )
    return witness


def _report_thin_classes(counts: Tensor) -> None:
    empty = [k for k, n in enumerate(counts.tolist()) if n == 0]
    single = [k for k, n in enumerate(counts.tolist()) if n == 1]
    if empty:
        warnings.warn(
            f"score: classes without samples: {empty}. Their scores are NaN and they are never chosen.", stacklevel=3
        )
    if len(counts) - len(empty) < 2:
        warnings.warn("score: fewer than two classes have samples, so there is nothing to tell apart.", stacklevel=3)
    if single:
        warnings.warn(
            f"score: classes with one sample: {single}. One sample shows no spread, so their scores are too high.",
            stacklevel=3,
        )


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
