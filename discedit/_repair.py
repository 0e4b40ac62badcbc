"""What is left of a pruned network, set right in closed form: forward passes only, no gradients, no labels.

The layers that read removed components are taken in the order in which they run. Each gets the weights (least squares)
or the bias alone (mean) that bring its output, on what the layers repaired before it now give, closest to what it was
in the model before pruning. Where the output is added to something else (a residual stream), it is the sum that is
brought closest, so that a layer also makes up for what those before it could not.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from discedit._batches import call, undisturbed, version_of
from discedit._calibration import PARTS, Positions, Sums, matrix_of, scale_of
from discedit._lockstep import Pause, in_lockstep
from discedit._trace import ModelTrace, is_layer

RIDGE = 1e-3
LEAST_SCALE = 1e-3  # of a batch norm's largest: a channel that is multiplied by less cannot make up for anything
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_)


@dataclass
class Repairs:
    """Old and new values by tensor name, and readers that could not be repaired, with reasons."""

    before: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def repaired(
    op: str,
    model: nn.Module,
    edited: nn.Module,
    consumers: Iterable[str],
    removed: Mapping[str, list[int]],
    trace: ModelTrace,
    inputs: Sequence[Any],
    *,
    weights: bool,
    silenced: Mapping[str, list[int]] | None = None,
    protected: Sequence[Any] = (),
    protection: float = 0.0,
    ignore: Collection[str] = (),
) -> Repairs:
    """Repairs `edited` in place, in one forward pass of each model, and returns what it set.

    Args:
        op: what asks, for errors.
        model: before pruning.
        edited: after it; the same module names.
        consumers: the layers that read removed components.
        removed: layer -> the output rows that it has lost.
        trace: of the model before pruning.
        inputs: images in parts, see `calibration`.
        weights: least squares; otherwise the bias alone.
        silenced: layer -> output rows that keep the weights that they have.
        protected: images, in parts, for which no layer is to give anything else than it gives before its own repair:
            new weights are drawn towards those that make no difference there.
        protection: how much these count, all together, beside all of `inputs`.
        ignore: layers to leave as they are.
    """
    result = Repairs()
    readers = set(consumers)
    after = trace.of_copy(edited)
    names = []
    begun = False
    for name in trace.in_order(name for name, module in edited.named_modules() if is_layer(module)):
        begun = begun or name in readers
        why = "it runs more than once per forward pass" if trace.runs[name] > 1 else after.why_not_fitted(name)
        if name in ignore:
            continue
        if begun and not why:
            names.append(name)
        elif name in readers:
            result.skipped[name] = why
    works = []
    fitted = _Fitted(op, after, names, weights, silenced or {}, protection)
    with undisturbed(model), undisturbed(edited):
        for part, batch in enumerate([*inputs, *protected]):
            guards = part >= len(inputs)
            parts = len(protected if guards else inputs)
            first = PARTS * len(names) - len(inputs) if guards else 0  # of the seeds: another draw for each part
            targets = {}
            for i, name in enumerate(names):
                positions = Positions(model.get_submodule(name), first + PARTS * i + part, parts)
                targets[name] = _Target(positions, sorted(removed.get(name, ())))
            with _Before(trace, targets):
                call(model, batch)
            works.append(partial(_pass_after, batch, targets, fitted, guards))
        in_lockstep(op, works, fitted.meet)
    result.before, result.values = fitted.replaced, fitted.values
    return result


def _pass_after(batch: Any, targets: Mapping[str, _Target], fitted: _Fitted, guards: bool, pause: Pause) -> None:
    after = _After(targets, fitted, guards, pause)
    with torch.no_grad(), after:
        call(fitted.model, batch)
    assert not after.waiting, f"their outputs were never added: {list(after.waiting)}"


class _Target:
    """What a layer is to give at some positions, without its bias, and what then is added to it."""

    def __init__(self, positions: Positions, gone: list[int]) -> None:
        self.positions = positions
        self.gone = gone
        self.rows = torch.empty(0)
        self.added: Tensor | None = None
        self.shared = False  # read by something before it is added

    def kept(self, rows: Tensor) -> Tensor:
        """Without the outputs that the layer has lost."""
        if not self.gone:
            return rows
        left = sorted(set(range(rows.shape[1])) - set(self.gone))
        return rows[:, torch.tensor(left, device=rows.device)]


@dataclass(frozen=True)
class _Output:
    """A tensor that a layer has given. Held weakly: a pass must not keep every feature map alive."""

    layer: str
    tensor: weakref.ref[Tensor]
    version: int
    normed: bool  # goes into a batch norm


class _Watch(TorchFunctionMode):
    """Sees layers run, in a pass, and what their outputs, or those of the batch norms behind them, are added to."""

    def __init__(self, trace: ModelTrace, targets: Mapping[str, _Target]) -> None:
        super().__init__()
        self.model, self.targets = trace.model, targets
        self.norms = {name: trace.bias_norm(name) for name in targets}
        self.affine = {name for name in targets if (norm := trace.norm_behind(name)) is not None and norm.is_affine}
        self.outputs: dict[int, _Output] = {}  # by identity
        self.handles: list[Any] = []
        self.thread = threading.get_ident()

    def __enter__(self) -> Any:
        for name in self.targets:
            self._hook(name)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> None:
        """Other passes over the same model have threads of their own."""

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == self.thread:
                self.before(name, args[0])

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.after(name, output)
                self.note(name, output, normed=norm is not None)

        def leave_norm(_: nn.Module, __: Any, output: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.note(name, output, normed=False)

        layer = self.model.get_submodule(name)
        self.handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        norm = self.norms[name]
        if norm is not None and name in self.affine:  # behind an activation, a sum asks nothing of the layer
            self.handles.append(norm.register_forward_hook(leave_norm))

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def before(self, name: str, x: Tensor) -> None:
        """A layer is about to read x."""

    def after(self, name: str, output: Tensor) -> None:
        """A layer has given an output."""

    def touches(self, name: str) -> None:
        """A layer's output is about to be read by something that is no addition."""

    def meets(self, name: str, output: Tensor, other: Tensor) -> None:
        """A layer's output is about to be added to something."""

    def note(self, name: str, output: Tensor, *, normed: bool) -> None:
        self.forget(name)
        self.outputs.pop(id(output), None)  # of a tensor that is gone: the order of the dict is that of the layers
        # What changes a tensor in place, such as an activation, makes it another one.
        version = version_of(output)
        if version is not None:
            self.outputs[id(output)] = _Output(name, weakref.ref(output), version, normed)

    def forget(self, name: str) -> None:
        self.outputs = {key: noted for key, noted in self.outputs.items() if noted.layer != name}

    def noted(self, tensor: Tensor) -> _Output | None:
        """What is known of it, if it is the output of a layer."""
        found = self.outputs.get(id(tensor))
        if found is None or found.tensor() is not tensor or found.version != version_of(tensor):
            return None
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = len(args) == 2 and all(isinstance(arg, Tensor) for arg in args) and not kwargs
        if func in _ADDITIONS and tensors and args[0].shape == args[1].shape:
            order = list(self.outputs)
            known = [i for i in (0, 1) if self.noted(args[i]) is not None]
            if known:  # of two, the one that ran later: only then is the other what it will stay
                mine = max(known, key=lambda i: order.index(id(args[i])))
                self.meets(self.outputs.pop(id(args[mine])).layer, args[mine], args[1 - mine])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func not in _ADDITIONS:
            for arg in args:
                noted = self.noted(arg) if isinstance(arg, Tensor) and arg is not result else None
                if noted is not None and not (noted.normed and func is functional.batch_norm):
                    self.touches(noted.layer)
        return result


class _Before(_Watch):
    """Over the model before pruning: notes what each layer gives."""

    def after(self, name: str, output: Tensor) -> None:
        target = self.targets[name]
        layer: Any = self.model.get_submodule(name)
        target.positions.draw(output)
        rows = target.positions.of_output(output)
        target.rows = target.kept(rows if layer.bias is None else rows - layer.bias)

    def touches(self, name: str) -> None:
        self.targets[name].shared = True

    def meets(self, name: str, output: Tensor, other: Tensor) -> None:
        target = self.targets[name]
        target.added = target.kept(target.positions.of_output(other))


class _After(_Watch):
    """Over the pruned model: has each layer fitted before it runs, or before its output is added."""

    def __init__(self, targets: Mapping[str, _Target], fitted: _Fitted, guards: bool, pause: Pause) -> None:
        super().__init__(fitted.trace, targets)
        self.fitted, self.pause = fitted, pause
        self.sums = fitted.guards if guards else fitted.sums
        self.waiting: dict[str, Tensor] = {}  # what layers read whose output is to be added
        self.again = False

    def before(self, name: str, x: Tensor) -> None:
        if self.again:
            return
        target = self.targets[name]
        if target.added is None or target.shared:
            self._fit(name, x, target.rows)
        if target.added is not None:
            self.waiting[name] = x

    def meets(self, name: str, output: Tensor, other: Tensor) -> None:
        if name not in self.waiting:
            return
        x, target = self.waiting.pop(name), self.targets[name]
        assert target.added is not None
        missing = target.added - target.positions.of_output(other)
        norm = self.norms[name]
        if norm is not None:
            scale = scale_of(norm)
            useful = scale.abs() > LEAST_SCALE * scale.abs().max()
            missing = torch.where(useful, missing / scale, 0.0)
        self._fit(name, x, target.rows + missing)
        self.again = True
        out: Tensor = self.model.get_submodule(name)(x)
        output.copy_(out if norm is None else norm(out))  # in place, as whatever holds it must see
        self.again = False
        self.forget(name)

    def _fit(self, name: str, x: Tensor, target: Tensor) -> None:
        self.sums.setdefault(name, Sums()).add(self.targets[name].positions, x, target)
        self.pause(name)


class _Fitted:
    """Gives a layer new weights when all passes have come to it."""

    def __init__(
        self,
        op: str,
        trace: ModelTrace,
        names: Iterable[str],
        weights: bool,
        silenced: Mapping[str, list[int]],
        protection: float,
    ) -> None:
        self.op, self.trace, self.model, self.weights = op, trace, trace.model, weights
        self.behind = {name: trace.bias_norm(name) for name in names}  # before there are hooks
        self.silenced, self.protection = silenced, protection
        self.sums: dict[str, Sums] = {}
        self.guards: dict[str, Sums] = {}
        self.replaced: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def meet(self, name: str) -> None:
        layer: Any = self.model.get_submodule(name)
        fit = self.sums.pop(name).fit()
        matrix = matrix_of(layer).double()
        silenced = self.silenced.get(name, [])
        if self.weights:
            fitted = fit.solve(self.op, matrix, RIDGE, self._guard(name, fit.mean_x))
            fitted[silenced] = matrix[silenced]
            self._set(f"{name}.weight", layer.weight, fitted.view_as(layer.weight))
            matrix = matrix_of(layer).double()  # as the layer now has it
        missing = fit.bias(matrix)  # beyond the layer's own, which is no part of the target
        missing[silenced] = 0
        if layer.bias is not None:
            self._set(f"{name}.bias", layer.bias, self._first(f"{name}.bias", layer.bias) + missing)
            return
        norm = self.behind[name]
        assert norm is not None
        assert norm.running_mean is not None
        mean = f"{self.trace.norms[name]}.running_mean"
        self._set(mean, norm.running_mean, self._first(mean, norm.running_mean) - missing)

    def _guard(self, name: str, mean: Tensor) -> Tensor | None:
        """What a layer reads of protected samples, around what it reads of the others: (inputs, inputs)."""
        sums = self.guards.pop(name, None)
        if sums is None or not self.protection:
            return None
        seen = sums.fit()
        shift = seen.mean_x - mean
        return self.protection * (seen.xx + torch.outer(shift, shift))

    def _first(self, name: str, tensor: Tensor) -> Tensor:
        """What the tensor was before anything was set."""
        return self.replaced.get(name, tensor)

    def _set(self, name: str, tensor: Tensor, value: Tensor) -> None:
        self.replaced.setdefault(name, tensor.detach().clone())
        tensor.copy_(value)
        self.values[name] = tensor.detach().clone()
