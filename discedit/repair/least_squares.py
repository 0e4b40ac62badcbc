"""What is left of a pruned network, set right in closed form: forward passes only, no gradients, no labels.

The layers that read removed components are taken in the order in which they run. Each gets the weights (least squares)
or the bias alone (mean) that bring its output, on what the layers repaired before it now give, closest to what it was
in the model before pruning. Where the output is added to something else (a residual stream), it is the sum that is
brought closest, so that a layer also makes up for what those before it could not.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import dropwhile
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from discedit.common.warning import warn
from discedit.model.forward import TensorNotes, call, first_tensor, frozen_eval
from discedit.model.functional import LayersCalled
from discedit.model.trace import ModelTrace, is_layer
from discedit.moments.calibration import PARTS, HeldOut, batch_size_of, beginnings, scale_of
from discedit.moments.covariances import LayerMoments, Sums
from discedit.moments.positions import Positions, matrix_of
from discedit.recipes.recipe import Edit, record
from discedit.repair.lockstep import Pause, in_lockstep

RIDGE = 1e-3
# Units in the last place of what a layer gives, in the mean, that an error may grow by: sums of products in float32 are
# not exact, and weights of 16 bits are rounded.
ROUNDING, ROUNDING_OF_HALVES = 100, 4
MORE, CHANCE = 1.25, 2.0  # times the squared error without a repair, and standard errors above it, that are too much
WORSE = 1.05  # times the error of the whole network without repair, from which there is a warning
LEAST_SCALE = 1e-3  # of a batch norm's largest: a channel that is multiplied by less cannot make up for anything
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_)


@dataclass
class Repairs:
    """What repairs have set in a model, and the readers that are not repaired."""

    model: nn.Module
    # Layer -> the tensors that its repair has set -> their values before and after.
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # layer -> why it is not repaired

    def tensor(self, place: str) -> Tensor:
        tensor: Tensor = attrgetter(place)(self.model)
        return tensor.detach()

    def first(self, layer: str, place: str) -> Tensor:
        """A tensor as it was before the repair of the layer."""
        values = self.layers.get(layer, {}).get(place)
        return self.tensor(place) if values is None else values[0]

    def set(self, layer: str, place: str, value: Tensor) -> None:
        """Writes a value for the repair of a layer."""
        before, tensor = self.first(layer, place).clone(), self.tensor(place)
        tensor.copy_(value)
        self.layers.setdefault(layer, {})[place] = before, tensor.clone()

    def shift(self, layer: str, trace: ModelTrace, missing: Tensor) -> None:
        """Adds to the outputs of a layer what they lacked before anything was set, by its bias or else by the running
        mean of the batch norm behind it."""
        module: Any = self.model.get_submodule(layer)
        place, sign = (f"{layer}.bias", 1) if module.bias is not None else (f"{trace.norms[layer]}.running_mean", -1)
        first = self.first(layer, place)
        self.set(layer, place, first + sign * missing.to(first.device))

    def put(self, layer: str, *, repaired: bool) -> None:
        """Writes the values before or after the repair of a layer."""
        for place, values in self.layers[layer].items():
            self.tensor(place).copy_(values[repaired])

    def drop(self, layer: str, why: str) -> None:
        """Takes back the repair of a layer."""
        self.put(layer, repaired=False)
        del self.layers[layer]
        self.skipped[layer] = why


@dataclass(frozen=True)
class Protected:
    """Images for which no layer is to give anything else than it gives before its own repair: new weights are drawn
    towards those that make no difference there."""

    inputs: Sequence[Any] = ()  # in parts
    weight: float = 0.0  # how much they count, all together, beside all of those that a repair is fitted to


def repaired(
    op: str,
    edited: nn.Module,
    consumers: Iterable[str],
    removed: Mapping[str, list[int]],
    trace: ModelTrace,
    inputs: Sequence[Any],
    *,
    weights: bool,
    ablated: Mapping[str, list[int]] | None = None,
    protected: Protected = Protected(),
    ignore: Collection[str] = (),
) -> Repairs:
    """Repairs `edited` in place, in one forward pass of each model, and returns what it set.

    Args:
        consumers: the layers that read removed components.
        removed: layer -> the output rows that it has lost.
        trace: of the model before pruning.
        inputs: images in parts, see `calibration`.
        weights: least squares; otherwise the bias alone.
        ablated: layer -> output rows that keep the weights that they have.
        protected: beside `inputs`.
        ignore: layers to leave as they are.
    """
    result, after = Repairs(edited), trace.of_copy(edited)
    names = _to_fit(trace, after, set(consumers), ignore, result)
    for name in names:
        after.has_affine_norm(name)  # found out before there are hooks
    sums: dict[str, Sums] = {}
    guards: dict[str, Sums] = {}
    # To be fitted; among them those that are fitted before they run and again before their output is added; and of
    # these the ones that have run since.
    left, twice, between = dict.fromkeys(names), set[str](), set[str]()

    def fit(name: str) -> None:
        """Gives a layer new weights when all passes have come to it."""
        layer: Any = edited.get_submodule(name)
        if name in twice:
            twice.remove(name)
            between.add(name)
        else:
            between.discard(name)
            del left[name]
        moments, guard = sums.pop(name).fit(), guards.pop(name, None)
        matrix, keep = matrix_of(layer).double(), (ablated or {}).get(name, [])
        if weights:
            seen = None if guard is None or not protected.weight else protected.weight * _around(guard, moments.mean_x)
            fitted = ridge_regression(op, moments, matrix, RIDGE, seen)
            fitted[keep] = matrix[keep]
            result.set(name, f"{name}.weight", fitted.view_as(layer.weight))
            matrix = matrix_of(layer).double()  # as the layer now has it
        # Beyond the layer's own bias, which is no part of the target.
        missing = moments.mean_y - matrix @ moments.mean_x
        missing[keep] = 0
        result.shift(name, after, missing)

    def run(
        batch: Any, sums: dict[str, Sums], seeds: Mapping[str, int], parts: Mapping[str, float], pause: Pause
    ) -> None:
        """A part through the whole model, and then through the smaller one, side by side with the other parts, so that
        each layer is fitted on all of them; those that begin late find the first layers fitted."""
        targets = {name: _Target(removed.get(name, ()), seeds[name], parts[name]) for name in left}
        with torch.no_grad(), LayersCalled(trace.model), _Before(trace, targets):  # this thread has modes of its own
            call(trace.model, batch)
        twice.update(name for name, target in targets.items() if target.shared and target.added is not None)
        after_pass = _After(after, targets, sums, pause)
        with torch.no_grad(), LayersCalled(edited), after_pass:
            call(edited, batch)
        assert not after_pass.waiting, f"their outputs were never added: {list(after_pass.waiting)}"

    works, places = [], []
    for parts, found, first in ((inputs, sums, 0), (protected.inputs, guards, PARTS * len(names))):
        sizes = [batch_size_of(op, batch) for batch in parts]
        begins = beginnings(trace, names, sizes)
        together = {name: sum(n for n, at in zip(sizes, begins, strict=True) if name in at) for name in names}
        for part, batch in enumerate(parts):
            seeds = {name: first + PARTS * i + part for i, name in enumerate(names)}  # another draw for each part
            works.append(partial(run, batch, found, seeds, {name: together[name] / sizes[part] for name in names}))
        places += begins
    with frozen_eval(trace.model), frozen_eval(edited):
        in_lockstep(op, works, fit, lambda work, layer: layer in places[work] and not between)
    return result


def _around(sums: Sums, mean: Tensor) -> Tensor:
    """Second moments of what a layer reads around a mean: (inputs, inputs)."""
    seen = sums.fit()
    shift = seen.mean_x - mean
    return seen.xx + torch.outer(shift, shift)


def _to_fit(
    trace: ModelTrace, after: ModelTrace, consumers: Collection[str], ignore: Collection[str], result: Repairs
) -> list[str]:
    """Layers from the first consumer on, in order; consumers that cannot be fitted are noted in the result."""
    names: list[str] = []
    layers = {name for name, module in after.model.named_modules() if is_layer(module)}
    for name in dropwhile(lambda name: name not in consumers, trace.in_order(layers | set(consumers))):
        # Of a depthwise convolution with one channel left only the model before knows that it is one.
        why = after.why_not_fitted(name) or trace.why_not_read(name)
        why = "it runs more than once per forward pass" if trace.runs[name] > 1 else why
        if not why and name not in ignore:
            names.append(name)
        elif name in consumers and name not in ignore:
            result.skipped[name] = why
    return names


def ridge_regression(op: str, fit: LayerMoments, weights: Tensor, ridge: float, guard: Tensor | None = None) -> Tensor:
    """The weights (outputs, inputs) that give y from x, drawn towards the given ones.

    Args:
        ridge: share of the mean variance of an input that is added to each; ten times as much as often as the system
            is not positive definite in float64.
        guard: second moments (inputs, inputs) of inputs for which the given weights are to stay right.
    """
    if not bool(fit.xx.isfinite().all() and fit.yx.isfinite().all()):
        raise ValueError(f"{op}: data must give finite feature maps, found NaN or Inf.")
    variance = float(fit.xx.diagonal().mean())
    if variance <= 0:  # nothing varies: nothing to learn
        return weights
    missing = fit.yx - weights @ fit.xx
    eye = torch.eye(len(fit.xx), dtype=fit.xx.dtype, device=fit.xx.device)
    system = fit.xx if guard is None else fit.xx + guard
    while True:
        factor, failed = torch.linalg.cholesky_ex(system + ridge * variance * eye)
        if not failed:
            return weights + torch.cholesky_solve(missing.T, factor).T
        ridge *= 10


@dataclass
class _Target:
    """What a layer is to give at some positions, and what then is added to it."""

    gone: Collection[int]  # the outputs that the layer has lost
    seed: int  # of the draw of positions, and parts that samples come in
    parts: float
    positions: Positions = field(init=False)
    rows: Tensor = field(init=False)  # without its bias
    behind: Tensor = field(init=False)  # behind its norm, if there is one
    added: Tensor | None = None
    shared: bool = False  # it is read by something before it is added

    def kept(self, rows: Tensor) -> Tensor:
        """Without the outputs that the layer has lost."""
        if not self.gone:
            return rows
        return rows[:, torch.tensor(sorted({*range(rows.shape[1])}.difference(self.gone)), device=rows.device)]


class _Output(NamedTuple):
    """Of a tensor that a layer has given."""

    layer: str
    normed: bool  # goes into a batch norm


class ActivationTracker(TorchFunctionMode):
    """Sees layers run, in a pass, and what their outputs, or those of the batch norms behind them, are added to."""

    def __init__(self, trace: ModelTrace, targets: Mapping[str, _Target]) -> None:
        super().__init__()
        self.trace, self.model, self.targets = trace, trace.model, targets
        self.norms = {name: trace.bias_norm(name) for name in targets}
        self.affine = {name for name in targets if trace.has_affine_norm(name)}
        self.outputs: TensorNotes[_Output] = TensorNotes()
        self.repeating = False  # a layer runs once more, which nobody is told
        self._handles: list[RemovableHandle] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> Any:
        for name, norm in self.norms.items():
            layer = self.model.get_submodule(name)
            self._handles.append(layer.register_forward_pre_hook(self._hook(partial(self.before, name))))
            self._handles.append(layer.register_forward_hook(self._hook(partial(self._ran, name))))
            if norm is not None and name in self.affine:  # behind an activation, a sum asks nothing
                self._handles.append(norm.register_forward_hook(self._hook(partial(self._record, name, False))))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _hook(self, function: Callable[..., None]) -> Callable[..., None]:
        """Of this pass alone: others over the same model have threads of their own."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            if threading.get_ident() == self._thread and not self.repeating:
                function(args[0], *output)

        return hook

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def before(self, name: str, x: Tensor) -> None:
        """A layer is about to read x."""

    def after(self, name: str, x: Tensor, output: Tensor) -> None:
        """A layer has read x and given an output."""

    def on_use(self, name: str) -> None:
        """A layer's output is about to be read by something that is no addition."""

    def on_add(self, name: str, output: Tensor, other: Tensor) -> None:
        """A layer's output is about to be added to something."""

    def repeat(self, name: str, x: Tensor) -> Tensor:
        """What a layer now makes of x."""
        self.repeating = True
        out: Tensor = self.model.get_submodule(name)(x)
        self.repeating = False
        return out

    def behind(self, name: str, output: Tensor) -> Tensor:
        """What the norm behind a layer, if there is one, makes of the layer's output."""
        norm = self.norms[name]
        self.repeating = True
        out: Tensor = output if norm is None else norm(output.clone())
        self.repeating = False
        return out

    def _ran(self, name: str, x: Tensor, output: Tensor) -> None:
        self.after(name, x, output)
        self._record(name, self.norms[name] is not None, x, output)

    def _record(self, name: str, normed: bool, _: Tensor, output: Tensor) -> None:
        self.forget(name)
        # What changes a tensor in place, such as an activation, makes it another one.
        self.outputs.note(output, _Output(name, normed))

    def forget(self, name: str) -> None:
        for tensor, output in self.outputs.items():
            if output.layer == name:
                self.outputs.forget(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = len(args) == 2 and all(isinstance(arg, Tensor) for arg in args) and not kwargs
        if func in _ADDITIONS and tensors and args[0].shape == args[1].shape:
            order = [output.layer for _, output in self.outputs.items()]
            found = {i: self.outputs.of(args[i]) for i in (0, 1)}
            known = {i: output.layer for i, output in found.items() if output is not None and not output.normed}
            if known:  # of two, the one that ran later: only then is the other what it will stay
                mine = max(known, key=lambda i: order.index(known[i]))
                self.outputs.forget(args[mine])
                self.on_add(known[mine], args[mine], args[1 - mine])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for arg in args:
                used = self.outputs.of(arg) if isinstance(arg, Tensor) and arg is not result else None
                if used is not None and func not in ((functional.batch_norm,) if used.normed else _ADDITIONS):
                    self.on_use(used.layer)
        return result


class _Before(ActivationTracker):
    """Over the model before pruning: notes what each layer gives, behind its norm for a `check`, and with `sums` what
    that is added to."""

    def __init__(
        self, trace: ModelTrace, targets: Mapping[str, _Target], *, check: bool = False, sums: bool = True
    ) -> None:
        super().__init__(trace, targets)
        self.check, self.sums = check, sums

    def after(self, name: str, x: Tensor, output: Tensor) -> None:
        target = self.targets[name]
        layer: Any = self.model.get_submodule(name)
        target.positions = Positions.drawn(layer, output, target.seed, target.parts)
        rows = target.positions.outputs(output)
        target.rows = target.kept(rows if layer.bias is None else rows - layer.bias)
        if self.check:
            target.behind = target.kept(target.positions.outputs(self.behind(name, output)))

    def on_use(self, name: str) -> None:
        self.targets[name].shared = True

    def on_add(self, name: str, output: Tensor, other: Tensor) -> None:
        if self.sums:
            self.targets[name].added = self.targets[name].kept(self.targets[name].positions.outputs(other))


class _After(ActivationTracker):
    """Over the pruned model: has each layer fitted before it runs, or before its output is added."""

    def __init__(self, trace: ModelTrace, targets: Mapping[str, _Target], sums: dict[str, Sums], pause: Pause) -> None:
        super().__init__(trace, targets)
        self.sums, self.pause = sums, pause
        self.waiting: dict[str, Tensor] = {}  # what layers read whose output is to be added

    def before(self, name: str, x: Tensor) -> None:
        target = self.targets[name]
        if target.added is None or target.shared:
            self._fit(name, x, target.rows, last=target.added is None)
        if target.added is not None:
            self.waiting[name] = x

    def on_add(self, name: str, output: Tensor, other: Tensor) -> None:
        if name not in self.waiting:
            return
        x, target, norm = self.waiting.pop(name), self.targets[name], self.norms[name]
        assert target.added is not None
        missing = target.added - target.positions.outputs(other)
        if norm is not None:
            scale = scale_of(norm)
            useful = scale.abs() > LEAST_SCALE * scale.abs().max()
            missing = torch.where(useful, missing / scale, 0.0)
        self._fit(name, x, target.rows + missing, last=True)
        output.copy_(self.behind(name, self.repeat(name, x)))  # in place, as whatever holds it must see
        self.forget(name)

    def _fit(self, name: str, x: Tensor, rows: Tensor, *, last: bool) -> None:
        target = self.targets[name]
        self.sums.setdefault(name, Sums()).add(target.positions, x, rows)
        if last:  # memory for those that begin late
            target.rows, target.added = rows.new_empty(0), None
        self.pause(name)


def take_back(
    op: str,
    edit: Edit,
    repairs: Repairs,
    removed: Mapping[str, list[int]],
    trace: ModelTrace,
    held_out: HeldOut,
    *,
    sums: bool = True,
    ablated: Mapping[str, list[int]] | None = None,
) -> None:
    """Undoes the repair of each layer that gives more error than none, and notes the others in the edit's recipe.

    In the order in which the layers run, each on what those before it give with what was decided of them. An error is
    the squared difference of what a layer gives, behind the norm that it goes into if there is one, from what it gave
    before the edit; with `sums` of what comes of adding that, which a fit aims at. Other arguments as for `repaired`.
    """
    model, edited = trace.model, edit.model
    after, stale = trace.of_copy(edited), True
    with frozen_eval(model), frozen_eval(edited):
        # Again where a repair was taken back after others had read what it gave: they were judged on that.
        while repairs.layers and stale:
            targets = {name: _Target(removed.get(name, ()), seed, PARTS) for seed, name in enumerate(repairs.layers)}
            with _Before(trace, targets, check=True, sums=sums):
                call(model, held_out.inputs)
            check = _HeldOutCheck(op, after, targets, repairs, ablated or {}, held_out)
            with check:
                call(edited, held_out.inputs)
            for name in [name for name in repairs.layers if name not in check.judged]:
                repairs.drop(name, f"its repair could not be checked: it does not run on {_named(held_out)}")
            stale = check.stale
    if repairs.skipped:
        edit.recipe.settings["unrepaired"] = repairs.skipped
    values = {place: both for places in repairs.layers.values() for place, both in places.items()}
    before, now = ({place: both[i] for place, both in values.items()} for i in range(2))
    record(edit, before, now)


class _HeldOutCheck(ActivationTracker):
    """Over the repaired model: compares each layer's error with its repair and without, and leaves what is better."""

    def __init__(
        self,
        op: str,
        trace: ModelTrace,
        targets: Mapping[str, _Target],
        repairs: Repairs,
        ablated: Mapping[str, list[int]],
        held_out: HeldOut,
    ) -> None:
        super().__init__(trace, targets)
        self.op, self.repairs, self.ablated, self.held_out = op, repairs, ablated, held_out
        self.waiting: dict[str, Tensor] = {}  # what layers read whose output is to be added
        self.judged: set[str] = set()
        self.stale = False  # layers behind have read what has changed since

    def after(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.repairs.layers and self.targets[name].added is not None:
            self.waiting[name] = x
        elif name in self.repairs.layers:
            self._judge(name, x, output, None)

    def on_add(self, name: str, output: Tensor, other: Tensor) -> None:
        if name in self.waiting:
            worse = self._judge(name, self.waiting.pop(name), output, self.targets[name].positions.outputs(other))
            self.stale |= worse and self.targets[name].shared
            self.forget(name)

    def _judge(self, name: str, x: Tensor, output: Tensor, added: Tensor | None) -> bool:
        """Whether a repair was taken back; then `output`, which others read, is what is given without it.

        Args:
            output: what the layer gives, or where something is `added` to it, what the norm behind it does.
        """
        target, norm = self.targets[name], self.norms[name]
        expected = target.behind if added is None or target.added is None else target.added + target.behind
        # What is rounded: sums of products, which a bias, or the mean of a norm, may cancel but for a small rest.
        rounded = expected if added is not None else target.rows if norm is None else target.rows * scale_of(norm)

        def squares_of(rows: Tensor) -> Tensor:
            """Of each sample."""
            rows = rows.double()
            rows[:, self.ablated.get(name, [])] = 0  # no repair touches them
            return rows.square().view(len(x), -1).sum(1)

        def errors(given: Tensor) -> Tensor:
            if added is None:
                return squares_of(target.positions.outputs(self.behind(name, given)) - expected)
            return squares_of(target.positions.outputs(given) + added - expected)

        size = float(squares_of(rounded).sum().sqrt())
        if not math.isfinite(size):
            raise ValueError(
                f"{self.op}: data must give finite feature maps, what {name!r} gives of {_named(self.held_out)} holds "
                "NaN or Inf."
            )
        repaired = errors(output)
        self.repairs.put(name, repaired=False)
        plain = self.repeat(name, x)
        plain = plain if added is None else self.behind(name, plain)
        none = errors(plain)
        self.judged.add(name)
        units = ROUNDING if output.element_size() >= 4 else ROUNDING_OF_HALVES
        if not _more(repaired, none, units * torch.finfo(output.dtype).eps * size):
            self.repairs.put(name, repaired=True)
            return False
        output.copy_(plain)  # in place, as whatever holds it must see
        least = float(none.sum())
        share = f"{float(repaired.sum()) / least:.3g} times the squared error of none" if least else ""
        self.repairs.drop(name, f"its repair gave {share or 'an error, none gave none,'} on {_named(self.held_out)}")
        return True


def _more(errors: Tensor, others: Tensor, rounding: float) -> bool:
    """Whether squared errors of samples are larger than others: by a part of these, or by more than chance explains.

    A fit that gains nothing gives now a little more, now a little less.
    """
    total, other = float(errors.sum()), float(others.sum())
    if not math.isfinite(other) and math.isfinite(total):
        return False
    if math.sqrt(total) <= math.sqrt(other) + rounding:
        return False
    excess = errors - others
    chance = CHANCE * float(excess.std()) * math.sqrt(len(excess)) if len(excess) > 1 else math.inf
    return not (total <= MORE * other and total - other <= chance)


def _named(held_out: HeldOut) -> str:
    if not held_out.apart:
        return "1 sample"
    were = "sample that was" if held_out.samples == 1 else "samples that were"
    return f"{held_out.samples} {were} not used to make it"


@contextmanager
def warning_if_worse(
    op: str, trace: ModelTrace, edited: nn.Module, held_out: HeldOut, *, instead: str = "repair='none'"
) -> Iterator[list[Tensor | None]]:
    """No silent harm: layers that are each made to give less error may together give more.

    Gives a list, which at the end holds what the model gives for these samples, and what the edited one does.

    Args:
        instead: of the repair, what may do better.
    """
    expected = output_of(trace.model, held_out.inputs)
    before = output_error(expected, output_of(edited, held_out.inputs))
    outputs: list[Tensor | None] = []
    yield outputs
    outputs += [expected, output_of(edited, held_out.inputs)]
    after = output_error(*outputs)
    if not after <= WORSE * before + ROUNDING * torch.finfo(torch.float32).eps:
        warn(
            f"{op}: the repair brings the network's outputs no closer to those before: their relative squared error on "
            f"{_named(held_out)} is {after:.3g} with it and {before:.3g} without; more data, or {instead}, may do "
            "better."
        )


def output_of(model: nn.Module, inputs: Any) -> Tensor | None:
    with frozen_eval(model):
        return first_tensor(call(model, inputs))


def output_error(expected: Tensor | None, found: Tensor | None) -> float:
    """Squared error of what an edited model gives over the squares of what is expected; 0 where there is none."""
    if expected is None or found is None or not found.is_floating_point() or found.shape != expected.shape:
        return 0.0
    expected = expected.double()
    return float((found.double() - expected).square().sum()) / (float(expected.square().sum()) or 1.0)
