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
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit.graph.dependencies import Untraceable, followed
from discedit.model import attention
from discedit.model.forward import call, device_of, hooked, map_tensors, moved, shapes_of, tensors_in, undisturbed
from discedit.model.functional import why_not_explicit
from discedit.model.layers import input_of, is_own
from discedit.model.trace import IN_TRAINING, ModelTrace, training_branches, width_of
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import architecture_of, reduced

KINDS = ("filters", "neurons", "heads", "stream")

# A module and its side ("out", "in"; "through" where it works channel by channel), or a tensor and one of its axes.
_Key = tuple[str, str | int]
_Members = dict[_Key, list[int]]  # where something has channels, and which
_Probe = tuple[_Key, int]  # one of the channels there
_OUTPUT, _OPAQUE = "output", "opaque"  # sides of what is no module: an output of the model, what cannot be followed
_JOINT = ("all_head_size", "attn_dim", "inner_dim", "val_attn_dim")  # and their width together
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")  # attributes that count them
_READ = ("in_channels", "in_features", "num_features", "num_channels", "input_size", "embed_dim")  # how many are read
# Operations of autograd's graph that are no sums of what they read; what is done in place on a view has no name there.
_NO_SUMS = re.compile("(Mul|Div|Where|Cat)Backward")
ROUNDING = 1000  # units in the last place of the largest number
_SHAPES = re.compile("(Unsafe)?(View|Reshape|Flatten|Transpose|Permute|Squeeze|Unsqueeze|Clone)")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of a MultiheadAttention
_WIDTH = re.compile("dim|width|size|channels|features|planes|hidden|d_model")  # attributes that count channels
_INPUTS = ("input", "query", "key", "value")  # of layers, by name
_FOLDED = "its channels are split or folded further on, so that none can go alone"


@dataclass(frozen=True)
class Components:
    """What can be removed from one place.

    Attributes:
        layer: the layer that the scores name.
        kind: "filters" (of a convolution), "neurons" (of a linear layer), "heads" (of attention), "stream" (channels to
            which several layers add).
        rows: for each component the output rows of `layer` that make it up.
        layers: all layers that produce these channels, `layer` among them.
        followers: other layers whose rows go with them: depthwise convolutions, queries and keys of heads.
    """

    layer: str
    kind: str
    rows: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]
    followers: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Heads:
    """Attention whose heads can go.

    Attributes:
        place: the module that counts the heads.
        layer: what stands for them: the layer that gives values, or a MultiheadAttention.
        reader: the layer that reads them.
        width: channels per head there.
        members: what each head takes.
        spec: of the forward that the attention needs with fewer heads, with the module's name; None: its own will do.
        why: it is not known whether the attention needs another.
    """

    place: str
    layer: str
    reader: str
    width: int
    members: list[_Members]
    spec: tuple[str, dict[str, Any]] | None = None
    why: str = ""


@dataclass(frozen=True)
class _Reference:
    """A copy of the model that edits are compared with: in float64, unless the model insists on its own type.

    Attributes:
        model, inputs: to run.
        outputs: what the model gives.
        tolerance: of a difference from it, over the largest number.
    """

    model: nn.Module
    inputs: Any
    outputs: dict[str, Tensor]
    tolerance: float


class Graph:
    """What can be removed from a model, and how.

    Args:
        op: what asks, for errors.
        model: unchanged.
        example_inputs: what the model can run on.
        keep_outputs: whether outputs beside the logits (the first tensor) keep their shapes.

    Raises:
        ValueError: the model does not run, or torch-pruning cannot trace it.
    """

    def __init__(self, op: str, model: nn.Module, example_inputs: Any, *, keep_outputs: bool = True) -> None:
        self.op, self.model, self.keep_outputs = op, model, keep_outputs
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
        self.parts: dict[_Key, list[_Members]] = {}
        self.joined: dict[frozenset[_Key], list[_Members]] = {}  # of both sides of convolutions in groups
        self.widths: dict[_Key, int] = {}
        self.differs: dict[_Key, bool] = {}
        self.nodes: dict[_Key, set[Any]] = {}  # of torch-pruning's graph, on the way of a layer's channels
        self.inspected: dict[str, tuple[Components | None, str]] = {}
        self.footprints: dict[str, list[tuple[str, int, int]]] = {}
        # Layer -> what may not work channel by channel on its way, and the modules in which that stands.
        self.doubtful: dict[str, dict[str, str]] = {}
        try:
            self.known = ModelTrace.of(self.shadow, self.inputs, few=None, training=True)
            self.trace = followed(self.known, self.inputs)
        except Exception as error:
            raise ValueError(f"{self.op}: the model cannot be traced on example_inputs: {error}") from error
        self.graph, self.order = self.trace.graph, self.known.order
        self.heads, self.unclear = self._find_heads(self._places_of_attention())

    def find(self, layers: Iterable[str], kinds: Iterable[str]) -> tuple[dict[str, Components], dict[str, str]]:
        """What can be removed, as far as the trace tells, from these layers.

        Channels of several layers are found under the first of them that runs (of those in `layers`); the others are
        then in neither result.

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
        left: dict[str, Components] = {}  # what is known of the layers of streams that stay
        for layer in sorted(layers, key=self._turn):
            if layer in followers:
                continue
            if layer in left:
                skipped[layer] = self._why_not_alone(replace(left[layer], layer=layer))
                continue
            components, why = self._inspect(layer)
            if components is not None and components.kind not in kinds:
                why = self._why_not_alone(components)
                if components.kind == "stream":
                    left |= dict.fromkeys((*components.layers, *components.followers), components)
            if why or components is None:
                skipped[layer] = why
                continue
            found[layer] = components
            followers |= {*components.layers, *components.followers}
        return (
            {layer: found[layer] for layer in layers if layer in found},
            {layer: skipped[layer] for layer in layers if layer in skipped and layer not in followers},
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

    def rows(self, layer: str) -> dict[str, list[list[int]]]:
        """The weights that produce a layer's components, each with the rows of every component."""
        parts = self._found(layer)
        if parts.kind == "heads":
            if not isinstance(self.shadow.get_submodule(layer), nn.MultiheadAttention):
                return {f"{layer}.weight": [list(rows) for rows in parts.rows]}
            members = next(heads.members for heads in self.heads if heads.layer == layer)
            weight = next(key for key in members[0] if key[0] in (f"{layer}.in_proj_weight", f"{layer}.v_proj_weight"))
            return {weight[0]: [part[weight] for part in members]}
        members = self._members_of(layer)
        places = {f"{name}.weight": self._own(name) for name in parts.layers}
        return {weight: [part[place] for part in members] for weight, place in places.items()}

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
        alone = self._failing({layer: indices for layer, indices in chosen.items() if indices}, problem)
        failed: dict[str, str] = {}
        for layer, why in alone.items():
            more = next((heads.why for heads in self.heads if heads.layer == layer), self._on_the_way(layer))
            failed |= dict.fromkeys(self._found(layer).layers, f"{why}{more}")
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

    def _failing(self, chosen: Mapping[str, Iterable[int]], problem: str) -> dict[str, str]:
        """The layers whose components cannot go, and why: by halves, since most can.

        Of layers at the same place in modules of one class, all are left whole where three of them must be.

        Args:
            problem: with all of them together.
        """
        layers = sorted(chosen, key=self._role)
        if len(layers) < 2:
            return dict.fromkeys(layers, problem)
        first, middle, last = layers[0], layers[len(layers) // 2], layers[-1]
        if len(layers) > 3 and self._role(first) == self._role(last):
            found = {layer: why for layer in (first, middle, last) if (why := self._trial({layer: chosen[layer]})[1])}
            if len(found) == 3:
                return dict.fromkeys(layers, found[first])
        found = {}
        for half in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
            some = {layer: chosen[layer] for layer in half}
            if why := self._trial(some)[1]:
                found |= self._failing(some, why)
        return found

    def _role(self, layer: str) -> tuple[str, str]:
        """The class of the module in which a layer stands, and its name there."""
        place, _, name = layer.rpartition(".")
        return type(self.shadow.get_submodule(place)).__name__, name

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

    def _group(self, key: _Key, rows: list[int]) -> list[_Members]:
        """What goes with each of these channels, as torch-pruning has it; what several reach is with the first."""
        from torch_pruning._helpers import _HybridIndex

        layer, side = key
        module = self.shadow.get_submodule(layer)
        pruner = self.graph.get_pruner_of_module(module)
        function = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        found: dict[int, _Members] = {row: {} for row in rows}
        reached: dict[tuple[Any, Any], set[int]] = {}  # node and what is done to it -> channels
        # torch-pruning's own walk merges lists of indices node by node, which takes long for wide layers.
        stack = [(self.graph.module2node[module], function, [_HybridIndex(idx=row, root_idx=row) for row in rows])]
        while stack:
            node, function, indices = stack.pop()
            known = reached.setdefault((node, function), set())
            new = {entry.idx: entry for entry in reversed(indices) if entry.idx not in known}
            if not new:
                continue
            known.update(new)
            for place in self._places(node, function, layer):
                for index in sorted(new):
                    found[new[index].root_idx].setdefault(place, []).append(index)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function):
                    mapped: Any = [new[index] for index in sorted(new)]
                    for mapping in dependency.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    stack.append((dependency.target, dependency.handler, mapped))
        self.nodes.setdefault(key, set()).update(node for node, _ in reached)
        return list(found.values())

    def _places(self, node: Any, function: Any, layer: str) -> list[_Key]:
        """What a node of torch-pruning's graph stands for; on the way of a layer's channels."""
        place = self._place(node, function, layer)
        if place is not None and isinstance(node.module, nn.MultiheadAttention):
            # It reads channels of a stream and gives as many; torch-pruning takes the heads along, which can stay.
            return [(place[0], "in"), (f"{place[0]}.out_proj", "out")]
        return [] if place is None else [place]

    def _place(self, node: Any, function: Any, layer: str) -> _Key | None:
        from torch_pruning.ops import OPTYPE

        if id(node.module) in self.trace.doubtful:
            what, where = self.trace.doubtful[id(node.module)]
            self.doubtful.setdefault(layer, {})[what] = where
        if id(node.module) in self.trace.opaque:
            return self.trace.opaque[id(node.module)], _OPAQUE
        if node.type == OPTYPE.OUTPUT:
            return self.trace.outputs[id(node.module)], _OUTPUT
        name = self.names.get(id(node.module))
        if name is None:
            return None
        if isinstance(node.module, nn.Parameter):
            return name, node.pruning_dim
        layer_like = width_of(node.module) is not None or isinstance(node.module, nn.RNNBase)
        if not layer_like or _is_depthwise(node.module):
            return name, "through"
        return name, "out" if self.graph.is_out_channel_pruning_fn(function) else "in"

    def _own(self, layer: str) -> _Key:
        return layer, "through" if _is_depthwise(self.shadow.get_submodule(layer)) else "out"

    def _parts(self, key: _Key) -> list[_Members]:
        """What goes with each channel on one side of a layer; those that can only go together are one."""
        if key in self.parts:
            return self.parts[key]
        rows = range(self._size(key))
        found = self._group(key, [0])
        if (several := found[0][key]) != [0]:
            found = self._alike(key, several) or found
            left = set(rows).difference(*(part[key] for part in found))
            while left:
                found += self._group(key, [min(left)])
                left -= {min(left), *found[-1][key]}
        else:
            found = self._group(key, list(rows))
            for other in {other for part in found for other in part if other[1] == "out"}:
                # The same channels in another layer: what was slow to find need not be found again.
                if [part.get(other) for part in found] == [[row] for row in range(self._size(other))]:
                    self.parts[other], self.nodes[other] = found, self.nodes[key]
        self.parts[key] = found
        return found

    def _alike(self, key: _Key, first: list[int]) -> list[_Members]:
        """All components at once, if they lie as far apart as the first one's channels (gates and values of one layer);
        empty if they do not."""
        left = dict.fromkeys(range(self._size(key)))
        roots = []
        while left:
            root = next(iter(left))
            if any(root + index not in left for index in first):
                return []
            for index in first:
                del left[root + index]
            roots.append(root)
        found = self._group(key, roots)
        sizes = {place: len(gone) for place, gone in found[0].items()}
        alike = all(
            part[key] == [root + index for index in first]
            and {place: len(gone) for place, gone in part.items()} == sizes
            for root, part in zip(roots, found, strict=True)
        )
        return found if alike else []

    def _members_of(self, layer: str) -> list[_Members]:
        """For each component of a layer what goes with it; a component is the rows that can only go together.

        Channels of one group of a convolution, or of a norm, go together, and take what is on its other side with them.
        """
        if layer in self.members:
            return self.members[layer]
        own = self._own(layer)
        parts = self._parts(own)
        sides: set[_Key] = {own}
        beside: list[_Members] = []
        while more := self._sides([*parts, *beside]) - sides:
            for side in sorted(more):
                beside += self._parts(side)
                self.nodes[own] |= self.nodes[side]
            sides |= more
        if any(map(self._width_of_group, {key for part in (*parts, *beside) for key in part})):
            around = frozenset(sides - {own})  # which the other layers of a stream have as well
            if around not in self.joined:
                self.joined[around] = _joined(beside, self._width_of_group)
            parts = _joined([*self.joined[around], *parts], self._width_of_group)
            parts = [part for part in parts if own in part]
            parts.sort(key=lambda part: part[own])
        self.members[layer] = parts
        return parts

    def _sides(self, parts: Iterable[_Members]) -> set[tuple[str, str]]:
        """Both sides of the convolutions in groups among these."""
        keys = {key for part in parts for key in part if key[1] in ("in", "out")}
        names = {key[0] for key in keys if self._width_of_group(key) and not self._problem(key)}
        return {(name, side) for name in names for side in ("in", "out")}

    def _width_of_group(self, key: _Key) -> int:
        """How many channels next to each other make a group there; 0 where there are no groups."""
        if key not in self.widths:
            module = self._module(key)
            groups = 0 if module is None else _groups_of(module)
            self.widths[key] = self._size(key) // groups if groups else 0
        return self.widths[key]

    def _is_stream(self, layer: str, members: list[_Members]) -> bool:
        """Whether several layers add to its channels; a layer that is multiplied with another, or added to what is made
        of itself, does not."""
        own = self._own(layer)
        nodes = self.nodes[own]
        produced = {name for part in members[:1] for name, role in part if role == "out"}
        behind: dict[Any, set[str]] = {}

        def producers(node: Any) -> set[str]:
            """Layers whose channels a node passes on."""
            found, stack, seen = set[str](), [node], set[Any]()
            while stack:
                one = stack.pop()
                if one in seen or one not in nodes:
                    continue
                seen.add(one)
                name = self.names.get(id(one.module))
                if isinstance(one.module, nn.MultiheadAttention):
                    name = f"{name}.out_proj"
                if name in produced:
                    found.add(name)
                elif one in behind:
                    found |= behind[one]
                elif width_of(one.module) is None or _is_depthwise(one.module):
                    stack += one.inputs
            behind[node] = found
            return found

        for node in nodes:
            if node.grad_fn is None or id(node.module) in self.names or _NO_SUMS.match(node.grad_fn.name()):
                continue
            added = [found for source in node.inputs if (found := producers(source))]
            if any(one.isdisjoint(other) for one, other in itertools.combinations(added, 2)):
                return True
        return False

    def _places_of_attention(self) -> dict[str, str]:
        """The layers in modules that count heads, each with the innermost of these."""
        multihead = nn.MultiheadAttention  # whose own layer reads heads alone
        modules = {n: module for n, module in self.shadow.named_modules() if not isinstance(module, multihead)}
        counts = [name for name, module in modules.items() if _count_of_heads(module)]
        return {
            name: max(around, key=len)
            for name, module in self.shadow.named_modules()
            if name in self.order
            and (isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1))
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
                edge = [size // count - 1, size // count]  # between the first two heads, where they lie one by one
                probes[place] += [((name, "out"), start) for start in dict.fromkeys((*_starts(size, count), *edge))]
        for name, place in places.items():  # one number per head, from a module that counts them as well
            outer = [
                n for n in counts if _is_inside(place, n) and n != place and self._size((name, "out")) == counts[n]
            ]
            for other in outer:
                probes[other].append(((name, "out"), 0))
        rows = {place: {self._size(key) for key, _ in found} for place, found in probes.items()}
        for name, tensor in self.tensors.items():
            owner = name.rpartition(".")[0]
            module = self.shadow.get_submodule(owner)
            if isinstance(module, nn.MultiheadAttention) and owner in counts and owner not in self.shared:
                probes[owner] += [((name, 0), start) for start in _starts(len(tensor), counts[owner])]
            elif module2type(module) == OPTYPE.ELEMENTWISE and tensor.is_floating_point():
                around = [place for place in counts if _is_inside(name, place)]
                beside = [place for place in counts if _is_inside(name, place.rpartition(".")[0])]
                for place in around or beside:  # tables of biases may belong to the block
                    dims = [dim for dim, size in enumerate(tensor.shape) if size == counts[place]]
                    if tensor.ndim == 1 and place in around:  # biases that layers are handed
                        dims = [0] if len(tensor) in rows[place] | {s // 3 for s in rows[place]} else dims
                    probes[place] += [((name, dim), 0) for dim in dims]
        reached: dict[_Probe, dict[str, list[int]]] = {}
        depths = {place: sum(_is_inside(place, other) for other in counts) for place in counts}
        for depth in set(depths.values()):  # one in another reaches the same
            here = [probes[place] for place in counts if depths[place] == depth]
            for turn in range(max(map(len, here))):
                now = [found[turn] for found in here if turn < len(found)]
                try:
                    reached |= dict.fromkeys(now, self._reached(now))
                except Exception:  # whatever a model makes of NaN
                    return [], places
        heads = {place: self._heads_of(place, probes[place], reached, count) for place, count in counts.items()}
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
        self, place: str, probes: list[_Probe], reached: Mapping[_Probe, Mapping[str, list[int]]], count: int
    ) -> _Heads | None:
        """Heads, if what the probes reach in one layer is what they reach in attention."""
        readers: dict[str, list[_Probe]] = {}
        for probe in probes:
            (name, role), index = probe
            if role == "out" and index not in _starts(self._size(probe[0]), count):
                continue
            owner = name.rpartition(".")[0] if isinstance(role, int) else name
            start = self.order.get(owner, self._turn(place))  # tables may be read without a call of their module
            for reader in sorted((name for name in reached[probe] if self._turn(name) > start), key=self._turn):
                size = self._size((reader, "in"))
                head = [list(range(size // count)), list(range(0, size, count))]  # one by one, or interleaved
                if size % count == 0 and reached[probe][reader] in ([0], *head):
                    readers.setdefault(reader, []).append(probe)
                    break
        for reader, found in readers.items():
            size = self._size((reader, "in"))
            width = size // count

            def one_by_one(key: _Key, reader: str = reader, width: int = width) -> bool:
                """Whether queries, keys and values of one layer lie together for each head."""
                edge = self._size(key) // count
                seen = [reached.get((key, index), {}).get(reader) for index in (0, edge - 1, edge)]
                return width > 1 and seen == [list(range(width)), [width - 1], list(range(width, 2 * width))]

            channels = torch.arange(size)
            apart = width > 1 and any(reached[probe][reader][1:2] == [count] for probe in found)
            channels = channels.view(-1, count).T if apart else channels.view(count, -1)
            blocks: dict[_Key, Tensor] = {(reader, "in"): channels}
            values, parts = [], 0
            for key, start in found:
                rows = torch.arange(self._size(key))
                if key[1] == "out" and one_by_one(key):
                    blocks[key] = rows.view(count, -1)
                    parts += 3
                    values.append(key[0])
                    continue
                gives = key[1] == "out" or key[0].startswith(tuple(f"{place}.{name}" for name in _PROJECTIONS))
                fused = len(rows) // size if gives or key[0].startswith(f"{place}.in_proj") else 1
                if len(rows) not in (size, 2 * size, 3 * size):
                    fused = 1
                if gives and not all((key, part * size) in found for part in range(fused)):
                    return None
                blocks[key] = rows.view(fused, count, -1).transpose(0, 1).flatten(1)
                if gives:
                    parts += 1
                    if len(reached[key, start][reader]) == 1 and len(rows) == fused * size:
                        values.append(key[0] if key[1] == "out" else place)
            for key in [key for key in blocks if key[1] == "out"]:
                if norm := self._batch_norm_behind(key[0]):
                    blocks[norm, "through"] = blocks[key]
            if parts >= 3 and values:
                members = [{key: block[head].tolist() for key, block in blocks.items()} for head in range(count)]
                return self._with_spec(_Heads(place, min(values, key=self._turn), reader, size // count, members))
        return None

    def _with_spec(self, heads: _Heads) -> _Heads:
        """With what the attention's forward must be told, where it takes the heads' width for that of its input."""
        module = self.shadow.get_submodule(heads.place)
        if isinstance(module, nn.MultiheadAttention):
            place, layers = heads.place, []
        else:
            layers = [name for name, role in heads.members[0] if role == "out"]
            place = _common(layers)
            module = self.shadow.get_submodule(place)
        if not _is_inside(heads.reader, place) or place not in self._given:
            return heads
        own = [name.removeprefix(f"{place}.") if place else name for name in (*layers, heads.reader)]
        changes = self._head_attributes(heads, heads.width)
        attributes = {attribute: value for (name, attribute), (_, value) in changes.items() if name == place}
        last = not isinstance(self.shadow.get_submodule(heads.reader), _ConvNd)
        try:
            spec = attention.spec_of(module, own[:-1], own[-1], self._given[place], last, attributes)
        except Exception as error:  # whatever: its own forward may do, or the trial shows that it does not
            where = place or "the model"
            return replace(
                heads, why=f"; where {where} takes the heads' width for that of its input, write -1: {error}"
            )
        return heads if spec is None else replace(heads, spec=(place, spec))

    @cached_property
    def _given(self) -> dict[str, dict[str, Any]]:
        """Modules that have others inside -> the arguments of their forward in the last call."""
        given: dict[str, dict[str, Any]] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(TypeError, ValueError):  # a forward without a signature
                given[name] = attention.arguments_of(module, args, kwargs)

        handles = [
            module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            for name, module in self.shadow.named_modules()
            if next(module.children(), None) is not None and not isinstance(module, torch.jit.ScriptModule)
        ]
        with hooked(handles), undisturbed(self.shadow):
            call(self.shadow, self.inputs)
        return given

    def _batch_norm_behind(self, layer: str) -> str | None:
        """The batch norm that reads a layer's rows, perhaps in another shape."""
        module = self.shadow.get_submodule(layer)
        nodes = [self.graph.module2node[module]] if module in self.graph.module2node else []
        while nodes:
            nodes = [node for before in nodes for node in before.outputs]
            for node in nodes:
                if isinstance(node.module, _BatchNorm) and node.module.num_features == self._size((layer, "out")):
                    return str(self.names[id(node.module)])
            nodes = [node for node in nodes if id(node.module) not in self.names and _SHAPES.match(node.grad_fn.name())]
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
        if isinstance(module, nn.MultiheadAttention):
            return self._judge_multihead(layer, module)
        if isinstance(self.shadow.get_submodule(layer.rpartition(".")[0]), nn.MultiheadAttention):
            return None, f"what it gives is what {layer.rpartition('.')[0]} gives, in a stream"
        if layer in self.trace.trained:
            return None, "it runs in train mode alone, so that nothing shows what its components are worth"
        if layer not in self.order:
            return None, "it does not run on the example inputs, or not by a call of its module"
        if module not in self.graph.module2node:
            return None, "torch-pruning's trace does not reach it"
        own = self._own(layer)
        if why := self._problem(own):
            return None, why
        for heads in self.heads:
            if heads.layer == layer:
                rows = tuple(tuple(members[own]) for members in heads.members)
                others = tuple(name for name, role in heads.members[0] if role == "out" and name != layer)
                return Components(layer, "heads", rows, (layer,), others), ""
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
        shared = [name for name, role in keys if role == "out" and name != layer]
        read = any(role == "in" for _, role in keys)
        alone = read and not shared and len(members) == self._size(own)
        if place is not None and not alone and all(self.unclear.get(other) == place for other in shared):
            return None, unclear
        for key in keys:
            if why := self._problem(key):
                if key[1] == "out":
                    why = f"{_shares(shared)}, of which {key[0]} must stay: {why}"
                return None, why
        if cut := [why for why, role in keys if role == _OPAQUE]:
            return None, cut[0]
        outputs = [name for name, role in keys if role == _OUTPUT and self._stays(name)]
        if not read and outputs:
            return None, self._changes(min(outputs, key=lambda place: place.endswith(IN_TRAINING)))
        if not read:
            return None, f"no layer reads its channels{self._on_the_way(layer)}"
        if outputs and (why := self._reshaped(members[0])):
            return None, why
        if not self._is_even(members) or len(members) == 1 < self._size(own):
            why = f"{_shares(shared)}, not channel by channel" if shared else _FOLDED
            return None, f"{why}{self._on_the_way(layer)}"
        kind = "filters" if isinstance(module, _ConvNd) else "neurons"
        if shared and self._is_stream(layer, members):
            kind = "stream"
        rows = tuple(tuple(sorted(part[own])) for part in members)
        layers = tuple(name for name, role in keys if role == "out" or (name, role) == own)
        through = [name for name, role in keys if role == "through" and name != layer]
        followers = tuple(name for name in through if width_of(self.shadow.get_submodule(name)) is not None)
        return Components(layer, kind, rows, layers, followers), ""

    def _judge_multihead(self, layer: str, module: nn.MultiheadAttention) -> tuple[Components | None, str]:
        for heads in self.heads:
            if heads.layer == layer:
                if heads.spec is None:
                    return None, "its forward insists on its width"
                channels = tuple(tuple(part[heads.reader, "in"]) for part in heads.members)
                return Components(layer, "heads", channels, (layer,)), ""
        if layer in self.shared:
            return None, "its parameters are shared"
        why = why_not_explicit(module) or "it has one head alone, or what its heads reach cannot be told apart"
        return None, why

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
            if name in self.shared or not module._qkv_same_embed_dim or why_not_explicit(module):
                why = why_not_explicit(module) or "its parameters are shared, or keys have a width of their own"
                return f"it feeds {name}, a MultiheadAttention that must stay as it is: {why}"
            return ""
        if isinstance(module, nn.RNNBase) and role != "in":
            return f"it feeds {name}, a {type(module).__name__}, which can lose inputs alone"
        if isinstance(module, nn.RNNBase):
            return f"it feeds {name}, whose parameters are shared" if name in self.shared else ""
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return "a layer norm over several axes follows it"
        computed = getattr(module, "weight", None) is not None and "weight" not in module._parameters
        if width_of(module) is None:
            return "a norm follows it whose weight is computed or shared" if computed or name in self.shared else ""
        if computed or name in self.shared:
            what = "weight is computed" if computed else "parameters are shared"
            return f"its {what}" if role == "out" else f"it feeds {name}, whose {what}"
        odd = isinstance(module, _ConvNd) and (module.transposed or module.groups == module.out_channels)
        # torch-pruning takes a convolution that has as many groups as outputs for a depthwise one.
        if self._differs_alone(key):
            feeds = f"feeds {name}," if role == "in" else "is"
            return f"it {feeds} a {type(module).__name__} that works otherwise without some of its channels"
        if isinstance(module, _ConvNd) and odd and _groups_of(module):
            return f"{'it is' if role == 'out' else 'it feeds'} a {_described(module)}, which cannot be cut"
        return ""

    def _differs_alone(self, key: _Key) -> bool:
        """Whether a layer with a forward of its own gives something else without a channel than with it hidden: weights
        that are standardised over their inputs do."""
        if key not in self.differs:
            module, side = self.shadow.get_submodule(key[0]), key[1]
            self.differs[key] = not (is_own(module) or _groups_of(module) or self._size(key) < 2) and _differs(
                module, side == "in", self.graph.get_pruner_of_module(module)
            )
        return self.differs[key]

    def _why_not_alone(self, components: Components) -> str:
        """Why components of a kind that was not asked for are left."""
        if components.kind != "stream":
            return f"its components are {components.kind}, which are not among those to remove"
        return _shares([name for name in components.layers if name != components.layer])

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
        changes: dict[tuple[str, str], tuple[Any, Any]] = {}
        copies: dict[str, nn.Module] = {}
        for (name, role), gone in removed.items():
            if role == _OUTPUT:
                continue
            if isinstance(role, int):
                owner, size = name.rpartition(".")[0], self._size((name, role))
                index = _left(size, gone)
                keeps.append(Operation("keep", name, dim=role, index=tuple(index)))
                for attribute, shape in _sizes(self.model.get_submodule(owner)).items():
                    if isinstance(shape, list) and size in shape:  # of a norm, or of a view; heads come last there
                        place = len(shape) - 1 - shape[::-1].index(size)
                        changes[owner, attribute] = (shape, [*shape[:place], len(index), *shape[place + 1 :]])
                continue
            if name not in copies:
                copies[name] = _tagged(self.model.get_submodule(name))
            module = copies[name]
            if _groups_of(module) and not _is_depthwise(module):
                if role != "in":  # both sides at once
                    _cut_groups(module, gone, removed.get((name, "in"), gone))
                continue
            _cut_further(module, role, gone)
            if isinstance(module, nn.MultiheadAttention):
                module.in_proj_weight.data = module.in_proj_weight.data[:, _left(module.embed_dim, gone)]
                module.embed_dim -= len(gone)
                module.kdim = module.vdim = module.embed_dim
                continue
            pruner = self.graph.get_pruner_of_module(module)
            (pruner.prune_in_channels if role == "in" else pruner.prune_out_channels)(module, gone)
        for name, module in copies.items():
            original = self.model.get_submodule(name)
            for tensor, left in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                keeps += _kept(f"{name}.{tensor}", _tags(getattr(original, tensor)), left.detach())
            before, after = _sizes(original), _sizes(module)
            changes |= {(name, key): (before[key], after[key]) for key in before if before[key] != after[key]}
        for heads in self.heads:
            if (heads.reader, "in") in removed:
                changes |= self._head_attributes(heads, len(removed[heads.reader, "in"]))
            layers = {name for name, role in heads.members[0] if role == "out"}
            # Without channels of its input, its width is no longer that of all heads either.
            if heads.spec is not None and any(key[1] == "in" and key[0] in (heads.reader, *layers) for key in removed):
                changes |= self._forward_changes(*heads.spec)
        for name, module in copies.items():
            if isinstance(module, nn.MultiheadAttention):
                changes |= self._forward_changes(name, {"reader": "out_proj"})
        return keeps + [
            Operation("attribute", module, name=attribute, before=before, value=value)
            for (module, attribute), (before, value) in changes.items()
        ]

    def _forward_changes(self, name: str, spec: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
        """What gives attention a forward of another width, and keeps torch's encoders from doing without it."""
        changes: dict[tuple[str, str], tuple[Any, Any]] = {}
        for place in [name[:i] for i, letter in enumerate(name) if letter == "."]:
            around = self.model.get_submodule(place)
            if isinstance(around, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
                for inner, layer in around.named_modules(prefix=place):
                    # 0: neither relu nor gelu, so that its fast path, which knows one width alone, is not taken.
                    if isinstance(layer, nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu:
                        changes[inner, "activation_relu_or_gelu"] = (layer.activation_relu_or_gelu, 0)
        changes[name, "forward"] = (attention.forward_of(self.model.get_submodule(name)), spec)
        return changes

    def _head_attributes(self, heads: _Heads, gone: int) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Counts of heads and their joint width, kept by the attention's module or those in it."""
        names = [name for name, role in heads.members[0] if not isinstance(role, int)]
        common = _common([*names, f"{heads.place}."] if heads.layer == heads.place else names)
        count = len(heads.members)
        found: dict[tuple[str, str], tuple[Any, Any]] = {}
        for name, module in self.model.get_submodule(common).named_modules(prefix=common):
            for attribute, value in vars(module).items():
                if attribute.startswith("_"):
                    continue
                if isinstance(value, tuple) and value[-1:] == (count,) and attribute.endswith("shape"):  # of biases
                    found[name, attribute] = (list(value), [*value[:-1], count - gone // heads.width])
                if type(value) is not int:
                    continue
                if value == count and attribute.endswith("heads"):
                    found[name, attribute] = (value, value - gone // heads.width)
                elif value == count * heads.width and attribute in _JOINT:
                    found[name, attribute] = (value, value - gone)
        return found

    @cached_property
    def _reference(self) -> _Reference:
        try:
            model, inputs = copy.deepcopy(self.model).double(), _double(self.inputs)
            return _Reference(model, inputs, _outputs(model, inputs, self.known.branches), 1e-9)
        except Exception:
            model = copy.deepcopy(self.model)
            return _Reference(model, self.inputs, _outputs(model, self.inputs, self.known.branches), 1e-2)

    def _hidden(self, gone: Mapping[_Key, list[int]], smaller: nn.Module) -> dict[str, Tensor]:
        """What the model gives with components hidden from their readers.

        What works across channels, as norms do, is that of the smaller model, on the channels that are left.
        """
        model = self._reference.model
        with ExitStack() as stack:
            for (name, role), lost in gone.items():
                if role == "in":
                    module = model.get_submodule(name)
                    several = 3 if isinstance(module, nn.MultiheadAttention) else 1
                    handle = module.register_forward_pre_hook(
                        _hiding(lost, _channel_axis(module), several), with_kwargs=True
                    )
                    stack.callback(handle.remove)
            for name, lost in self._across(gone).items():
                stack.enter_context(_narrow(model.get_submodule(name), smaller.get_submodule(name), lost))
            return _outputs(model, self._reference.inputs, self.known.branches)

    def _across(self, gone: Mapping[_Key, list[int]]) -> dict[str, list[int]]:
        """Modules that may normalise across the channels that they lose, with these: norms, and what has no parts."""
        found: dict[str, list[int]] = {}
        for key, lost in gone.items():
            if key[1] != "through" and not isinstance(key[1], int):
                continue
            name = key[0] if key[1] == "through" else key[0].rpartition(".")[0]
            module = self.shadow.get_submodule(name)
            norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and not _groups_of(module)
            if norm or (key[1] != "through" and name in self.order and not list(module.children())):
                found[name] = lost
        return found

    @cached_property
    def _random(self) -> set[str]:
        """Outputs in train mode that chance changes, so that their values show nothing."""
        if not self.known.branches:
            return set()
        first, second = (_outputs(self._reference.model, self._reference.inputs, True, seed) for seed in (0, 1))
        same = {place for place, tensor in first.items() if _is_close(tensor, second.get(place), 1e-9)}
        return {place for place in first if place.endswith(IN_TRAINING) and place not in same}

    @cached_property
    def _trained(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of what the model gives in train mode; None when it does not run there."""
        try:
            return _shapes_in_training(copy.deepcopy(self._reference.model), self._reference.inputs)
        except Exception:
            return None

    def _on_the_way(self, layer: str) -> str:
        """What channels of a layer pass that torch-pruning follows as if it worked channel by channel."""
        found = list(self.doubtful.get(layer, ()))
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return f" (torch-pruning may not follow {', '.join(found[:2])}{more})" if found else ""

    @property
    def _main(self) -> str:
        """Where the logits stand in what the model gives, or the only output; empty when there is neither."""
        outputs = self.known.outputs
        return self.known.logits or (next(iter(outputs)) if len(outputs) == 1 else "")

    def _stays(self, place: str) -> bool:
        """Whether an output must keep its shape."""
        return self.keep_outputs or place.removesuffix(IN_TRAINING) == self._main

    def _left_of(self, place: str, whole: Tensor, shape: torch.Size, gone: Mapping[_Key, list[int]]) -> Tensor | None:
        """What is left of an output that loses channels; None where these are not what makes it smaller."""
        axes = [axis for axis, (one, other) in enumerate(zip(whole.shape, shape, strict=False)) if one != other]
        if not axes or self._stays(place):
            return whole
        left = _left(whole.shape[axes[0]], gone.get((place, _OUTPUT), ()))
        found = whole.index_select(axes[0], torch.tensor(left, device=whole.device))
        return found if found.shape == shape else None

    def _changes(self, place: str) -> str:
        if place == self._main:
            return "the model's output would change its shape"
        may = ", which keep_outputs=False allows" if self.op == "prune" and self.keep_outputs else ""
        return f"the model's {place} would change its shape{may}"

    def _reshaped(self, part: _Members) -> str:
        """Which output of the model one component less would change the shape of; empty when none."""
        try:
            operations = self._operations({key: sorted({*gone}) for key, gone in part.items()})
            smaller = reduced(self._reference.model, operations)
            after = _outputs(smaller, self._reference.inputs, self.known.branches)
        except Exception as error:
            return f"the model does not run without its channels: {error}"
        return self._reshapes(after)

    def _reshapes(self, after: Mapping[str, Tensor]) -> str:
        """Which output is another than the model's in its shape; empty when none."""
        before = self._reference.outputs
        changed = [p for p in before if p not in after or (self._stays(p) and before[p].shape != after[p].shape)]
        return self._changes(changed[0]) if changed or len(before) != len(after) else ""

    def _trial(self, chosen: Mapping[str, Iterable[int]]) -> tuple[list[Operation], str]:
        """The operations, and what is wrong with them; nothing is, when it is empty."""
        gone = self._removed(chosen)
        try:
            operations = self._operations(gone)
            smaller = reduced(self._reference.model, operations)
        except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
            return [], f"torch-pruning cannot remove its channels: {error}"
        try:
            removed = _outputs(smaller, self._reference.inputs, self.known.branches)
        except Exception as error:
            why = f"the model does not run without its channels: {error}"
            kept = self._kept_widths(gone, operations)
            if not kept:
                return [], why
            operations += kept
            try:
                smaller = reduced(self._reference.model, operations)
                removed = _outputs(smaller, self._reference.inputs, self.known.branches)
            except Exception:
                return [], why
        if why := self._reshapes(removed):
            return [], why
        try:
            hidden = self._hidden(gone, smaller)
        except Exception as error:
            return [], f"its channels cannot be hidden from the layers that read them: {error}"
        for place, whole in hidden.items():
            tensor = self._left_of(place, whole, removed[place].shape, gone)
            if tensor is None:
                return [], self._changes(place)
            if place not in self._random and not _is_close(tensor, removed[place], self._reference.tolerance):
                which = "" if place == self._main else f" (the model's {place} differs)"
                return [], f"removing its channels is not the same as hiding them from the layers that read them{which}"
        return ([], why) if (why := self._problem_in_training(smaller)) else (operations, "")

    def _kept_widths(self, gone: Mapping[_Key, list[int]], operations: list[Operation]) -> list[Operation]:
        """Changes of what modules around the layers, or on the way of their channels, keep of these: numbers, by which
        they may reshape, and buffers, such as the filters of a blur."""
        known = {(operation.target, operation.name) for operation in operations}
        widths: dict[int, set[int]] = {}
        around = {""}
        buffers: dict[str, Operation] = {}
        for key, lost in gone.items():
            if key[1] == "out":
                size = self._size(key)
                widths.setdefault(size, set()).add(size - len(lost))
                around |= {key[0][:i] for i, letter in enumerate(key[0]) if letter == "."}
                for place in {*self.doubtful.get(key[0], {}).values()} - {""}:
                    for name, buffer in self.model.get_submodule(place).named_buffers(place, recurse=False):
                        if buffer.ndim and len(buffer) == size:
                            around.add(place)
                            buffers[name] = Operation("keep", name, index=tuple(_left(size, lost)))
        return [*buffers.values()] + [
            Operation("attribute", place, name=name, before=value, value=min(widths[value]))
            for place in sorted(around)
            for name, value in vars(self.model.get_submodule(place)).items()
            if type(value) is int and len(widths.get(value, ())) == 1 and _WIDTH.search(name)
            if not name.startswith("_") and (place, name) not in known
        ]

    def _problem_in_training(self, smaller: nn.Module) -> str:
        """Why a smaller model does not run in train mode as the model itself does; empty when it does, or neither."""
        shapes: dict[str, tuple[int, ...]] = {}
        problem = ""
        try:
            shapes = _shapes_in_training(smaller, self._reference.inputs)
            if self.known.training is not None and shapes == self.known.training.outputs:
                return ""
        except Exception as error:
            problem = f"the model does not run in train mode without its channels: {error}"
        if self._trained is None or problem:
            return "" if self._trained is None else problem
        changed = [
            p for p, shape in self._trained.items() if p not in shapes or (shapes[p] != shape and self._stays(p))
        ]
        return self._changes(f"{changed[0]}{IN_TRAINING}") if changed else ""


def unseen_message(op: str, unseen: Mapping[str, Iterable[str]]) -> str:
    """What to say of modules that did not run, as `Graph.unseen` gives them."""
    them = _some([f"{module} as many as {_some(sorted(layers), ', ')}" for module, layers in unseen.items()], "; ")
    return (
        f"{op}: example_inputs must run all that is used, in eval or in train mode: whether what does not run reads "
        "channels that were removed, and then no longer fits, cannot be seen. These did not run and read as many "
        f"channels as layers that lost some: {them}. If they are used, leave these layers whole or give inputs on "
        "which they run."
    )


def _starts(size: int, count: int) -> list[int]:
    """The first rows of what may be queries, keys and values of some heads in one tensor, or two of them."""
    parts = [parts for parts in (1, 2, 3) if size % (parts * count) == 0]
    return sorted({size // n * part for n in parts for part in range(n)})


def _common(names: list[str]) -> str:
    """The innermost module in which all of these are."""
    paths = [name.split(".")[:-1] for name in names]
    return ".".join(first[0] for first in itertools.takewhile(lambda s: len(set(s)) == 1, zip(*paths, strict=False)))


def _some(names: list[str], separator: str) -> str:
    more = [f"{len(names) - 3} more"] if len(names) > 4 else []
    return separator.join(names[:3] + more if more else names)


def _shares(others: list[str]) -> str:
    if not others:
        return "its channels are tied to a parameter outside any layer"
    more = f" and {len(others) - 1} more layers" if len(others) > 1 else ""
    return f"it shares its channels with {min(others)}{more}"


def _is_inside(name: str, place: str) -> bool:
    return not place or name.startswith(f"{place}.")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _left(size: int, gone: Iterable[int]) -> list[int]:
    return sorted(set(range(size)) - set(gone))


def _groups_of(module: nn.Module) -> int:
    """How many groups of channels a convolution or norm works on, each by itself; 0 where all go together, or none."""
    if isinstance(module, nn.GroupNorm):
        groups: int = module.num_groups
    elif isinstance(module, _ConvNd):
        groups = 0 if _is_depthwise(module) else module.groups
    else:
        return 0
    return groups if groups > 1 else 0


def _described(module: _ConvNd) -> str:
    return (
        f"{type(module).__name__} from {module.in_channels} to {module.out_channels} channels in {module.groups} groups"
    )


def _joined(parts: Iterable[_Members], width_of_group: Callable[[_Key], int]) -> list[_Members]:
    """Components that share channels, or reach the same group of channels, on whichever side, made one."""
    parts = list(parts)
    leader = list(range(len(parts)))  # of what goes together, as far as is known; a part leads to itself in the end

    def led_by(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    owners: dict[Any, dict[int, int]] = {}  # where -> channel, or group of channels -> a part that has it
    for number, part in enumerate(parts):
        for key, gone in part.items():
            width = width_of_group(key)
            known = owners.setdefault((key[0], "group") if width else key, {})
            for place in {index // width for index in gone} if width else gone:
                leader[led_by(known.setdefault(place, number))] = led_by(number)
    found: dict[int, dict[_Key, set[int]]] = {}
    for number, part in enumerate(parts):
        mine = found.setdefault(led_by(number), {})
        for key, gone in part.items():
            mine.setdefault(key, set()).update(gone)
    return [{key: sorted(gone) for key, gone in part.items()} for part in found.values()]


def _cut_groups(module: nn.Module, gone: list[int], read: list[int]) -> None:
    """Removes whole groups of channels.

    Args:
        gone: output channels. read: input channels.
    """
    groups = _groups_of(module)
    if isinstance(module, nn.GroupNorm):
        outputs = inputs = module.num_channels
    else:
        assert isinstance(module, _ConvNd)
        outputs, inputs = module.out_channels, module.in_channels
    left = _left(outputs, gone)
    cut = {i // (outputs // groups) for i in gone}
    if cut != {i // (inputs // groups) for i in read} or len(gone) * groups != len(cut) * outputs:
        raise ValueError(f"{type(module).__name__} in {groups} groups can only lose whole ones, not outputs {gone}")
    for tensor in module.parameters(recurse=False):
        tensor.data = tensor.data[left]
    if isinstance(module, nn.GroupNorm):
        module.num_channels, module.num_groups = len(left), groups - len(cut)
    else:
        module.out_channels, module.in_channels = len(left), inputs - inputs // groups * len(cut)
        module.groups = groups - len(cut)


def _cut_further(module: nn.Module, role: str, gone: list[int]) -> None:
    """Removes channels from what a subclass of a layer has beside weight and bias, such as gains of filters."""
    if width_of(module) is None:
        return
    linear = isinstance(module, nn.Linear)
    size = getattr(module, f"{'in' if role == 'in' else 'out'}_{'features' if linear else 'channels'}")
    left = _left(size, gone)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        axis = int(role == "in")
        if name not in ("weight", "bias") and tensor.ndim > axis and tensor.shape[axis] == size:
            tensor.data = tensor.data.index_select(axis, torch.tensor(left, device=tensor.device))


def _differs(module: nn.Module, reads: bool, pruner: Any) -> bool:
    """Whether a layer without its first channel gives something else than with it hidden, on numbers drawn for it."""
    smaller = copy.deepcopy(module)
    axis = _channel_axis(module)
    try:
        _cut_further(smaller, "in" if reads else "out", [0])
        (pruner.prune_in_channels if reads else pruner.prune_out_channels)(smaller, [0])
        x = input_of(module)
        with undisturbed(module), undisturbed(smaller):
            if reads:
                without = smaller(x.narrow(axis, 1, x.shape[axis] - 1))
                hidden = module(x.index_fill(axis, torch.tensor([0], device=x.device), 0))
            else:
                without, hidden = smaller(x), module(x)
                hidden = hidden.narrow(axis, 1, hidden.shape[axis] - 1)
    except Exception:  # whatever a forward of somebody's own may need: the removal as a whole will show
        return False
    return not _is_close(without, hidden, ROUNDING * torch.finfo(x.dtype).eps)


def _channel_axis(module: nn.Module) -> int:
    return 1 - int(module.weight.ndim) if isinstance(module, _ConvNd) else -1


def _count_of_heads(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention) and why_not_explicit(module):
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


def _outputs(model: nn.Module, inputs: Any, branches: bool, seed: int | None = None) -> dict[str, Tensor]:
    """What a model gives.

    Args:
        branches: whether to run what train mode alone runs as well.
        seed: of chance; as it is outside, when it is not given.
    """
    with undisturbed(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model: it gave them when it was traced
        if seed is not None:
            torch.manual_seed(seed)
        found = dict(tensors_in(call(model, inputs)))
        if branches:
            with training_branches(model):
                found |= {f"{place}{IN_TRAINING}": tensor for place, tensor in tensors_in(call(model, inputs))}
    # Parameters may be among them, and what the model changes in place when it runs again.
    return {place: tensor.detach().clone() for place, tensor in found.items()}


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


def _hiding(channels: list[int], dim: int, several: int) -> Any:
    """A hook that hides channels of the first few arguments, or of those that have their names."""

    def without(x: Tensor) -> Tensor:
        return x.index_fill(dim, torch.tensor(channels, device=x.device), 0)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {name: without(value) if name in _INPUTS else value for name, value in kwargs.items()}
        return (*map(without, args[:several]), *args[several:]), named

    return hook


@contextmanager
def _narrow(module: nn.Module, smaller: nn.Module, gone: list[int]) -> Iterator[None]:
    """Has a module of fewer channels work in a module's place, on the channels that are left; the others are zero."""
    whole, own, before = module.forward, is_own(module), vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        axis = _axis_of_channels(module, whole, args, kwargs)
        if axis is None:
            return whole(*args, **kwargs)
        x, *rest = args
        left = torch.tensor(_left(x.shape[axis], gone), device=x.device)
        if not own and not _treats_channels_alike(module, partial(whole, **kwargs), axis, x, *rest):
            raise ValueError(f"{type(module).__name__} takes channels by their place")
        given: Tensor = smaller(x.index_select(axis, left), *rest, **kwargs)
        return given.new_zeros(x.shape).index_copy(axis, left, given)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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
    return _is_close(other, whole.index_select(axis, order), ROUNDING * torch.finfo(x.dtype).eps)


def _axis_of_channels(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """Along which a module's first parameter lies in what it gives: a NaN in it shows where; None if nowhere."""
    if not args or not isinstance(args[0], Tensor):
        return None
    x, *rest = args
    parameter = next((p for p in module.parameters() if p.ndim), None)
    if parameter is None:
        return 1 if isinstance(module, nn.GroupNorm) else x.ndim - 1
    first = tuple(0 for _ in parameter.shape)
    before = parameter.data[first].clone()
    parameter.data[first] = math.nan
    try:
        nan = forward(torch.ones_like(x), *rest, **kwargs).isnan()
    finally:
        parameter.data[first] = before
    if nan.shape != x.shape:
        return None
    for axis in range(1, x.ndim):
        if nan.select(axis, 0).all() and not nan.narrow(axis, 1, nan.shape[axis] - 1).any():
            return axis
    return None
