"""Channels that belong together: what goes with each channel of a layer, as torch-pruning's graph has it."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from discedit.graph.network import OPAQUE, OUTPUT, Key, Members, Network, channel_axis, groups_of, is_depthwise
from discedit.graph.removal import operations_of
from discedit.model.forward import frozen_eval
from discedit.model.functional import why_not_explicit
from discedit.model.layers import input_of, is_close, is_own
from discedit.model.trace import width_of
from discedit.recipes.recipe import reduced

# Operations of autograd's graph that are no sums of what they read; what is done in place on a view has no name there.
_NO_SUMS = re.compile("(Mul|Div|Where|Cat)Backward")


@dataclass(frozen=True)
class Components:
    """What can be removed from one place.

    Attributes:
        layer: the layer that the scores name.
        kind: "filters" (of a convolution), "neurons" (of a linear layer), "heads" (of attention), "stream" (channels to
            which several layers add); "qk", "vo" (dimensions within heads: of queries and keys, of values).
        rows: for each component the output rows of `layer` that make it up; of dimensions within heads, its number.
        layers: all layers that produce these channels, `layer` among them.
        followers: other layers whose rows go with them: depthwise convolutions, queries and keys of heads.
    """

    layer: str
    kind: str
    rows: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]
    followers: tuple[str, ...] = ()


class ChannelGroups:
    """What goes with the channels of each layer of a network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        # Layer -> what may not work channel by channel on its way, and the modules in which that stands.
        self.doubtful: dict[str, dict[str, str]] = {}
        self._members: dict[Key, list[Members]] = {}
        self._nodes: dict[Key, set[Any]] = {}  # of torch-pruning's graph, on the way of a layer's channels
        self._differing: dict[Key, bool] = {}

    def members_of(self, layer: str) -> list[Members]:
        """For each component of a layer what goes with it; a component is the rows that can only go together.

        Channels of one group of a convolution, or of a norm, go together, and take what is on its other side with them.
        """
        own = self.network.own(layer)
        if own not in self._members:
            found = self._members[own] = self._walk(own)
            for other in {other for part in found for other in part if other[1] == "out"}:
                # The same channels in another layer: what was slow to find need not be found again.
                if [part.get(other) for part in found] == [[row] for row in range(self.network.size(other))]:
                    self._members[other], self._nodes[other] = found, self._nodes[own]
        return self._members[own]

    def _walk(self, key: Key) -> list[Members]:
        """What goes with each channel on one side of a layer, as torch-pruning has it; those that meet are one."""
        from torch_pruning._helpers import _HybridIndex

        module, graph = self.network.model.get_submodule(key[0]), self.network.graph
        rows = range(self.network.size(key))
        leader = list(rows)  # of what goes together, as far as is known; a row leads to itself in the end

        def led_by(row: int) -> int:
            # Union-find with halved paths: rows that meet somewhere have one leader.
            while leader[row] != row:
                leader[row] = row = leader[leader[row]]
            return row

        reached: dict[tuple[Any, Any], dict[int, int]] = {}  # node and what is done to it -> channel -> from which row
        # torch-pruning's own walk merges lists of indices node by node, which takes long for wide layers.
        function = graph.get_pruner_of_module(module).prune_out_channels
        stack = [(graph.module2node[module], function, [_HybridIndex(row, row) for row in rows])]
        while stack:
            node, function, indices = stack.pop()
            known = reached.setdefault((node, function), {})
            new = []
            for channel, row in indices:
                if channel in known:
                    leader[led_by(row)] = led_by(known[channel])
                else:
                    known[channel] = row
                    new.append(_HybridIndex(channel, row))
            # Where nothing is new the walk ends, also in a graph with circles.
            if not new:
                continue
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function):
                    mapped: Any = new
                    for mapping in dependency.index_mapping:
                        mapped = mapping(mapped)
                    stack.append((dependency.target, dependency.handler, mapped))
            for other, channels in self._whole_groups(node, function, new).items():
                stack.append((node, other, [_HybridIndex(channel, row) for channel, row in channels]))
        self._nodes[key] = {node for node, _ in reached}
        found: dict[int, dict[Key, set[int]]] = {}
        for (node, function), known in reached.items():
            for place in self._places(node, function, key[0]) if known else ():
                for channel, row in known.items():
                    found.setdefault(led_by(row), {}).setdefault(place, set()).add(channel)
        parts = [{place: sorted(gone) for place, gone in part.items()} for part in found.values()]
        return sorted(parts, key=lambda part: part[key])

    def _whole_groups(
        self, node: Any, function: Any, channels: list[tuple[int, int]]
    ) -> dict[Any, list[tuple[int, int]]]:
        """All channels of the groups in which some are, on both sides of a convolution in groups, or in a norm.

        Args:
            function: what is done to a side of the node.
            channels: there, each with the row that it goes with.

        Returns:
            What is done to a side of the node -> channels there, as `channels`.
        """
        groups = groups_of(node.module)
        if not groups or any(self.problem(place) for place in self._places(node, function)):
            return {}
        pruner = self.network.graph.get_pruner_of_module(node.module)
        sides = {
            pruner.prune_in_channels: pruner.get_in_channels(node.module) // groups,
            pruner.prune_out_channels: pruner.get_out_channels(node.module) // groups,
        }
        rows = {channel // sides[function]: row for channel, row in channels}
        return {
            side: [(group * width + i, row) for group, row in rows.items() for i in range(width)]
            for side, width in sides.items()
        }

    def _places(self, node: Any, function: Any, layer: str = "") -> list[Key]:
        """What a node of torch-pruning's graph stands for; on the way of a layer's channels, where that is known."""
        from torch_pruning.ops import OPTYPE

        network, number = self.network, id(node.module)
        if layer and number in network.dependencies.doubtful:
            what, where = network.dependencies.doubtful[number]
            self.doubtful.setdefault(layer, {})[what] = where
        if number in network.dependencies.opaque:
            return [(network.dependencies.opaque[number], OPAQUE)]
        if node.type == OPTYPE.OUTPUT:
            return [(network.dependencies.outputs[number], OUTPUT)]
        name = network.names.get(number)
        if name is None:
            return []
        if isinstance(node.module, nn.Parameter):
            return [(name, node.pruning_dim)]
        if isinstance(node.module, nn.MultiheadAttention):
            # It reads channels of a stream and gives as many; torch-pruning takes the heads along, which can stay.
            return [(name, "in"), (f"{name}.out_proj", "out")]
        layer_like = width_of(node.module) is not None or isinstance(node.module, nn.RNNBase)
        if not layer_like or is_depthwise(node.module):
            return [(name, "through")]
        return [(name, "out" if network.graph.is_out_channel_pruning_fn(function) else "in")]

    def is_even(self, members: list[Members]) -> bool:
        """Whether the components are alike, apart, and all that the layers have."""
        counts = [{key: len(gone) for key, gone in part.items() if key[1] != OUTPUT} for part in members]
        if counts.count(counts[0]) < len(counts):
            return False
        for key in counts[0]:
            gone, size = [index for part in members for index in part[key]], self.network.size(key)
            if len({*gone}) < len(gone) or max(gone) >= (size or math.inf) or (key[1] == "out" and len(gone) < size):
                return False
        return True

    def is_stream(self, layer: str, members: list[Members]) -> bool:
        """Whether several layers add to its channels; a layer that is multiplied with another, or added to what is made
        of itself, does not."""
        own = self.network.own(layer)
        nodes = self._nodes[own]
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
                name = self.network.names.get(id(one.module))
                if isinstance(one.module, nn.MultiheadAttention):
                    name = f"{name}.out_proj"
                if name in produced:
                    found.add(name)
                elif one in behind:
                    found |= behind[one]
                elif width_of(one.module) is None or is_depthwise(one.module):
                    stack += one.inputs
            behind[node] = found
            return found

        for node in nodes:
            if node.grad_fn is None or id(node.module) in self.network.names or _NO_SUMS.match(node.grad_fn.name()):
                continue
            added = [found for source in node.inputs if (found := producers(source))]
            if any(one.isdisjoint(other) for one, other in itertools.combinations(added, 2)):
                return True
        return False

    def problem(self, key: Key) -> str:
        """Why channels there must stay; empty when they need not, as far as their module goes."""
        module, (name, role), shared = self.network.module(key), key, key[0] in self.network.shared
        if module is None:
            return ""
        if isinstance(module, nn.MultiheadAttention):
            why = why_not_explicit(module)
            if shared or not module._qkv_same_embed_dim:
                why = why or "its parameters are shared, or keys have a width of their own"
            return why and f"it feeds {name}, a MultiheadAttention that must stay as it is: {why}"
        if isinstance(module, nn.RNNBase):
            if role != "in":
                return f"it feeds {name}, a {type(module).__name__}, which can lose inputs alone"
            return f"it feeds {name}, whose parameters are shared" if shared else ""
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return "a layer norm over several axes follows it"
        computed = getattr(module, "weight", None) is not None and "weight" not in module._parameters
        if width_of(module) is None:
            return "a norm follows it whose weight is computed or shared" if computed or shared else ""
        if computed or shared:
            what = "weight is computed" if computed else "parameters are shared"
            return f"its {what}" if role == "out" else f"it feeds {name}, whose {what}"
        if self._differs_alone(key):
            feeds = f"feeds {name}," if role == "in" else "is"
            return f"it {feeds} a {type(module).__name__} that works otherwise without some of its channels"
        # torch-pruning takes a convolution that has as many groups as outputs for a depthwise one.
        if (
            isinstance(module, _ConvNd)
            and groups_of(module)
            and (module.transposed or module.groups == module.out_channels)
        ):
            return (
                f"{'it is' if role == 'out' else 'it feeds'} a {type(module).__name__} from {module.in_channels} to "
                f"{module.out_channels} channels in {module.groups} groups, which cannot be cut"
            )
        return ""

    def _differs_alone(self, key: Key) -> bool:
        """Whether a layer with a forward of its own gives something else without a channel than with it hidden: weights
        that are standardised over their inputs do."""
        if key not in self._differing:
            module = self.network.model.get_submodule(key[0])
            plain = is_own(module) or groups_of(module) or self.network.size(key) < 2
            self._differing[key] = not plain and _differs(self.network, key)
        return self._differing[key]

    def on_the_way(self, layer: str) -> str:
        """What channels of a layer pass that torch-pruning follows as if it worked channel by channel."""
        found = list(self.doubtful.get(layer, ()))
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return f" (torch-pruning may not follow {', '.join(found[:2])}{more})" if found else ""


def _differs(network: Network, key: Key) -> bool:
    """Whether a layer without its first channel gives something else than with it hidden, on numbers drawn for it."""
    module = network.model.get_submodule(key[0])
    axis, x = channel_axis(module), input_of(module)
    try:
        smaller = reduced(network.model, operations_of(network, (), {key: [0]})).get_submodule(key[0])
        with frozen_eval(module), frozen_eval(smaller):
            if key[1] == "in":
                without = smaller(x.narrow(axis, 1, x.shape[axis] - 1))
                hidden = module(x.index_fill(axis, torch.tensor([0], device=x.device), 0))
            else:
                without, hidden = smaller(x), module(x)
                hidden = hidden.narrow(axis, 1, hidden.shape[axis] - 1)
    except Exception:  # whatever a forward of somebody's own may need: the removal as a whole will show
        return False
    return not is_close(without, hidden)
