"""Whether a removal is the same function as hiding the channels from the layers that read them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from discedit.graph.heads import Heads
from discedit.graph.inner_dimensions import Projections
from discedit.graph.network import OUTPUT, Key, Members, Network, channel_axis, groups_of, kept_indices
from discedit.graph.removal import operations_of
from discedit.model.forward import call, frozen_eval, hooked, map_tensors, tensors_in
from discedit.model.layers import is_close, is_own
from discedit.model.trace import IN_TRAINING, in_training, training_branches
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import reduced

_WIDTH = re.compile("dim|width|size|channels|features|planes|hidden|d_model")  # attributes that count channels
_INPUTS = ("input", "query", "key", "value")  # of layers, by name


class _Reference(NamedTuple):
    """A copy of the model that edits are compared with: in float64, unless the model insists on its own type."""

    model: nn.Module
    inputs: Any
    outputs: dict[str, Tensor]
    tolerance: float  # of a difference from them, over the largest number


class RemovalCheck:
    """Compares a smaller model with the whole one from whose layers the channels are hidden.

    Args:
        network: of the model.
        heads: that can go.
        doubtful: layer -> what may not work channel by channel on its way, and the modules in which that stands.
    """

    def __init__(self, network: Network, heads: Sequence[Heads], doubtful: Mapping[str, Mapping[str, str]]) -> None:
        self.network, self.heads, self.doubtful = network, heads, doubtful
        self.trains = network.trace.training is not None
        self.plain: list[Projections] = []  # attention whose heads can lose dimensions

    def operations(self, gone: Mapping[Key, list[int]]) -> list[Operation]:
        """What removes channels."""
        return operations_of(self.network, self.heads, gone, self.plain)

    def queries(self, gone: Mapping[Key, list[int]]) -> dict[str, list[int]]:
        """Tensors of queries, with the rows that go: with zeros there, neither they nor their keys count."""
        found: dict[str, list[int]] = {}
        for projections in self.plain:
            found |= projections.queries(self.network.model, gone)
        return found

    def trial(self, gone: Mapping[Key, list[int]]) -> tuple[list[Operation], str]:
        """The operations that remove channels, and what is wrong with them; nothing is, when it is empty."""
        across, operations = self.across(gone), self.operations(gone)
        try:
            smaller, removed, shapes = self._run_without(operations, across)
        except Exception as error:
            why = f"the model does not run without its channels: {error}"
            if not (kept := self._kept_widths(gone, operations)):
                return [], why
            operations += kept
            try:
                smaller, removed, shapes = self._run_without(operations, across)
            except Exception:
                return [], why
        if why := self._reshapes(removed):
            return [], why
        narrowed = [(name, smaller.get_submodule(name), lost, shapes[name]) for name, lost in across.items()]
        try:
            hidden = self._hidden(gone, narrowed)
        except Exception as error:
            return [], f"its channels cannot be hidden from the layers that read them: {error}"
        why = self._difference(removed, hidden, gone)
        return ([], why) if why else (operations, "")

    def reduced(self, gone: Mapping[Key, list[int]]) -> nn.Module:
        """A smaller model; it shares the parameters that stay whole."""
        # With the numbers that modules keep of channels, where it does not run without.
        operations, _ = self.trial(gone)
        return reduced(self.network.original, operations or self.operations(gone))

    def reshapes(self, part: Members) -> str:
        """Which output of the model one component less would change the shape of; empty when none."""
        try:
            _, after, _ = self._run_without(self.operations({key: sorted({*gone}) for key, gone in part.items()}))
        except Exception as error:
            return f"the model does not run without its channels: {error}"
        return self._reshapes(after)

    def _run_without(
        self, operations: list[Operation], names: Iterable[str] = ()
    ) -> tuple[nn.Module, dict[str, Tensor], dict[str, list[Any]]]:
        """A smaller model, what it gives, and the shapes that some modules in it read, call by call; None where the
        first argument is no tensor."""
        # Of the model that is hidden from too: both give the same digits where they do the same.
        smaller = reduced(self.reference.model, operations)
        shapes: dict[str, list[Any]] = {name: [] for name in names}

        def note(seen: list[Any], _: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].shape if args and isinstance(args[0], Tensor) else None)

        modules = ((smaller.get_submodule(name), seen) for name, seen in shapes.items())
        with hooked([module.register_forward_pre_hook(partial(note, seen)) for module, seen in modules]):
            return smaller, _outputs(smaller, self.reference.inputs, self.trains), shapes

    def _difference(
        self, removed: Mapping[str, Tensor], hidden: Mapping[str, Tensor], gone: Mapping[Key, list[int]]
    ) -> str:
        """Which output is another with channels removed than with them hidden; empty when none."""
        for place, whole in hidden.items():
            tensor = self._left_of(place, whole, removed[place].shape, gone)
            if tensor is None:
                return self.network.reshaped(place)
            if not is_close(tensor, removed[place], self.reference.tolerance) and place not in self._random:
                which = "" if place == self.network.main else f" (the model's {place} differs)"
                return f"removing its channels is not the same as hiding them from the layers that read them{which}"
        return ""

    def _reshapes(self, after: Mapping[str, Tensor]) -> str:
        """Which output is another than the model's in its shape; empty when none."""
        before = self.reference.outputs
        changed = [p for p in before if p not in after or (self.network.stays(p) and before[p].shape != after[p].shape)]
        return self.network.reshaped(changed[0]) if changed or len(before) != len(after) else ""

    def _hidden(
        self, gone: Mapping[Key, list[int]], narrowed: Iterable[tuple[str, nn.Module, list[int], list[Any]]]
    ) -> dict[str, Tensor]:
        """What the model gives with components hidden from their readers.

        Args:
            narrowed: what works across channels, as norms do: its name, its twin in the smaller model, which works on
                the channels that are left, these, and the shapes that the twin read.
        """
        model, handles = self.reference.model, []
        for (name, role), lost in gone.items():
            if role == "in":
                handles.append(hide(model.get_submodule(name), lost))
        for name, smaller, lost, shapes in narrowed:
            module = model.get_submodule(name)
            narrow = _narrowing(module, smaller, lost, iter(shapes))
            handles.append(module.register_forward_hook(narrow, with_kwargs=True))
        with hooked(handles), zero_rows(model, self.queries(gone)):
            return _outputs(model, self.reference.inputs, self.trains)

    def across(self, gone: Mapping[Key, list[int]]) -> dict[str, list[int]]:
        """Modules that may normalise across the channels that they lose, with these: norms, and what has no parts."""
        found: dict[str, list[int]] = {}
        for key, lost in gone.items():
            if key[1] != "through" and not isinstance(key[1], int):
                continue
            name = key[0] if key[1] == "through" else key[0].rpartition(".")[0]
            module = self.network.model.get_submodule(name)
            norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and not groups_of(module)
            if norm or (key[1] != "through" and name in self.network.order and not list(module.children())):
                found[name] = lost
        return found

    def _left_of(self, place: str, whole: Tensor, shape: torch.Size, gone: Mapping[Key, list[int]]) -> Tensor | None:
        """What is left of an output that loses channels; None where these are not what makes it smaller."""
        axes = [axis for axis, (one, other) in enumerate(zip(whole.shape, shape, strict=False)) if one != other]
        if not axes or self.network.stays(place):
            return whole
        lost = gone.get((place, OUTPUT)) or gone.get((place.removesuffix(IN_TRAINING), OUTPUT), [])
        left = kept_indices(whole.shape[axes[0]], lost)
        found = whole.index_select(axes[0], torch.tensor(left, device=whole.device))
        return found if found.shape == shape else None

    def _kept_widths(self, gone: Mapping[Key, list[int]], operations: list[Operation]) -> list[Operation]:
        """Changes of what modules around the layers, or on the way of their channels, keep of these: numbers, by which
        they may reshape, and buffers, such as the filters of a blur."""
        model, known = self.network.original, {(operation.target, operation.name) for operation in operations}
        widths: dict[int, set[int]] = {}
        around = {""}
        buffers: dict[str, Operation] = {}
        for key, lost in gone.items():
            if key[1] == "out":
                size = self.network.size(key)
                widths.setdefault(size, set()).add(size - len(lost))
                around |= {key[0][:i] for i, letter in enumerate(key[0]) if letter == "."}
                for place in {*self.doubtful.get(key[0], {}).values()} - {""}:
                    for name, buffer in model.get_submodule(place).named_buffers(place, recurse=False):
                        if buffer.ndim and len(buffer) == size:
                            around.add(place)
                            buffers[name] = Operation("keep", name, index=tuple(kept_indices(size, lost)))
        return [*buffers.values()] + [
            Operation("attribute", place, name=name, before=value, value=min(widths[value]))
            for place in sorted(around)
            for name, value in vars(model.get_submodule(place)).items()
            # Where layers of one width lose different numbers, nothing tells which of them a number stands for.
            if type(value) is int and len(widths.get(value, ())) == 1 and _WIDTH.search(name)
            if not name.startswith("_") and (place, name) not in known
        ]

    @cached_property
    def reference(self) -> _Reference:
        network = self.network
        try:
            # In float64, where what is the same differs by rounding alone, far below 1e-9. A model that insists on its
            # own type runs in that, where only large differences can be told from rounding.
            model, inputs = copy.deepcopy(network.original).double(), _double(network.inputs)
            return _Reference(model, inputs, _outputs(model, inputs, self.trains), 1e-9)
        except Exception:
            model = copy.deepcopy(network.original)
            return _Reference(model, network.inputs, _outputs(model, network.inputs, self.trains), 1e-2)

    @cached_property
    def _random(self) -> set[str]:
        """Outputs in train mode that chance changes, so that their values show nothing."""
        first, second = (_outputs(self.reference.model, self.reference.inputs, True, seed) for seed in (0, 1))
        same = {place for place, tensor in first.items() if is_close(tensor, second.get(place), 1e-9)}
        return {place for place in first if place.endswith(IN_TRAINING) and place not in same}


def _outputs(model: nn.Module, inputs: Any, trains: bool, seed: int | None = None) -> dict[str, Tensor]:
    """What a model gives.

    Args:
        trains: whether to run what train mode decides as well.
        seed: of chance; as it is outside, when it is not given.
    """
    with frozen_eval(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model: it gave them when it was traced
        if seed is not None:
            torch.manual_seed(seed)
        found = dict(tensors_in(call(model, inputs)))
        if trains:
            try:
                with training_branches(model):
                    found |= in_training(call(model, inputs))
            except Exception as error:
                raise RuntimeError(f"in train mode: {error}") from error
    # Parameters may be among them, and what the model changes in place when it runs again.
    return {place: tensor.detach().clone() for place, tensor in found.items()}


def _double(inputs: Any) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def hide(module: nn.Module, channels: list[int]) -> RemovableHandle:
    """Hides channels of what a layer reads, in its first arguments or those that have their names: it reads zeros."""
    # Attention reads the channels of query, key and value.
    dim, several = channel_axis(module), 3 if isinstance(module, nn.MultiheadAttention) else 1

    def without(x: Tensor) -> Tensor:
        return x.index_fill(dim, torch.tensor(channels, device=x.device), 0)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {name: without(value) if name in _INPUTS else value for name, value in kwargs.items()}
        return (*map(without, args[:several]), *args[several:]), named

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def zero_rows(model: nn.Module, rows: Mapping[str, list[int]]) -> Iterator[None]:
    """With zeros in some rows of parameters."""
    saved = []
    with torch.no_grad():
        for name, those in rows.items():
            tensor, index = model.get_parameter(name), torch.tensor(those)
            index = index.to(tensor.device)
            saved.append((tensor, index, tensor[index]))
            tensor[index] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, index, values in saved:
                tensor[index] = values


def _narrowing(module: nn.Module, smaller: nn.Module, gone: list[int], shapes: Iterator[Any]) -> Any:
    """A hook that gives what a module of fewer channels makes of the channels that are left; the others are zero.

    Args:
        shapes: of what the smaller one read in each call: where it is another, there are the channels.
    """
    own = is_own(module)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Any) -> Any:
        shape = next(shapes, None)
        axes = [] if shape is None else [axis for axis, size in enumerate(args[0].shape) if size != shape[axis]]
        if len(axes) != 1:
            return whole
        (x, *rest), [axis] = args, axes
        left = torch.tensor(kept_indices(x.shape[axis], gone), device=x.device)
        if not own and not _treats_channels_alike(module, partial(module.forward, **kwargs), axis, x, *rest):
            raise ValueError(f"{type(module).__name__} takes channels by their place")
        given: Tensor = smaller(x.index_select(axis, left), *rest, **kwargs)
        return given.new_zeros(x.shape).index_copy(axis, left, given)

    return hook


def _treats_channels_alike(module: nn.Module, forward: Callable[..., Tensor], axis: int, *args: Any) -> bool:
    """Whether a module gives the same in another order of its channels: norms do, what shifts channels does not."""
    x, *rest = args
    size = x.shape[axis]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(x.device)
    before = {parameter: parameter.data for parameter in module.parameters()}
    whole = forward(x, *rest)
    try:
        for parameter, data in before.items():
            for dim in [dim for dim, count in enumerate(data.shape) if count == size][-1:]:
                parameter.data = data.index_select(dim, order)
        other = forward(x.index_select(axis, order), *rest)
    finally:
        for parameter, data in before.items():
            parameter.data = data
    return is_close(other, whole.index_select(axis, order))
