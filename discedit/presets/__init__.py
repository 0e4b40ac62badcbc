"""The published algorithms by name, so that a benchmark can say exactly what it compares: docs/presets.md.

algorithm = preset("tvsprune")
scores = algorithm.score(model, loader, num_classes=10)
smaller = algorithm.prune(model, scores, example_inputs=x).model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from discedit.common import validation
from discedit.editing.ablation import AblateComponents
from discedit.editing.prune import prune
from discedit.editing.unlearn import unlearn
from discedit.moments.collect import collect_moments
from discedit.moments.moments import Statistic
from discedit.recipes.recipe import Edit
from discedit.scoring.scores import Scores, score
from discedit.selection.ranking import TopFractionOfEach

SELECTIONS = ("lowest", "below", "highest")


@dataclass(frozen=True)
class Preset:
    """One published algorithm: what is scored, by which bound, and which components go.

    `dataclasses.replace` makes a variant, such as the same algorithm with the bound "minimax".

    Attributes:
        name: what the preset is called in `PRESETS`.
        paper: where it was published.
        statistic, witness, scale, read: of the moments, as in `discedit.collect_moments`.
        bound: as in `discedit.score`.
        reduction: how a component's scores become one number, as in `Scores.reduce`; the pairwise ones compare each
            class with each other, all others a class with the union of the rest.
        selection: "lowest" (prune a share of each layer), "below" (prune what falls below a threshold) or "highest"
            (unlearn: mask a share of each layer).
        amount: what the published scripts select by, in [0, 1): for "lowest" and "highest" the share of a layer's
            components, for "below" the threshold as a share of the layer's mean score.

    Raises:
        ValueError: selection is none of the three, or amount is outside [0, 1).
    """

    name: str
    paper: str
    statistic: Statistic
    witness: str
    scale: float | None
    bound: str
    reduction: str
    selection: str
    amount: float
    read: str = "norm"

    def __post_init__(self) -> None:
        validation.choice("Preset", "selection", self.selection, SELECTIONS)
        if not validation.is_number(self.amount) or not 0 <= self.amount < 1:
            raise ValueError(f"Preset: amount must be a number in [0, 1), got {self.amount!r}.")

    def score(
        self, model: nn.Module, loader: Iterable[Any], num_classes: int, *, bound: str | None = None, **overrides: Any
    ) -> Scores:
        """Score every component as the algorithm does, in one forward pass over the data.

        Args:
            model, loader, num_classes: as for `discedit.collect_moments`.
            bound: replaces the preset's.
            overrides: further arguments of `discedit.collect_moments`; statistic, witness, scale and read replace
                the preset's.

        Returns:
            `Scores`, with the scores of all pairs of classes where the preset's reduction needs them.

        Raises:
            ValueError, TypeError: as `discedit.collect_moments` and `discedit.score`.
        """
        settings = {name: getattr(self, name) for name in ("statistic", "witness", "scale", "read")} | overrides
        moments = collect_moments(model, loader, num_classes, **settings)
        return score(
            moments,
            bound=self.bound if bound is None else bound,
            witness=settings["witness"],
            pairs=self.reduction.startswith("pairwise"),
            backend=settings.get("backend", "auto"),
        )

    def prune(
        self,
        model: nn.Module,
        scores: Scores,
        *,
        example_inputs: Any,
        ratio: float | None = None,
        threshold: float | None = None,
        layers: Iterable[str] | None = None,
        **overrides: Any,
    ) -> Edit:
        """Remove the components that the algorithm selects. As published, nothing is repaired afterwards.

        Args:
            model, example_inputs, layers: as for `discedit.prune`.
            scores: from `score`.
            ratio: for the selection "lowest": the share of each layer that goes, in [0, 1), by default `amount`.
            threshold: for the selection "below": components that score less go, in [0, 1]; by default `amount` times
                the mean score of their layer. One component of each layer always stays. At 0 nothing goes.
            overrides: further arguments of `discedit.prune`. With `data`, batch norms are re-estimated on it, unless
                `repair` says otherwise.

        Returns:
            `Edit`; `Edit.skipped` names the layers that cannot be pruned, with reasons.

        Raises:
            ValueError: the preset unlearns, ratio or threshold is out of range or not of this selection, or as
                `discedit.prune`.
        """
        op = "Preset.prune"
        if self.selection == "highest":
            raise ValueError(f"{op}: selection must be 'lowest' or 'below', preset {self.name!r} has 'highest'.")
        stranger, given = ("threshold", threshold) if self.selection == "lowest" else ("ratio", ratio)
        if given is not None:
            raise ValueError(f"{op}: {stranger} must be left out for the selection {self.selection!r}, got {given!r}.")
        settings = {"example_inputs": example_inputs, "criterion": self.reduction, "layers": layers, **overrides}
        settings.setdefault("repair", "none" if settings.get("data") is None else "batchnorm")
        if self.selection == "lowest":
            share = self.amount if ratio is None else ratio
            return self._signed(prune(model, scores, ratio=share, **settings))
        if threshold is not None and not (validation.is_number(threshold) and 0 <= threshold <= 1):
            raise ValueError(f"{op}: threshold must be a number in [0, 1], got {threshold!r}.")
        reduced = scores.reduce(settings["criterion"])
        shares = {}
        for layer, values in reduced.items():
            limit = self.amount * values.mean() if threshold is None else threshold
            shares[layer] = min(int((values < limit).sum()), len(values) - 1) / len(values)
        edit = prune(model, scores, ratio=shares, **settings)
        del edit.recipe.settings["ratio"]
        return self._signed(edit, threshold=threshold, amount=self.amount)

    def unlearn(
        self,
        model: nn.Module,
        scores: Scores,
        *,
        classes: Sequence[int],
        fraction: float | None = None,
        layers: Iterable[str] | None = None,
    ) -> Edit:
        """Mask the components of each layer that tell the given classes best, of any sign.

        Unlike `discedit.unlearn`, which ranks all layers together, each layer has a ranking of its own, as published.

        Args:
            model, classes, layers: as for `discedit.unlearn`.
            scores: from `score`.
            fraction: share of each layer's components to mask for each class, in (0, 1), by default `amount`; at least
                one, but none of a layer in which no component tells the class.

        Returns:
            `Edit`.

        Raises:
            ValueError: the preset prunes, or as `discedit.unlearn`.
        """
        if self.selection != "highest":
            raise ValueError(
                f"Preset.unlearn: selection must be 'highest', preset {self.name!r} has {self.selection!r}."
            )
        limit = TopFractionOfEach(self.amount if fraction is None else fraction)
        method = AblateComponents(limit, sign="any")
        return self._signed(unlearn(model, scores, classes=classes, layers=layers, method=method))

    def _signed(self, edit: Edit, **settings: Any) -> Edit:
        """The edit, whose recipe says what it is."""
        edit.recipe.settings = {**edit.recipe.settings, **settings, "preset": self.name}
        return edit


DISCEDIT_SP = Preset(
    name="discedit_sp",
    paper="Murti and Bhattacharyya, DISCEDIT: Model Editing by Identifying Discriminative Components, NeurIPS 2024",
    statistic="sum",
    witness="quadratic",
    scale=None,
    bound="fisher",
    reduction="min",
    selection="lowest",
    amount=0.5,
)

WITNESSPRUNE = replace(
    DISCEDIT_SP,
    name="witnessprune",
    paper="Distributional Structured Pruning by Lower Bounding the Total Variation Distance "
    "using Witness Functions, submitted to ICLR 2024; the predecessor of DISCEDIT",
    reduction="pairwise_min",
)

TVSPRUNE = Preset(
    name="tvsprune",
    paper="Murti, Narshana and Bhattacharyya, TVSPrune - Pruning Non-discriminative Filters via Total Variation "
    "Separability of Intermediate Representations without Fine Tuning, ICLR 2023",
    statistic="mean",
    witness="linear",
    scale=None,
    bound="hellinger",
    reduction="pairwise_min",
    selection="below",
    amount=0.5,
)

DISCEDIT_U = Preset(
    name="discedit_u",
    paper=DISCEDIT_SP.paper,
    statistic="l2",
    witness="exp",
    scale=1.0,
    bound="witness_published",
    reduction="max",
    selection="highest",
    amount=3 / 64,
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for preset in (DISCEDIT_SP, DISCEDIT_U, WITNESSPRUNE, TVSPRUNE)}
)


def preset(name: str) -> Preset:
    """The published algorithm of that name: "discedit_sp", "discedit_u", "witnessprune" or "tvsprune".

    Raises:
        ValueError: unknown name.

    >>> preset("tvsprune").bound
    'hellinger'
    """
    return PRESETS[validation.choice("preset", "name", name, PRESETS)]
