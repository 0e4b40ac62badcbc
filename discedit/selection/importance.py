"""How much each component counts: by scores, by weights, or by what the layers that read it lose without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.graph.pruning_graph import KINDS, Components, Graph
from discedit.model.forward import outside_modes
from discedit.model.sharded import unwrapped
from discedit.model.trace import ModelTrace, components_in
from discedit.moments.calibration import calibrated, scale_of
from discedit.moments.covariances import LayerMoments, fits_of
from discedit.moments.positions import matrix_of
from discedit.scoring.scores import REDUCTIONS, Scores
from discedit.selection.candidates import Candidates

POWERS = {"l1": 1, "l2": 2}  # of weights
OF_CONSUMERS = ("energy", "reconstruction", "combined", "fidelity")
OF_SCORES = (*REDUCTIONS, "combined")
CRITERIA = (*REDUCTIONS, *POWERS, "random", *OF_CONSUMERS)
COMPONENTS = ("filters", "neurons", "heads")  # by default
RIDGE = 1e-4  # of the mean variance of an input
TINY = 1e-300
DELAYED = 256  # inputs eliminated before all of the matrix follows: products at the speed of arithmetic, not memory


@dataclass(frozen=True)
class Random:
    """The criterion "random" with a seed of its own."""

    seed: int = 0


@outside_modes()
def importances(
    model: nn.Module,
    scores: Scores | None,
    criterion: str | Random,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    components: str | Iterable[str] = COMPONENTS,
) -> dict[str, Tensor]:
    """How much each component counts, by one of the criteria of `discedit.prune`, which takes the result as scores.

    Args:
        model, criterion, example_inputs, data, components: as for `discedit.prune`.
        scores: from `discedit.score`, whose layers are looked at; None, for criteria that need none: all layers.

    Returns:
        Layer -> (rows,) float64, one number for each output row of the layer, higher = keep; the rows of a component (a
        head) share theirs. Layers from which nothing can be removed are left out, and so are those to which the
        criterion does not apply, because nothing reads them that can be written as a matrix.

    Raises:
        ValueError: an unknown criterion or kind, a criterion without the data or the scores that it needs, or a model
            that cannot be traced.
    """
    op = "importances"
    if not isinstance(criterion, Random):
        validation.choice(op, "criterion", criterion, CRITERIA)
    check_criterion(op, criterion, data)
    criterion = Random() if criterion == "random" else criterion
    kinds = kinds_of(op, components)
    validation.module(op, model)
    if scores is None:
        check_scores(op, criterion)
    else:
        validation.instance(op, "scores", scores, Scores, "a discedit.Scores")
    model = unwrapped(model)
    graph = Graph(op, model, example_inputs)
    candidates = Candidates.of(op, model, scores)
    known = [layer for layer in candidates.widths if components_in(model.get_submodule(layer)) is not None]
    found, _ = graph.find(known, kinds)
    inputs: Any = None
    trace = ModelTrace(model)
    if criterion in OF_CONSUMERS and data is not None:
        inputs, trace, _ = calibrated(op, trace, data)
    values, unjudged = component_importances(candidates, criterion, graph, found, inputs, trace)
    rows = {}
    for layer, parts in found.items():
        if layer not in unjudged:
            rows[layer] = torch.full((candidates.widths[layer],), torch.nan, dtype=torch.float64)
            for own, value in zip(parts.rows, values[layer], strict=True):
                rows[layer][list(own)] = value
    return rows


def check_scores(op: str, criterion: str | Random | None) -> None:
    """Whether a criterion can do without scores."""
    if criterion in OF_SCORES:
        raise ValueError(f"{op}: criterion={criterion!r} needs scores, got scores=None.")


def check_criterion(op: str, criterion: str | Random | None, data: Any) -> None:
    """Whether it has the data that it needs."""
    if criterion in OF_CONSUMERS and data is None:
        raise ValueError(f"{op}: criterion={criterion!r} needs data to estimate statistics on, got data=None.")


def kinds_of(op: str, components: str | Iterable[str], known: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """The kinds of components asked for, checked."""
    asked = [components] if isinstance(components, str) else validation.names(op, "components", components)
    kinds = tuple(dict.fromkeys(one for kind in asked for one in (KINDS if kind == "all" else (kind,))))
    for kind in kinds:
        validation.choice(op, "components", kind, known)
    if not kinds:
        raise ValueError(
            f"{op}: components must name at least one of {', '.join(known)}, or be 'all', got {components!r}."
        )
    return kinds


def component_importances(
    candidates: Candidates,
    criterion: str | Random | None,
    graph: Graph,
    found: Mapping[str, Components],
    inputs: Any,
    trace: ModelTrace,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layer -> (components,) float64, higher = keep; and layers that had to be judged by "l2", each with the reason.

    Args:
        criterion: None for the importances that the candidates have.
        inputs, trace: calibration images in parts and the trace of the model, for the criteria `OF_CONSUMERS`.
    """
    if criterion is None:
        given = candidates.importances or {}
        return {layer: _over_rows(given[layer].double(), parts) for layer, parts in found.items()}, {}
    if candidates.scores is not None and criterion in REDUCTIONS:
        reduced = candidates.scores.reduce(str(criterion))
        return {layer: _over_rows(reduced[layer].cpu(), parts) for layer, parts in found.items()}, {}
    counts = {layer: len(parts.rows) for layer, parts in found.items()}
    if isinstance(criterion, Random):
        generator = torch.Generator().manual_seed(criterion.seed)
        return {layer: torch.rand(n, generator=generator, dtype=torch.float64) for layer, n in counts.items()}, {}
    if criterion in POWERS:
        return {layer: _weight_norms(graph, parts, POWERS[criterion]) for layer, parts in found.items()}, {}
    scores = candidates.scores if criterion == "combined" else None
    values, why = _of_consumers(graph.model, REDUCTION_OF[criterion], scores or {}, graph, counts, inputs, trace)
    for layer in why:
        values[layer] = _weight_norms(graph, found[layer], 2)
    return {layer: values[layer] for layer in found}, why


def _over_rows(values: Tensor, parts: Components) -> Tensor:
    return values[torch.tensor(parts.rows, dtype=torch.int64)].mean(1)


def _weight_norms(graph: Graph, parts: Components, power: int) -> Tensor:
    """Norms of the weights that give each component."""
    total = torch.zeros(len(parts.rows), dtype=torch.float64)
    for name, rows in graph.rows(parts.layer).items():
        place, _, tensor = name.rpartition(".")
        module = graph.model.get_submodule(place)
        weight: Tensor = getattr(module, tensor).detach()
        weight = weight.transpose(0, 1) if getattr(module, "transposed", False) else weight
        sums = weight.flatten(1).double().abs().pow(power).sum(1).cpu()
        total += sums[torch.tensor(rows)].sum(1)
    return total.pow(1 / power)


def _of_consumers(
    model: nn.Module,
    reduction: Reduction,
    scores: Mapping[str, Tensor],
    graph: Graph,
    counts: Mapping[str, int],
    inputs: Any,
    trace: ModelTrace,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By how much the outputs of the layers that read a component would change without it, as the reduction has it.

    Args:
        scores: layer -> (outputs, classes): a change of an output counts by its highest, of other layers by 1.
        counts: layer -> number of its components.
    """
    consumers: dict[str, dict[str, list[list[int]]]] = {}
    why: dict[str, str] = {}
    for layer, count in counts.items():
        blocks, unread = _blocks(graph, layer, count), {}
        for name, block in blocks.items():
            reason = trace.why_not_read(name)
            if not reason and len({len(channels) for channels in block}) > 1:
                reason = "it reads some of the components on more channels than others"
            if not reason and trace.runs.get(name) != 1:
                reason = "it does not run just once per forward pass"
            if reason:
                unread[name] = reason
        if len(unread) < len(blocks):
            consumers[layer] = {name: block for name, block in blocks.items() if name not in unread}
        else:
            name, reason = next(iter(unread.items()), ("no layer", "nothing reads it"))
            why[layer] = f"it is read by {name}: {reason}"
    fits = fits_of(model, {name for blocks in consumers.values() for name in blocks}, inputs, trace)
    statistics: dict[str, ConsumerStatistics] = {}
    values = {}
    for layer, blocks in consumers.items():
        for name in blocks.keys() - statistics.keys():
            matrix = matrix_of(model.get_submodule(name)).double()
            statistics[name] = ConsumerStatistics(*fits.pop(name), matrix, _output_weight(trace, name, scores))
        values[layer] = reduction([(statistics[name], block) for name, block in blocks.items()])
    return values, why


def fidelities(
    model: nn.Module, graph: Graph, counts: Mapping[str, int], inputs: Any, trace: ModelTrace
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of each component the fidelity around zero, as in ModHiFi: where nothing takes the mean of what goes.

    Returns:
        layer -> (components,) float64 in [0, 1], NaN where what is read is not finite; layer -> why there is none.
    """
    return _of_consumers(model, _fidelities_around_zero, {}, graph, counts, inputs, trace)


def _blocks(graph: Graph, layer: str, components: int) -> dict[str, list[list[int]]]:
    """Reader -> for each component the input channels on which it reads it."""
    together = graph.consumers({layer: range(components)})
    ends = [dict(graph.consumers({layer: [index]})) for index in (0, components - 1)]
    blocks = {}
    for name, channels in together:
        size = len(channels) // components
        parts = [channels[i * size : (i + 1) * size] for i in range(components)]
        # Nearly always the channels lie in the order of the components; asking for each takes long.
        if len(channels) % components or [parts[0], parts[-1]] != [end.get(name) for end in ends]:
            parts = [dict(graph.consumers({layer: [index]})).get(name, []) for index in range(components)]
        blocks[name] = parts
    return blocks


def _output_weight(trace: ModelTrace, name: str, scores: Mapping[str, Tensor]) -> Tensor:
    """What a change of each output of a layer counts: (outputs,), float64."""
    module: Any = trace.model.get_submodule(name)
    norm = trace.bias_norm(name)
    output_weight = torch.ones(len(module.weight), dtype=torch.float64, device=module.weight.device)
    if norm is not None:
        output_weight = scale_of(norm).double().square()
    if name in scores:
        output_weight = output_weight * scores[name].nan_to_num(0.0).max(1).values.to(output_weight.device)
    return output_weight


@dataclass
class ConsumerStatistics:
    """What a layer reads, its weights, and what a change of its outputs counts."""

    fit: LayerMoments
    channels: int  # that it reads
    weights: Tensor  # (outputs, inputs)
    output_weight: Tensor  # (outputs,)

    @property
    def total(self) -> float:
        """Variance of the outputs, as far as it counts."""
        return max(float((self.output_weight * self.fit.yy).sum()), TINY)

    def columns(self, blocks: list[list[int]]) -> Tensor:
        """The columns of the weights that belong to each block of channels: (components, columns)."""
        each = self.weights.shape[1] // self.channels
        index = torch.tensor(blocks, dtype=torch.int64, device=self.weights.device)
        return (index[:, :, None] * each + torch.arange(each, device=index.device)).flatten(1)

    def own(self, columns: Tensor) -> Tensor:
        """Variance of what each block adds to each output: (components, outputs)."""
        covariance = self.fit.xx[columns[:, :, None], columns[:, None, :]]
        weights = self.weights[:, columns].transpose(0, 1)  # components, outputs, columns
        return ((weights @ covariance) * weights).sum(2)


# Layers that read components, with the channels on which they read each.
Parts = list[tuple[ConsumerStatistics, list[list[int]]]]
Reduction = Callable[[Parts], Tensor]  # to (components,)


def _energies(parts: Parts) -> Tensor:
    """Variance of what each component adds to the outputs, as a share of theirs, summed over the consumers."""
    found: Any = 0.0
    for consumer, blocks in parts:
        found = found + consumer.own(consumer.columns(blocks)) @ consumer.output_weight / consumer.total
    return torch.as_tensor(found).cpu()


def _fidelities(parts: Parts) -> Tensor:
    """E<Y, A>^2 / (E||Y||^2 E||A||^2) of what each component adds (A) to an output (Y), in the mean over outputs."""
    found, active = torch.zeros(len(parts[0][1]), dtype=torch.float64), 0
    for consumer, blocks in parts:
        columns = consumer.columns(blocks)
        with_outputs = consumer.weights @ consumer.fit.xx
        energy = (consumer.weights * with_outputs).sum(1)
        weights = consumer.weights[:, columns].transpose(0, 1)  # components, outputs, columns
        both = (weights * with_outputs[:, columns].transpose(0, 1)).sum(2)
        whole = consumer.own(columns) * energy
        found += torch.where(whole > TINY, both.square() / whole.clamp(min=TINY), 0.0).clamp(max=1.0).sum(1).cpu()
        active += int((energy > TINY).sum())
    return found / max(active, 1)


def _eliminated(parts: Parts) -> Tensor:
    """Share of the consumers' variance that is lost when a component goes after all that are cheaper, the others having
    made up for it in the best way: optimal brain surgery for blocks of weights (Hassibi and Stork, 1993)."""
    states = [_BlockOBS(consumer, blocks) for consumer, blocks in parts]
    left = list(range(len(parts[0][1])))
    lost = torch.zeros(len(left), dtype=torch.float64)
    total = 0.0
    while left:
        # Of all that are left: costs fall, too, when what an input cancels goes.
        costs = torch.stack([state.costs() for state in states]).sum(0)
        place = int(costs.argmin())
        total += max(float(costs[place]), 0.0)
        lost[left.pop(place)] = total
        for state in states:
            state.remove(place)
    return lost


def _fidelities_around_zero(parts: Parts) -> Tensor:
    raw = []
    for consumer, blocks in parts:
        second = consumer.fit.xx + torch.outer(consumer.fit.mean_x, consumer.fit.mean_x)
        if not bool(second.isfinite().all()):
            return torch.full((len(blocks),), torch.nan, dtype=torch.float64)
        raw.append((replace(consumer, fit=replace(consumer.fit, xx=second)), blocks))
    return _fidelities(raw)


REDUCTION_OF: dict[str, Reduction] = {
    "energy": _energies,
    "reconstruction": _eliminated,
    "combined": _eliminated,
    "fidelity": _fidelities,
}


def _inverse(metric: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(metric)
    # Sums in float32 can leave it indefinite, and what is not finite must come out as such.
    return torch.linalg.inv(metric) if failed else torch.cholesky_inverse(factor)


class _BlockOBS:
    """One reader while components go: its weights follow, in the metric of what it reads.

    What goes is eliminated from [inverse | weights'], the inverse of the metric beside the weights, block by block. A
    component costs trace(own^-1 gram), with its own block of the inverse and the products of its weights; these follow
    at once, the rest in one product for many steps, as in LAPACK's Cholesky decomposition with pivots (pstrf).
    """

    def __init__(self, consumer: ConsumerStatistics, blocks: list[list[int]]) -> None:
        metric = consumer.fit.xx.clone()
        metric.diagonal().add_(RIDGE * max(float(metric.diagonal().mean()), TINY))
        inverse = _inverse(metric)
        columns = consumer.columns(blocks)
        self.each = columns.shape[1]
        self.output_weight = consumer.output_weight / consumer.total
        kept = columns.flatten()  # what else the layer reads never goes
        self._start(torch.cat([inverse[kept[:, None], kept], consumer.weights.T[kept]], 1))

    def _start(self, matrix: Tensor) -> None:
        self.matrix, inputs = matrix, len(matrix)
        self.left = list(range(inputs // self.each))  # components, by their place in the matrix
        blocks = matrix.view(-1, self.each, matrix.shape[1])
        own = blocks[:, :, :inputs].view(len(blocks), self.each, -1, self.each).diagonal(dim1=0, dim2=2)
        self.own = own.permute(2, 0, 1).clone()
        self.gram = (blocks[:, :, inputs:] * self.output_weight) @ blocks[:, :, inputs:].mT
        self.rows = matrix.new_empty(max(DELAYED, self.each), matrix.shape[1])
        self.gains = matrix.new_empty(len(self.rows), inputs)
        self.done = 0  # of their rows

    def costs(self) -> Tensor:
        """What removing each component that is left would now add to the loss."""
        costs: Tensor = torch.linalg.solve(self.own[self.left], self.gram[self.left])
        return costs.diagonal(dim1=1, dim2=2).sum(1).cpu()

    def remove(self, place: int) -> None:
        """Of the components that are left, the one in this place."""
        if self.done + self.each > len(self.rows):
            self._start(self._up_to_date())
        inputs, first = len(self.matrix), self.left.pop(place) * self.each
        block = slice(first, first + self.each)
        rows, gains = self.rows[: self.done], self.gains[: self.done]
        row = self.matrix[block] - gains[:, block].T @ rows
        gain = torch.linalg.solve(row[:, block], row[:, :inputs])
        # Its weights times the mean of all weights before and after: gain' change, and its transpose, leave the gram.
        weights = row[:, inputs:] * self.output_weight
        change = weights @ self.matrix[:, inputs:].T - (weights @ rows[:, inputs:].T) @ gains
        change -= (weights @ row[:, inputs:].T / 2) @ gain
        step = slice(self.done, self.done + self.each)
        self.rows[step], self.gains[step], self.done = row, gain, step.stop
        row, gain, change = (
            part[:, :inputs].view(self.each, -1, self.each).transpose(0, 1) for part in (row, gain, change)
        )
        self.own.baddbmm_(gain.mT, row, alpha=-1)
        self.gram.baddbmm_(gain.mT, change, alpha=-1).baddbmm_(change.mT, gain, alpha=-1)

    def _up_to_date(self) -> Tensor:
        """The matrix after all steps, without what is gone."""
        every = torch.arange(self.matrix.shape[1], device=self.matrix.device)
        inputs = every[: len(self.matrix)].view(-1, self.each)[self.left].flatten()
        columns = torch.cat([inputs, every[len(self.matrix) :]])
        gains, rows = self.gains[: self.done, inputs], self.rows[: self.done, columns]
        return self.matrix[inputs[:, None], columns].addmm_(gains.T, rows, alpha=-1)
