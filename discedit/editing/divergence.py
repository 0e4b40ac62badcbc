"""How much the output of a model diverges when one layer alone loses components, measured level by level."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discedit.graph.hiding import hide, zero_rows
from discedit.graph.pruning_graph import Components, Graph
from discedit.model.forward import call, first_tensor, frozen_eval, hooked, index_samples
from discedit.model.replay import Replay
from discedit.model.size import count_macs
from discedit.model.trace import ModelTrace
from discedit.moments.calibration import HeldOut, batch_size_of, kept_back
from discedit.moments.covariances import LayerMoments, fits_of
from discedit.moments.positions import matrix_of, unknowns_of
from discedit.recipes.divergences import DivergenceTable, LayerDivergence
from discedit.recipes.recipe import architecture_of, copied
from discedit.repair.least_squares import RIDGE, Repairs, ridge_regression
from discedit.selection.divergence import MeasureDivergence

# Inputs of a layer that are fitted in trials, at most: a system of so many takes seconds.
MOST_UNKNOWNS = 8192
FITTED = 256  # samples that they are fitted to, at least, where there are so many: more tell no more (docs/notes.md)


def measured_divergences(
    op: str,
    how: MeasureDivergence,
    graph: Graph,
    found: Mapping[str, Components],
    importances: Mapping[str, Tensor],
    calibration: tuple[Sequence[Any], Any, ModelTrace],
    settings: dict[str, Any],
) -> DivergenceTable:
    """A trial for each layer and level, with the layers that read what goes repaired, each by itself.

    Args:
        found: layer -> its components.
        importances: layer -> (components,).
        calibration: inputs in parts, further ones or None, as of `calibrated`, and the trace of the model.
        settings: what they were made with, for the table.
    """
    from tqdm.auto import tqdm

    inputs, further, trace = calibration
    levels = how.levels(len(found))
    # Trials run on samples that no fit has seen, as far as they go: wide layers are fitted to few rows for each input.
    parts, held_out = kept_back(op, inputs, further)
    one = index_samples(parts[0], slice(1), batch_size_of(op, parts[0]))
    samples = how.samples_of(levels * len(found), count_macs(trace.model, one))
    trials = _Trials(op, graph, list(found), parts, held_out, trace, samples)
    settings = settings | {"samples": trials.samples, "levels": levels, "outputs": trials.size}
    table = DivergenceTable({}, settings, architecture_of(trace.model))
    if how.path is not None and Path(how.path).is_file():
        table.layers.update(_resumed(op, how.path, table, importances))
    shown = sys.stderr.isatty() if how.progress is None else how.progress
    left = [layer for layer in trials.in_order(found) if layer not in table]
    with tqdm(total=levels * len(left), desc="divergence", unit="trial", disable=not shown) as bar:
        for layer in left:
            order, components = importances[layer].argsort(stable=True).tolist(), len(importances[layer])
            counts = sorted(
                {round(level * components / (levels + 1)) for level in range(1, levels + 1)} - {0, components}
            )
            divergence = [trials.divergence(layer, order[:count]) for count in counts]
            table.layers[layer] = LayerDivergence(
                importances[layer].double().cpu(), torch.tensor(counts), torch.tensor(divergence, dtype=torch.float64)
            )
            bar.update(levels)
            if how.path is not None:
                table.save(how.path)
    return table


def _resumed(
    op: str, path: Any, table: DivergenceTable, importances: Mapping[str, Tensor]
) -> dict[str, LayerDivergence]:
    """What a file holds already of a table."""
    known = DivergenceTable.load(path)
    same = known.architecture == table.architecture and known.settings.keys() == table.settings.keys()
    same = same and all(_alike(known.settings[name], value) for name, value in table.settings.items())
    for layer, values in importances.items() if same else ():  # scores may be others
        given = known[layer].importances if layer in known else values.double().cpu()
        same = same and given.shape == values.shape and torch.allclose(given, values.double().cpu(), equal_nan=True)
    if not same:
        raise ValueError(
            f"{op}: MeasureDivergence.path must name a new file, or one of the same model, data, importances and "
            f"settings; {str(path)!r} holds {known}."
        )
    return dict(known)


def _alike(one: Any, other: Any) -> bool:
    """Of settings from JSON; numbers need not be the same to the last digit on another machine."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    return bool(one == other)


class _Trials:
    """A copy of a model in which one layer at a time loses components."""

    def __init__(
        self,
        op: str,
        graph: Graph,
        layers: list[str],
        inputs: Sequence[Any],
        held_out: HeldOut,
        trace: ModelTrace,
        samples: int,
    ) -> None:
        self.op, self.graph, self.trace = op, graph, trace.of_copy(copied(trace.model))
        self.model, self.order = self.trace.model, self.trace.order
        self.readers = {layer: [name for name, _ in graph.consumers({layer: [0]})] for layer in layers}
        # From which module on it is run again: the first that reads what goes, or gives queries, which nothing reads.
        self.starts: dict[str, str] = {}
        for layer, names in self.readers.items():
            queries = [name.rpartition(".")[0] for name in graph.queries({layer: [0]})]
            if names or queries:
                self.starts[layer] = min([*names, *queries], key=self.order.__getitem__)
        wanted = {name for names in self.readers.values() for name in names if self._can_fit(name)}
        together = accumulate(batch_size_of(op, part) for part in inputs)
        few = 1 + sum(total < FITTED for total in together)
        self.fits = fits_of(trace.model, wanted, inputs[:few], trace)
        self.replays, self.samples = [], 0
        for part in [*([held_out.inputs] if held_out.apart else []), *inputs]:
            size = batch_size_of(op, part)
            if self.samples < samples:
                few = min(size, samples - self.samples)
                self.replays.append(Replay(self.trace, index_samples(part, slice(few), size)))
                self.samples += few
        self.expected = self._outputs()
        if len(self.expected) < len(self.replays):
            raise ValueError(
                f"{op}: model must give a tensor to measure divergence of, or a nest that begins with one."
            )
        if not all(bool(output.isfinite().all()) for output in self.expected):
            raise ValueError(f"{op}: data must give finite outputs to measure divergence from, found NaN or Inf.")
        self.size = sum(_divergence(torch.zeros_like(output), output) for output in self.expected)

    def in_order(self, layers: Mapping[str, Components]) -> list[str]:
        """By what is run again."""
        return sorted(layers, key=lambda layer: self.order[self.starts[layer]] if layer in self.starts else 0)

    def _can_fit(self, name: str) -> bool:
        once = self.trace.runs.get(name) == 1
        fits = once and not self.trace.why_not_fitted(name)
        return fits and unknowns_of(self.model.get_submodule(name)) <= MOST_UNKNOWNS

    def _outputs(self) -> list[Tensor]:
        with frozen_eval(self.model):
            found = [first_tensor(replay.run()) for replay in self.replays]
        return [output for output in found if output is not None]

    def divergence(self, layer: str, gone: list[int]) -> float:
        """Of the output without some components of a layer: infinite where it is not finite."""
        across = self.graph.without({layer: gone})
        if across is not None:  # norms make another thing of what is left: nothing of it is computed already
            with frozen_eval(across):
                found = [first_tensor(call(across, replay.inputs)) for replay in self.replays]
            outputs = [output for output in found if output is not None]
        elif layer in self.starts:
            with self._repaired(layer, gone):
                outputs = self._outputs()
        else:
            return 0.0
        total = sum(map(_divergence, self.expected, outputs))
        return total / (self.size or 1.0) if math.isfinite(total) else math.inf

    @contextmanager
    def _repaired(self, layer: str, gone: list[int]) -> Iterator[None]:
        """The copy with components hidden from the layers that read them, which are fitted to what is left."""
        readers, start = self.graph.consumers({layer: gone}), self.starts[layer]
        with frozen_eval(self.model):
            for replay in self.replays:
                if replay.start != start:
                    replay.start_at(start)
        repairs = Repairs(self.model)
        hidden = [(name, channels) for name, channels in readers if name not in self.fits]
        try:
            for name, channels in readers:
                if name in self.fits:
                    self._fit(repairs, name, channels)
            handles = [hide(self.model.get_submodule(name), channels) for name, channels in hidden]
            with hooked(handles), zero_rows(self.model, self.graph.queries({layer: gone})):
                yield
        finally:
            for name in repairs.layers:
                repairs.put(name, repaired=False)

    def _fit(self, repairs: Repairs, name: str, gone: list[int]) -> None:
        """Gives a layer the weights for what is left of its inputs, and zero for what goes."""
        moments, channels = self.fits[name]
        module: Any = self.model.get_submodule(name)
        matrix = matrix_of(module).double()
        left = torch.ones(channels, dtype=torch.bool, device=matrix.device)
        left[gone] = False
        kept = left.repeat_interleave(matrix.shape[1] // channels).nonzero()[:, 0]
        xx = moments.xx[kept][:, kept]
        some = LayerMoments(moments.mean_x[kept], moments.mean_y, xx, moments.yx[:, kept], moments.yy)
        fitted = torch.zeros_like(matrix)
        fitted[:, kept] = ridge_regression(self.op, some, matrix[:, kept], RIDGE)
        repairs.set(name, f"{name}.weight", fitted.view_as(module.weight))
        repairs.shift(name, self.trace, (matrix - fitted) @ moments.mean_x)


def _divergence(expected: Tensor, output: Tensor) -> float:
    """Sum over samples of squared differences, of the logits around their mean where they are (samples, classes)."""
    difference = output.double() - expected.double()
    if difference.ndim == 2:
        difference -= difference.mean(1, keepdim=True)  # as the softmax does not see it
    return float(difference.square().sum())
