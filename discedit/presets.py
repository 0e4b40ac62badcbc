"""The published algorithms by name, so that a benchmark can say exactly what it compares.

    algorithm = preset("tvsprune")
    scores = algorithm.score(model, loader, num_classes=10)
    smaller = algorithm.prune(model, scores, example_inputs=x).model

Sources:
    TVSPrune: Murti, Narshana and Bhattacharyya, ICLR 2023; scripts in chaimurti/TVSPrune and tvsprune/TVS_Prune.
    WitnessPrune: "Distributional Structured Pruning by Lower Bounding the Total Variation Distance using Witness
    Functions", submitted to ICLR 2024; scripts in witnessprune-github/witnessprune-initial.
    DISCEDIT: Murti and Bhattacharyya, NeurIPS 2024; scripts in witnessprune-github/discedit_witnessprune.

We have read the abstracts of the papers and their public scripts, not the papers whole. A preset's `notes` say which of
the two a formula comes from, and what is not confirmed.

The presets are the algorithms, not the scripts. Known faults of the scripts, none of which is shared:

1. They sum maps over space in float32 and keep raw second powers, which cancel or overflow; the exponential of such a
   sum overflows beyond 88. Here: float64, central moments, and features standardised per channel.
2. They add 1e-5 to a covariance only when its determinant is exactly 0. Here: the bounds take singular and nearly
   singular covariances and charge rounding against the score.
3. They divide the sums of a batch by numbers that are not its number of samples (64 images by 256, 576 by 1,024), or
   sum over the images of a batch before squaring. Here: each sample counts once, by its class.
4. They mask every filter of a layer when none is to go (``[-0:]``).
5. They take their moments from one batch. Here: from all of the loader.
6. Their minimax script takes a square root by NumPy's matrix_power, which refuses powers that are not integers.

They also score a layer after the layers before it have been masked; here all layers are scored in one pass over the
model as it was, and pruned components are removed, not masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from discedit.common import validation
from discedit.editing.prune import prune
from discedit.editing.unlearn import unlearn
from discedit.moments.collect import collect_moments
from discedit.moments.moments import Statistic
from discedit.recipes.recipe import Edit, joined
from discedit.scoring.scores import Scores, score

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
        notes: the formula, its source, what is not confirmed, and what differs from the published code.

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
    notes: str
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
        settings: dict[str, Any] = {
            "statistic": self.statistic,
            "witness": self.witness,
            "scale": self.scale,
            "read": self.read,
            **overrides,
        }
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
        inplace: bool = False,
        **overrides: Any,
    ) -> Edit:
        """Remove the components that the algorithm selects. As published, nothing is repaired afterwards.

        Args:
            model, example_inputs, layers, inplace: as for `discedit.prune`.
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
            return self._signed(prune(model, scores, ratio=share, inplace=inplace, **settings))
        if threshold is not None:
            _checked_threshold(op, threshold)
        reduced = scores.reduce(settings["criterion"])
        shares = {layer: _below(values, self.amount, threshold) / len(values) for layer, values in reduced.items()}
        edit = prune(model, scores, ratio=shares, inplace=inplace, **settings)
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
        inplace: bool = False,
    ) -> Edit:
        """Mask the components of each layer that tell the given classes best, of any sign.

        Unlike `discedit.unlearn`, which ranks all layers together, each layer has a ranking of its own, as published.

        Args:
            model, classes, layers, inplace: as for `discedit.unlearn`.
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
        settings: dict[str, Any] = {"fraction": self.amount if fraction is None else fraction, "sign": "any"}
        # Checks the arguments, and chooses the layers where none are named.
        whole = unlearn(model, scores, classes=classes, layers=layers, **settings)
        edits = []
        for layer in whole.recipe.settings["layers"]:
            told = [cls for cls in whole.recipe.settings["classes"] if bool((scores[layer][:, cls] > 0).any())]
            if told:
                edits.append(unlearn(model, scores, classes=told, layers=[layer], **settings))
        return self._signed(joined(model, edits, inplace), **whole.recipe.settings)

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
    notes="""\
Formula: with s the sum of a component's map over space, m and S mean and covariance of (s, s^2), and d = m_c - m_rest
between class c and all others, F_c = d' (S_c + S_rest)^-1 d and T_c = F_c / (2 + F_c). The score is the least T_c over
classes; ceil(ratio x components) of each layer go, the lowest first.

Confirmed: the bound, the features, one class against its complement, the minimum over classes, the share of each
layer (0.5) in the scripts of WitnessPrune. That DISCEDIT-SP is these scripts under a new name is said in the README
of DISCEDIT's scripts.
Not confirmed: the reduction in DISCEDIT's own text.

Different here: none of the six faults of the scripts (see the module). The scripts read a convolution before its
batch norm, here it is read behind it, which changes nothing: (1, s, s^2) spans the same functions. They have variants
with the robust and the minimax bound: `dataclasses.replace` makes those, "minimax_published" the looser form.""",
)

WITNESSPRUNE = replace(
    DISCEDIT_SP,
    name="witnessprune",
    paper="Distributional Structured Pruning by Lower Bounding the Total Variation Distance "
    "using Witness Functions, submitted to ICLR 2024; the predecessor of DISCEDIT",
    reduction="pairwise_min",
    notes="""\
Formula: the bound T = F / (2 + F) and the features (s, s^2) of "discedit_sp", between each two classes. The score
is the least T over all pairs of classes; ceil(ratio x components) of each layer go, the lowest first.

Confirmed: the abstract defines the discriminative ability of a filter as the minimum pairwise total variation,
bounds it by moments of witness functions, relates the bound to Fisher's discriminant and the Minimax Probability
Machine, and reports a polynomial witness; the bound, the features and the share (0.5) are in the scripts.
Not confirmed: the paper's theorem in its own words; whether its experiments take pairs of classes, as the abstract
does, or each class against its complement, as the scripts do.

Different here: the scripts take each class against its complement, which is the preset "discedit_sp"; this preset
is the abstract's. None of the six faults of the scripts (see the module).""",
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
    notes="""\
Formula: the score is the least 1 - BC over all pairs of classes, BC the Bhattacharyya coefficient of Gaussians with
the classes' moments; it bounds the total variation of such Gaussians from below. Components that score less than a
threshold go. `tvsprune_iterative` repeats this; `ldiff` is its score of a layer.

Confirmed: that TVSPrune takes the minimum pairwise total variation, assumes Gaussian features and uses the
Hellinger bound, in the abstract of WitnessPrune. The threshold of a layer as a share of its mean score (0.5 at
first), in the scripts.
Not confirmed: which features are taken as Gaussian, here the mean of the map; whether the paper's thresholds are
absolute (`threshold`) or relative (the default); the formula of LDIFF.

Different here: the scripts compute no Hellinger distance at all, but the Euclidean distance between the classes'
mean maps behind the batch norm, without variances; they look at as many pairs of classes as the layer has filters;
and they mask what equals the threshold, so that a threshold of 0 masks dead filters. None of the six faults (see
the module).""",
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
    notes="""\
Formula: with f = exp(-||Y||), ||Y|| the Euclidean norm of a component's map behind its norm, the score for class c
is (E_c f - E_rest f)^2 / (2 (E_c f^2 + E_rest f^2)). In each layer the components with the highest scores for the
class to forget are masked: weights and bias of the layer and of its batch norm.

Confirmed: all of this in the scripts; those for CNNs leave out the factor 2, which does not change the order. They
mask 3 of 64 filters in each layer of the last stage of ResNet56 (the default here), 20 of 512 in each of the last
eight layers of VGG16, in ResNet20 what lies two standard deviations above the layer's mean, and for ViT the layer
norms' features by exp(-0.05 ||Y||) over the tokens and 1.25 or 1.375 standard deviations.
Not confirmed: the selection in the paper's own text.

Different here: by default the last third of the layers, a component that scores 0 is never masked, and none of the
six faults of the scripts (see the module). `discedit.unlearn` is not this algorithm: it ranks all layers together
and takes only components that are more active for the class.""",
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


def ldiff(scores: Scores, threshold: float, *, reduction: str = "pairwise_min") -> dict[str, float]:
    """TVSPrune's LDIFF: to what extent a layer mixes components that tell classes apart with others that do not.

    The mean score of the components at or above the threshold minus the mean score of those below, as we read it: the
    abstract calls it a heuristic for how far a layer may be pruned, its formula is not confirmed. A layer in which one
    of the two kinds is missing is no mixture, and has 0.

    Args:
        scores: from `Preset.score`.
        threshold: the score from which a component counts as discriminative, in [0, 1].
        reduction: how a component's scores become one number, as in `Scores.reduce`.

    Returns:
        Layer name -> a number in [0, 1].

    Raises:
        ValueError: threshold outside [0, 1], or as `Scores.reduce`.

    Source: Murti, Narshana and Bhattacharyya, TVSPrune, ICLR 2023.
    """
    _checked_threshold("ldiff", threshold)
    mixtures = {}
    for layer, values in scores.reduce(reduction).items():
        high, low = values[values >= threshold], values[values < threshold]
        mixtures[layer] = float(high.mean() - low.mean()) if len(high) and len(low) else 0.0
    return mixtures


def tvsprune_iterative(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    example_inputs: Any,
    accuracy: Callable[[nn.Module], float],
    floor: float,
    step: float = 0.025,
    algorithm: Preset | None = None,
    inplace: bool = False,
    **overrides: Any,
) -> Edit:
    """IterTVSPrune: score, prune below a threshold, and score what is left, as long as the accuracy stays.

    A round prunes each layer below `amount` times its mean score. If the accuracy stays at or above the floor, the
    smaller model is scored again; if not, the round is dropped and `amount` lowered by `step`. It ends when `amount`
    reaches 0 or nothing is left below it. This is the loop of the published scripts, with their first amount of 0.5
    and their step; the abstract says only that TVSPrune is applied again and again. The scripts do not end where the
    accuracy stays and nothing new falls below the threshold; and what they have masked still counts in the mean score
    of its layer, with 0, while what is removed here does not.

    Args:
        model, example_inputs, inplace: as for `discedit.prune`.
        loader, num_classes: as for `discedit.collect_moments`; the loader is read once for each model that is scored.
        accuracy: gives the accuracy of a model, or any other number that must not fall.
        floor: what `accuracy` must give at least for a round to be kept.
        step: how much `amount` is lowered after a round that is dropped, above 0.
        algorithm: a variant of the preset "tvsprune", whose `amount` is the first; by default that preset.
        overrides: further arguments of `Preset.score`.

    Returns:
        One `Edit` for all rounds together; without components where no round was kept.

    Raises:
        ValueError: step is not above 0, the selection of `algorithm` is not "below", the model is below the floor
            before anything is pruned, or as `Preset.score` and `Preset.prune`.

    Source: Murti, Narshana and Bhattacharyya, TVSPrune, ICLR 2023.
    """
    op = "tvsprune_iterative"
    algorithm = PRESETS["tvsprune"] if algorithm is None else algorithm
    if algorithm.selection != "below":
        raise ValueError(f"{op}: algorithm must have the selection 'below', it has {algorithm.selection!r}.")
    if not validation.is_number(step) or not 0 < step < math.inf:
        raise ValueError(f"{op}: step must be a finite number above 0, got {step!r}.")
    before = accuracy(model)
    if not before >= floor:
        raise ValueError(f"{op}: floor must not be above the accuracy of the model, {before}, got {floor!r}.")
    scores = algorithm.score(model, loader, num_classes, **overrides)
    edits = [replace(algorithm, amount=0.0).prune(model, scores, example_inputs=example_inputs)]
    dropped = 0
    while (amount := algorithm.amount - dropped * step) > 1e-9:  # no sum, whose rounding would add a round
        edit = replace(algorithm, amount=amount).prune(edits[-1].model, scores, example_inputs=example_inputs)
        if not any(edit.recipe.components.values()):
            break
        if accuracy(edit.model) >= floor:
            edits.append(edit)
            scores = algorithm.score(edit.model, loader, num_classes, **overrides)
        else:
            dropped += 1
    edit = joined(model, edits, inplace)
    edit.recipe.settings |= {
        "algorithm": "tvsprune_iterative",
        "floor": floor,
        "step": step,
        "rounds": len(edits) - 1,
    }
    return edit


def _below(values: Tensor, share: float, threshold: float | None) -> int:
    """How many of a layer's components score below the threshold, leaving one."""
    limit = share * values.mean() if threshold is None else threshold
    return min(int((values < limit).sum()), len(values) - 1)


def _checked_threshold(op: str, value: Any) -> None:
    if not validation.is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{op}: threshold must be a number in [0, 1], got {value!r}.")
