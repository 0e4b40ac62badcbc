"""What can be removed from a network, what hangs on it, and the operations that remove it.

torch-pruning's dependency graph (Fang et al., DepGraph, CVPR 2023) says what hangs on a channel, and its functions
remove channels, from copies of the modules whose tensors hold their own flat indices: what is left says what a recipe
must keep, whatever torch-pruning did to get there. Heads of attention, which that graph does not know, are found by
what they reach. None of it is taken on trust: every edit is checked against hiding the components from the layers that
read them.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from discedit._batches import call, device_of, map_tensors, moved, shapes_of, tensors_in, undisturbed
from discedit._dependencies import Untraceable, traced, training_branches
from discedit.recipe import Operation, Recipe, architecture_of

KINDS = ("filters", "neurons", "heads", "stream")

# A module and its side ("out", "in"; "through" where it works channel by channel), or a tensor and one of its axes.
_Key = tuple[str, str | int]
_Members = dict[_Key, list[int]]  # where something has channels, and which
_Probe = tuple[_Key, int]  # one of the channels there
_OUTPUT, _OPAQUE = "output", "opaque"  # sides of what is no module: an output of the model, what cannot be followed
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")  # attributes that count them
_READ = ("in_channels", "in_features", "num_features", "num_channels", "input_size", "embed_dim")  # how many are read
_TRAINED = " in train mode"  # behind the place of an output
_FOLDED = "its channels are split or folded further on, so that none can go alone"


@dataclass(frozen=True)
class Components:
    """What can be removed from one place.

    Attributes:
        layer: the layer that the scores name.
        kind: "filters" (of a convolution), "neurons" (of a linear layer), "heads" (of attention), "stream" (channels
            that several layers, layer norms or parameters share).
        rows: for each component the output rows of `layer` that make it up.
        layers: all layers that produce these channels, `layer` among them.
    """

    layer: str
    kind: str
    rows: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Heads:
    """Attention: the layer that stands for it, the one that reads it, channels per head there, what each head takes."""

    layer: str
    reader: str
    width: int
    members: list[_Members]


class Graph:
    """What can be removed from a model, and how.

    Args:
        op: what asks, for errors.
        model: unchanged.
        example_inputs: what the model can run on.

    Raises:
        ValueError: the model does not run, or torch-pruning cannot trace it.
    """

    def __init__(self, op: str, model: nn.Module, example_inputs: Any) -> None:
        self.op, self.model = op, model
        self.inputs = moved(example_inputs, device_of(model))
        self.shadow = copy.deepcopy(model).eval()
        for parameter in self.shadow.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        self.names = {id(part): name for name, part in (*self.shadow.named_modules(), *self.shadow.named_parameters())}
        self.tensors = dict((*self.shadow.named_parameters(), *self.shadow.named_buffers()))
        places: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name.rpartition(".")[0])
        self.shared = {owner for owners in places.values() if len(owners) > 1 for owner in owners}
        self.members: dict[str, list[_Members]] = {}
        self.inspected: dict[str, tuple[Components | None, str]] = {}
        self.footprints: dict[str, list[tuple[str, int, int]]] = {}
        self.doubtful: dict[str, dict[str, None]] = {}  # layer -> what may not work channel by channel on its way
        try:
            self.trace = traced(self.shadow, self.inputs)
        except Exception as error:
            raise ValueError(f"{self.op}: the model cannot be traced on example_inputs: {error}") from error
        self.graph, self.order = self.trace.graph, self.trace.order
        attention = self._places_of_attention()
        try:
            self.heads, self.unclear = self._find_heads(attention)
        except Exception:  # whatever a model makes of NaN
            self.heads, self.unclear = [], attention

    def find(self, layers: Iterable[str], kinds: Iterable[str]) -> tuple[dict[str, Components], dict[str, str]]:
        """What can be removed, as far as the trace tells, from these layers.

        A stream is found under the first of its layers that runs (of those in `layers`); the others are then in neither
        result.

        Args:
            layers: names of convolutions and linear layers.
            kinds: of `KINDS`.

        Returns:
            Components by layer, and why a layer has none.
        """
        layers, kinds = list(layers), set(kinds)
        found: dict[str, Components] = {}
        skipped: dict[str, str] = {}
        followers: set[str] = set()
        for layer in sorted(layers, key=self._turn):
            if layer in followers:
                continue
            components, why = self._inspect(layer)
            if components is not None and components.kind not in kinds:
                why = self._why_not_alone(components)
            if why or components is None:
                skipped[layer] = why
                continue
            found[layer] = components
            followers |= set(components.layers)
        return (
            {layer: found[layer] for layer in layers if layer in found},
            {layer: skipped[layer] for layer in layers if layer in skipped},
        )

    def consumers(self, chosen: Mapping[str, Iterable[int]]) -> list[tuple[str, list[int]]]:
        """The layers that read components in eval mode, each with the input channels on which it reads them.

        Args:
            chosen: layer -> indices of its components, as `find` gives them.
        """
        removed = self._removed(chosen)
        return [(name, gone) for (name, role), gone in removed.items() if role == "in" and name in self.order]

    def producers(self, chosen: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
        """The layers that lose output rows with the components and run in eval mode, each with these rows."""
        removed = self._removed(chosen)
        return {name: gone for (name, role), gone in removed.items() if role == "out" and name in self.order}

    def footprint(self, layer: str) -> list[tuple[str, int, int]]:
        """What one component of a layer takes from each parameter and buffer that shrinks with it.

        Returns:
            Name of the tensor, dim, number of entries along it.
        """
        if layer not in self.footprints:
            shapes = architecture_of(self.model)
            keeps = [o for o in self._operations(self._removed({layer: [0]})) if o.kind == "keep"]
            self.footprints[layer] = [(o.target, o.dim, shapes[o.target][o.dim] - len(o.index)) for o in keeps]
        return self.footprints[layer]

    def uncuttable(self, layers: Iterable[str]) -> dict[str, str]:
        """The layers whose components torch-pruning cannot cut, so that they have no footprint, and why."""
        found = {}
        for layer in layers:
            try:
                self.footprint(layer)
            except Exception as error:  # whatever torch-pruning makes of a module that it does not know
                found[layer] = f"torch-pruning cannot remove its channels: {error}"
        return found

    def plan(self, chosen: Mapping[str, Iterable[int]]) -> tuple[list[Operation], dict[str, str]]:
        """The operations that remove components, and the layers that must stay whole after all, with reasons.

        A removal must be the same function as hiding the components from the layers that read them, and from the layer
        norms over them. Where it is not, each layer is tried by itself.

        Args:
            chosen: layer -> indices of its components, as `find` gives them.

        """
        operations, problem = self._trial(chosen)
        if not problem:
            return operations, {}
        failed: dict[str, str] = {}
        for layer, indices in chosen.items():
            why = self._trial({layer: indices})[1] if indices else ""
            if why:
                failed |= dict.fromkeys(self._found(layer).layers, f"{why}{self._on_the_way(layer)}")
        rest = {layer: indices for layer, indices in chosen.items() if layer not in failed}
        if failed:
            operations, problem = self._trial(rest)
        if problem:  # each by itself can go, all together cannot
            kept: dict[str, Iterable[int]] = {}
            operations = []
            for layer, indices in rest.items():
                tried, problem = self._trial({**kept, layer: indices})
                if problem:
                    failed |= dict.fromkeys(self._found(layer).layers, f"together with {', '.join(kept)}: {problem}")
                else:
                    kept[layer], operations = indices, tried
        return operations, failed

    def unseen(self, chosen: Mapping[str, Iterable[int]]) -> dict[str, list[str]]:
        """Modules that ran neither in eval nor in train mode and may read components: they have as many channels.

        Args:
            chosen: layer -> indices of its components, as `find` gives them.

        Returns:
            Module -> the layers among `chosen` that have as many channels there as it reads.
        """
        idle: dict[str, int] = {}
        for name, module in self.shadow.named_modules():
            if name in self.order or name in self.trace.trained:
                continue
            own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            width = next((w for a in _READ if type(w := vars(module).get(a)) is int), 0)
            if own and width and not self.trace.used.intersection(own):
                idle[name] = width
        found: dict[str, list[str]] = {}
        for layer, indices in chosen.items() if idle else ():
            if any(True for _ in indices):
                sizes = {self._size(key) for key in self._removed({layer: [0]}) if key[1] in ("in", "out")}
                for name, width in idle.items():
                    if width in sizes:
                        found.setdefault(name, []).append(layer)
        return found

    def _turn(self, name: str) -> float:
        return self.order.get(name, math.inf)

    def _group(self, layer: str, rows: list[int]) -> list[_Members]:
        """What goes with each of these rows, as torch-pruning's graph has it; what several reach is with the first."""
        from torch_pruning.ops import OPTYPE

        module = self.shadow.get_submodule(layer)
        function = self.graph.get_pruner_of_module(module).prune_out_channels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = self.graph.get_pruning_group(module, function, rows)
        found: dict[int, _Members] = {row: {} for row in rows}
        doubtful = self.doubtful.setdefault(layer, {})
        for item in group:
            target = item.dep.target
            if (what := self.trace.doubtful.get(id(target.module))) is not None:
                doubtful[what] = None
            name = self.names.get(id(target.module))
            key: _Key
            if id(target.module) in self.trace.opaque:
                key = (self.trace.opaque[id(target.module)], _OPAQUE)
            elif target.type == OPTYPE.OUTPUT:
                key = (self.trace.outputs[id(target.module)], _OUTPUT)
            elif name is None:
                continue
            elif isinstance(target.module, nn.Parameter):
                key = (name, target.pruning_dim)
            elif width_of(target.module) is None or _is_depthwise(target.module):
                key = (name, "through")
            else:
                key = (name, "out" if self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in")
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                found[root].setdefault(key, []).append(index)
        return list(found.values())

    def _members_of(self, layer: str) -> list[_Members]:
        """For each component of a layer what goes with it; a component is the rows that can only go together."""
        if layer in self.members:
            return self.members[layer]
        rows = range(self._size((layer, "out")))
        found = self._group(layer, [0])
        if len(found[0][layer, "out"]) > 1:
            left = set(rows) - set(found[0][layer, "out"])
            while left:
                found += self._group(layer, [min(left)])
                left -= {min(left), *found[-1][layer, "out"]}
        else:
            found = self._group(layer, list(rows))
            for name in {name for part in found for name, role in part if role == "out"}:
                # The same channels in another layer: what was slow to find need not be found again.
                if [part.get((name, "out")) for part in found] == [[row] for row in range(self._size((name, "out")))]:
                    self.members[name] = found
        self.members[layer] = found
        return found

    def _places_of_attention(self) -> dict[str, str]:
        """The linear layers in modules that count heads, each with the innermost of these."""
        counts = [name for name, module in self.shadow.named_modules() if _count_of_heads(module)]
        return {
            name: max(around, key=len)
            for name, module in self.shadow.named_modules()
            if isinstance(module, nn.Linear) and name in self.order
            if (around := [place for place in counts if _is_inside(name, place)])
        }

    def _find_heads(self, places: dict[str, str]) -> tuple[list[_Heads], dict[str, str]]:
        """Attention whose heads can go; the linear layers of the rest, each with the module that it belongs to.

        Found by probes: one row of a linear layer, or one index of another tensor, in a module that counts heads. A row
        of query or key reaches all channels of its head in the layer that reads attention, a row of value one of them.
        """
        from torch_pruning.ops import OPTYPE, module2type

        counts = {name: count for name, module in self.shadow.named_modules() if (count := _count_of_heads(module))}
        probes: dict[str, list[_Probe]] = {place: [] for place in counts}
        for name, place in places.items():
            size, count = self._size((name, "out")), counts[place]
            if size % count == 0 and not self._problem((name, "out")):
                thirds = [size // 3, size // 3 * 2] if size % (3 * count) == 0 else []
                probes[place] += [((name, "out"), start) for start in (0, *thirds)]
        for name, tensor in self.tensors.items():
            owner = self.shadow.get_submodule(name.rpartition(".")[0])
            if module2type(owner) == OPTYPE.ELEMENTWISE and tensor.is_floating_point():
                for place in [place for place in counts if _is_inside(name, place)]:
                    dims = [dim for dim, size in enumerate(tensor.shape) if size == counts[place]]
                    probes[place] += [((name, dim), 0) for dim in dims]
        reached: dict[_Probe, dict[str, list[int]]] = {}
        for turn in range(max(map(len, probes.values()), default=0)):
            now = [found[turn] for found in probes.values() if turn < len(found)]
            reached |= dict.fromkeys(now, self._reached(now))
        heads = {place: self._heads_of(probes[place], reached, count) for place, count in counts.items()}
        unclear = {name: place for name, place in places.items() if heads[place] is None}
        return [found for found in heads.values() if found is not None], unclear

    def _reached(self, probes: list[_Probe]) -> dict[str, list[int]]:
        """Input channels of layers that some indices of tensors reach without passing through another layer.

        NaN shows it: it passes whatever works on its channel, however small its share.
        """
        found: dict[str, list[int]] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not bool(args[0].isnan().any()):
                return None
            nan = args[0].isnan()
            hit = nan.movedim(_channel_axis(module), -1).flatten(0, -2).any(0).nonzero().flatten()
            found[name] = sorted({*found.get(name, ()), *hit.tolist()})
            return (args[0].masked_fill(nan, 0), *args[1:])

        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
            for name, module in self.shadow.named_modules()
            if width_of(module) is not None
        ]
        saved: dict[str, Tensor] = {}
        try:
            for (name, role), index in probes:
                name, dim = (name, role) if isinstance(role, int) else (f"{name}.weight", 0)
                saved.setdefault(name, self.tensors[name].detach().clone())
                self.tensors[name].data.select(dim, index).fill_(math.nan)
            # The other kernels of attention need not pass NaN on.
            with undisturbed(self.shadow), sdpa_kernel(SDPBackend.MATH):
                call(self.shadow, self.inputs)
        finally:
            for name, value in saved.items():
                self.tensors[name].data.copy_(value)
            for handle in handles:
                handle.remove()
        return found

    def _heads_of(
        self, probes: list[_Probe], reached: Mapping[_Probe, Mapping[str, list[int]]], count: int
    ) -> _Heads | None:
        """Heads, if what the probes reach in one layer is what they reach in attention."""
        readers: dict[str, list[_Probe]] = {}
        for probe in probes:
            name, role = probe[0]
            start = self._turn(name.rpartition(".")[0] if isinstance(role, int) else name)
            for reader in sorted((name for name in reached[probe] if self._turn(name) > start), key=self._turn):
                width, rest = divmod(self._size((reader, "in")), count)
                if not rest and reached[probe][reader] in ([0], list(range(width))):
                    readers.setdefault(reader, []).append(probe)
                    break
        for reader, found in readers.items():
            size = self._size((reader, "in"))
            blocks: dict[_Key, Tensor] = {(reader, "in"): torch.arange(size).view(count, -1)}
            values, parts = [], 0
            for key, start in found:
                rows = torch.arange(self._size(key))
                fused = key[1] == "out" and len(rows) == 3 * size
                if fused and not all((key, third) in found for third in (0, size, 2 * size)):
                    return None
                blocks[key] = rows.view(3, count, -1).transpose(0, 1).flatten(1) if fused else rows.view(count, -1)
                if key[1] == "out":
                    parts += 1
                    if len(reached[key, start][reader]) == 1 and len(rows) in (size, 3 * size):
                        values.append(key[0])
            if parts >= 3 and values:
                members = [{key: block[head].tolist() for key, block in blocks.items()} for head in range(count)]
                return _Heads(min(values, key=self._turn), reader, size // count, members)
        return None

    def _found(self, layer: str) -> Components:
        components, why = self._inspect(layer)
        if components is None:
            raise ValueError(f"{self.op}: layer {layer!r} has no components that can be removed: {why}.")
        return components

    def _inspect(self, layer: str) -> tuple[Components | None, str]:
        """The layer's components, or why it has none that can be removed."""
        if layer not in self.inspected:
            try:
                self.inspected[layer] = self._judge(layer)
            except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
                self.inspected[layer] = None, f"torch-pruning cannot follow its channels: {error}"
        return self.inspected[layer]

    def _judge(self, layer: str) -> tuple[Components | None, str]:
        module = self.shadow.get_submodule(layer)
        inside = [self.shadow.get_submodule(layer[:i]) for i, letter in enumerate(layer) if letter == "."]
        if any(isinstance(parent, nn.MultiheadAttention) for parent in inside):
            return None, "it is inside a MultiheadAttention, whose forward insists on its width"
        if layer in self.trace.trained:
            return None, "it runs in train mode alone, so that nothing shows what its components are worth"
        if layer not in self.order:
            return None, "it does not run on the example inputs, or not by a call of its module"
        if module not in self.graph.module2node:
            return None, "torch-pruning's trace does not reach it"
        own: _Key = (layer, "out")
        if why := self._problem(own):
            return None, why
        for heads in self.heads:
            if heads.layer == layer:
                rows = tuple(tuple(members[own]) for members in heads.members)
                return Components(layer, "heads", rows, (layer,)), ""
            if own in heads.members[0]:
                return None, f"its rows belong to the heads that {heads.layer} stands for"
        place = self.unclear.get(layer)
        unclear = f"it belongs to the attention of {place or 'the model'}, whose heads cannot be told apart"
        try:
            members = self._members_of(layer)
        except Untraceable as error:
            return None, str(error) if place is None else unclear
        except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
            return None, f"torch-pruning cannot follow its channels: {error}" if place is None else unclear
        keys = sorted(set().union(*members), key=lambda key: (self._turn(key[0]), str(key)))
        others = [name for name, role in keys if role == "out" and name != layer]
        read = any(role == "in" for _, role in keys)
        alone = read and not others and len(members) == self._size(own)
        if place is not None and not alone and all(self.unclear.get(other) == place for other in others):
            return None, unclear
        for key in keys:
            if why := self._problem(key):
                if key[1] == "out":
                    why = f"{_shares(others)}, of which {key[0]} must stay: {why}"
                return None, why
        if cut := [why for why, role in keys if role == _OPAQUE]:
            return None, cut[0]
        outputs = [name for name, role in keys if role == _OUTPUT]
        if not read and outputs:
            return None, self._changes(min(outputs, key=lambda place: place.endswith(_TRAINED)))
        if not read:
            return None, f"no layer reads its channels{self._on_the_way(layer)}"
        if outputs and (why := self._reshaped(members[0])):
            return None, why
        if not self._is_even(members) or len(members) == 1 < self._size(own):
            why = f"{_shares(others)}, not channel by channel" if others else _FOLDED
            return None, f"{why}{self._on_the_way(layer)}"
        norms = any(isinstance(self._module(key), nn.LayerNorm) for key in keys)
        shared = others or norms or any(isinstance(role, int) for _, role in keys)
        inner = "filters" if isinstance(module, _ConvNd) else "neurons"
        rows = tuple(tuple(sorted(part[own])) for part in members)
        layers = tuple(name for name, role in keys if role == "out")
        return Components(layer, "stream" if shared else inner, rows, layers), ""

    def _is_even(self, members: list[_Members]) -> bool:
        """Whether the components are alike, apart, and all that the layers have."""
        counts = [{key: len(gone) for key, gone in part.items() if key[1] != _OUTPUT} for part in members]
        if counts.count(counts[0]) < len(counts):
            return False
        for key in counts[0]:
            gone, size = [index for part in members for index in part[key]], self._size(key)
            if len({*gone}) < len(gone) or max(gone) >= (size or math.inf) or (key[1] == "out" and len(gone) < size):
                return False
        return True

    def _module(self, key: _Key) -> nn.Module | None:
        return None if isinstance(key[1], int) or key[1] in (_OUTPUT, _OPAQUE) else self.shadow.get_submodule(key[0])

    def _size(self, key: _Key) -> int:
        """How many channels there are; 0 where the module takes any number."""
        if isinstance(key[1], int):
            return self.tensors[key[0]].shape[key[1]]
        if key[1] in (_OUTPUT, _OPAQUE):
            return 0
        pruner = self.graph.get_pruner_of_module(module := self._module(key))
        return (pruner.get_in_channels(module) if key[1] == "in" else pruner.get_out_channels(module)) or 0

    def _problem(self, key: _Key) -> str:
        """Why channels there must stay; empty when they need not, as far as their module goes."""
        module, (name, role) = self._module(key), key
        if module is None:
            return ""
        if isinstance(module, nn.MultiheadAttention):
            return "it feeds a MultiheadAttention, whose forward insists on its width"
        if isinstance(module, nn.RNNBase):
            return f"it feeds {name}, a {type(module).__name__}, which cannot be cut"
        if isinstance(module, nn.GroupNorm):
            return "a group norm follows it, whose groups would change"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return "a layer norm over several axes follows it"
        computed = getattr(module, "weight", None) is not None and "weight" not in module._parameters
        if width_of(module) is None:
            return "a norm follows it whose weight is computed or shared" if computed or name in self.shared else ""
        if isinstance(module, _ConvNd) and module.groups > 1 and role != "through":
            return f"{'it is' if role == 'out' else 'it feeds'} a convolution in {module.groups} groups"
        if computed or name in self.shared:
            what = "weight is computed" if computed else "parameters are shared"
            return f"its {what}" if role == "out" else f"it feeds {name}, whose {what}"
        return ""

    def _why_not_alone(self, components: Components) -> str:
        """Why components of a kind that was not asked for are left."""
        if components.kind != "stream":
            return f"its components are {components.kind}, which are not among those to remove"
        others = [name for name in components.layers if name != components.layer]
        if others or any(isinstance(role, int) for _, role in self._members_of(components.layer)[0]):
            return _shares(others)
        return "removing its channels is not the same as hiding them: a layer norm normalises over them"

    def _removed(self, chosen: Mapping[str, Iterable[int]]) -> dict[_Key, list[int]]:
        """Everything that goes with the components, in the order in which it runs."""
        gone: dict[_Key, set[int]] = {}
        heads = {found.layer: found.members for found in self.heads}
        for layer, indices in chosen.items():
            kind = self._found(layer).kind
            members = heads[layer] if kind == "heads" else self._members_of(layer)
            for index in indices:
                for key, rows in members[index].items():
                    gone.setdefault(key, set()).update(rows)
        return {key: sorted(gone[key]) for key in sorted(gone, key=lambda key: (self._turn(key[0]), str(key)))}

    def _operations(self, removed: Mapping[_Key, list[int]]) -> list[Operation]:
        """Removes channels from copies of the modules and reads off what that changed."""
        keeps: list[Operation] = []
        copies: dict[str, nn.Module] = {}
        for (name, role), gone in removed.items():
            if role == _OUTPUT:
                continue
            if isinstance(role, int):
                index = sorted(set(range(self._size((name, role)))) - set(gone))
                keeps.append(Operation("keep", name, dim=role, index=tuple(index)))
                continue
            if name not in copies:
                copies[name] = _tagged(self.model.get_submodule(name))
            module = copies[name]
            pruner = self.graph.get_pruner_of_module(module)
            (pruner.prune_in_channels if role == "in" else pruner.prune_out_channels)(module, gone)
        changes: dict[tuple[str, str], tuple[Any, Any]] = {}
        for name, module in copies.items():
            original = self.model.get_submodule(name)
            for tensor, left in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                keeps += _kept(f"{name}.{tensor}", _tags(getattr(original, tensor)), left.detach())
            before, after = _sizes(original), _sizes(module)
            changes |= {(name, key): (before[key], after[key]) for key in before if before[key] != after[key]}
        for heads in self.heads:
            if (heads.reader, "in") in removed:
                changes |= self._head_attributes(heads, len(removed[heads.reader, "in"]))
        return keeps + [
            Operation("attribute", module, name=attribute, before=before, value=value)
            for (module, attribute), (before, value) in changes.items()
        ]

    def _head_attributes(self, heads: _Heads, gone: int) -> dict[tuple[str, str], tuple[int, int]]:
        """Counts of heads and their joint width, kept by the attention's module or those in it."""
        paths = [name.split(".") for name, role in heads.members[0] if not isinstance(role, int)]
        common = [first[0] for first in itertools.takewhile(lambda s: len(set(s)) == 1, zip(*paths, strict=False))]
        count = len(heads.members)
        found = {}
        for name, module in self.model.get_submodule(".".join(common)).named_modules(prefix=".".join(common)):
            for attribute, value in vars(module).items():
                if type(value) is not int or attribute.startswith("_"):
                    continue
                if value == count and attribute.endswith("heads"):
                    found[name, attribute] = (value, value - gone // heads.width)
                elif value == count * heads.width and attribute in ("all_head_size", "attn_dim", "inner_dim"):
                    found[name, attribute] = (value, value - gone)
        return found

    @cached_property
    def _wide(self) -> bool:
        """Whether the model runs in float64, and does not insist on its own type."""
        try:
            _outputs(self.model, self.inputs, {}, True, branches=self.trace.branches)
        except Exception:
            return False
        return True

    def _hidden(self, gone: Mapping[_Key, list[int]]) -> dict[str, Tensor]:
        """What the model gives with components hidden from their readers."""
        if "_wide" not in vars(self):  # what runs in float64 with something hidden runs in it without: one pass less
            try:
                found = _outputs(self.model, self.inputs, gone, True, branches=self.trace.branches)
            except Exception:
                return _outputs(self.model, self.inputs, gone, self._wide, branches=self.trace.branches)
            self._wide = True
            return found
        return _outputs(self.model, self.inputs, gone, self._wide, branches=self.trace.branches)

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        return _outputs(self.model, self.inputs, {}, False, branches=self.trace.branches)

    @cached_property
    def _random(self) -> set[str]:
        """Outputs in train mode that chance changes, so that their values show nothing."""
        if not self.trace.branches:
            return set()
        first, second = (_outputs(self.model, self.inputs, {}, self._wide, branches=True, seed=seed) for seed in (0, 1))
        same = {place for place, tensor in first.items() if _is_close(tensor, second.get(place), 1e-9)}
        return {place for place in first if place.endswith(_TRAINED) and place not in same}

    @cached_property
    def _trained(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of what the model gives in train mode; None when it does not run there."""
        try:
            model = copy.deepcopy(self.model)
            return _shapes_in_training(model.double() if self._wide else model, self._typed_inputs)
        except Exception:
            return None

    @property
    def _typed_inputs(self) -> Any:
        return _double(self.inputs) if self._wide else self.inputs

    def _on_the_way(self, layer: str) -> str:
        """What channels of a layer pass that torch-pruning follows as if it worked channel by channel."""
        found = list(self.doubtful.get(layer, ()))
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return f" (torch-pruning may not follow {', '.join(found[:2])}{more})" if found else ""

    def _changes(self, place: str) -> str:
        return f"the model's {'output' if place == self.trace.main else place} would change its shape"

    def _reshaped(self, part: _Members) -> str:
        """Which output of the model one component less would change the shape of; empty when none."""
        try:
            before = self._whole
            smaller = self._without(self._operations({key: sorted({*gone}) for key, gone in part.items()}))
            after = _outputs(smaller, self.inputs, {}, False, branches=self.trace.branches, copied=False)
        except Exception as error:
            return f"the model does not run without its channels: {error}"
        return self._first_reshaped(before, after)

    def _first_reshaped(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
        changed = [place for place in before if place not in after or before[place].shape != after[place].shape]
        return self._changes(changed[0]) if changed or len(before) != len(after) else ""

    def _without(self, operations: list[Operation]) -> nn.Module:
        return Recipe("prune", {}, {}, architecture_of(self.model), operations).apply(self.model).model

    def _trial(self, chosen: Mapping[str, Iterable[int]]) -> tuple[list[Operation], str]:
        """The operations, and what is wrong with them; nothing is, when it is empty."""
        gone = self._removed(chosen)
        try:
            operations = self._operations(gone)
            smaller = self._without(operations)
        except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
            return [], f"torch-pruning cannot remove its channels: {error}"
        hidden: dict[str, Tensor] | Exception
        try:
            hidden = self._hidden(gone)
        except Exception as error:
            hidden = error
        try:
            removed = _outputs(smaller, self.inputs, {}, self._wide, branches=self.trace.branches, copied=False)
        except Exception as error:
            return [], f"the model does not run without its channels: {error}"
        if isinstance(hidden, Exception):
            return [], f"its channels cannot be hidden from the layers that read them: {hidden}"
        if why := self._first_reshaped(hidden, removed):
            return [], why
        tolerance = 1e-9 if self._wide else 1e-2
        for place, tensor in hidden.items():
            if place not in self._random and not _is_close(tensor, removed[place], tolerance):
                which = "" if place == self.trace.main else f" (the model's {place} differs)"
                return [], f"removing its channels is not the same as hiding them from the layers that read them{which}"
        return ([], why) if (why := self._problem_in_training(smaller)) else (operations, "")

    def _problem_in_training(self, smaller: nn.Module) -> str:
        """Why a smaller model does not run in train mode as the model itself does; empty when it does, or neither."""
        shapes: dict[str, tuple[int, ...]] = {}
        problem = ""
        try:
            shapes = _shapes_in_training(smaller, self._typed_inputs)
            if shapes == self.trace.shapes:
                return ""
        except Exception as error:
            problem = f"the model does not run in train mode without its channels: {error}"
        if self._trained is None or problem:
            return "" if self._trained is None else problem
        changed = [place for place, shape in self._trained.items() if shapes.get(place) != shape]
        return self._changes(f"{changed[0]}{_TRAINED}") if changed else ""


class _Narrow(TorchFunctionMode):
    """Lets layer norms normalise over some channels, and hides the others."""

    gone: list[int] | None = None  # channels hidden from the norm that runs

    def watch(self, norm: nn.Module, gone: list[int]) -> None:
        norm.register_forward_pre_hook(lambda *_: setattr(self, "gone", gone))
        norm.register_forward_hook(lambda *_: setattr(self, "gone", None))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.layer_norm or self.gone is None:
            return func(*args, **(kwargs or {}))
        given = {
            **dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)),
            **(kwargs or {}),
        }
        x: Tensor = given.pop("input")
        left = torch.tensor(sorted(set(range(x.shape[-1])) - set(self.gone)), device=x.device)
        given = {name: value[left] if isinstance(value, Tensor) else value for name, value in given.items()}
        given["normalized_shape"] = [len(left)]
        return torch.zeros_like(x).index_copy(-1, left, func(x[..., left], **given))


def unseen_message(op: str, unseen: Mapping[str, Iterable[str]]) -> str:
    """What to say of modules that did not run, as `Graph.unseen` gives them."""
    them = _some([f"{module} as many as {_some(sorted(layers), ', ')}" for module, layers in unseen.items()], "; ")
    return (
        f"{op}: example_inputs must run all that is used, in eval or in train mode: whether what does not run reads "
        "channels that were removed, and then no longer fits, cannot be seen. These did not run and read as many "
        f"channels as layers that lost some: {them}. If they are used, leave these layers whole or give inputs on "
        "which they run."
    )


def _some(names: list[str], separator: str) -> str:
    more = [f"{len(names) - 3} more"] if len(names) > 4 else []
    return separator.join(names[:3] + more if more else names)


def width_of(module: nn.Module) -> int | None:
    """Number of output rows of a layer that can be edited, else None."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


def _shares(others: list[str]) -> str:
    if not others:
        return "its channels are tied to a parameter outside any layer"
    more = f" and {len(others) - 1} more layers" if len(others) > 1 else ""
    return f"it shares its channels with {min(others)}{more}"


def _is_inside(name: str, place: str) -> bool:
    return not place or name.startswith(f"{place}.")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _channel_axis(module: nn.Module) -> int:
    return 1 - int(module.weight.ndim) if isinstance(module, _ConvNd) else -1


def _count_of_heads(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return 0
    counts = [vars(module).get(name) for name in _HEADS]
    return next((count for count in counts if type(count) is int and count > 1), 0)


def _tags(tensor: Tensor) -> Tensor:
    """Each entry's own flat index."""
    return torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)


def _tagged(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = _tags(tensor)
    return module


def _kept(name: str, tags: Tensor, left: Tensor) -> list[Operation]:
    """The `keep` operations that turn the whole tensor of flat indices into what is left of it."""
    operations = []
    expected = tags
    for dim in range(tags.ndim):
        if left.shape[dim] == tags.shape[dim]:
            continue
        line = left
        for other in reversed(range(tags.ndim)):
            if other != dim:
                line = line.select(other, 0)
        index = (line.long() // tags.stride(dim)) % tags.shape[dim]
        expected = expected.index_select(dim, index)
        operations.append(Operation("keep", name, dim=dim, index=tuple(index.tolist())))
    if expected.shape != left.shape or not torch.equal(expected, left):
        raise ValueError(f"what must go from tensor {name!r} is no set of rows or columns")
    return operations


def _sizes(module: nn.Module) -> dict[str, Any]:
    """A module's public integer attributes and tuples of them: its widths among them."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[name] = value
        elif isinstance(value, tuple) and value and all(type(entry) is int for entry in value):
            found[name] = list(value)
    return found


def _outputs(
    model: nn.Module,
    inputs: Any,
    hide: Mapping[_Key, list[int]],
    wide: bool,
    *,
    branches: bool,
    seed: int | None = None,
    copied: bool = True,
) -> dict[str, Tensor]:
    """What a copy of the model gives, with some channels hidden from what reads them.

    Args:
        branches: whether to run what train mode alone runs as well.
        seed: of chance; as it is outside, when it is not given.
        copied: whether to leave the model itself as it is.
    """
    model = copy.deepcopy(model) if copied else model
    if wide:
        model, inputs = model.double(), _double(inputs)
    narrow = _Narrow()
    for (name, role), gone in hide.items():
        if role == "in":
            module = model.get_submodule(name)
            module.register_forward_pre_hook(_hiding(gone, _channel_axis(module)))
        elif role == "through" and isinstance(module := model.get_submodule(name), nn.LayerNorm):
            narrow.watch(module, gone)
    with undisturbed(model), narrow, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model: it gave them when it was traced
        if seed is not None:
            torch.manual_seed(seed)
        found = dict(tensors_in(call(model, inputs)))
        if branches:
            with training_branches(model):
                found |= {f"{place}{_TRAINED}": tensor for place, tensor in tensors_in(call(model, inputs))}
    return {place: tensor.detach() for place, tensor in found.items()}  # parameters among them


def _double(inputs: Any) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _shapes_in_training(model: nn.Module, inputs: Any) -> dict[str, tuple[int, ...]]:
    """Of the outputs in train mode, after which the model is no longer what it was."""
    device = device_of(model)
    rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with rng, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shapes_of(dict(tensors_in(call(model.train(), inputs))))


def _is_close(one: Tensor, other: Tensor | None, tolerance: float) -> bool:
    """Whether two outputs are the same but for rounding; what is not finite must be the same."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == other).all())
    same = (one == other) | (one.isnan() & other.isnan())
    off, size = (one - other).abs().masked_fill(same, 0), one.abs().masked_fill(~one.isfinite(), 0)
    return not one.numel() or float(off.max()) <= tolerance * float(size.max()) + 1e-12


def _hiding(channels: list[int], dim: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_fill(dim, torch.tensor(channels, device=args[0].device), 0), *args[1:])

    return hook
