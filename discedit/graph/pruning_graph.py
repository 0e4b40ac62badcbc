"""What can be removed from a network, what hangs on it, and the operations that remove it.

torch-pruning's dependency graph (Fang et al., DepGraph, CVPR 2023) says what hangs on a channel. Heads of attention,
which that graph does not know, are found by what they reach. None of it is taken on trust: every edit is checked
against hiding the components from the layers that read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.common.warning import warn
from discedit.graph.components import ChannelGroups, Components
from discedit.graph.dependencies import Untraceable
from discedit.graph.heads import HeadFinder
from discedit.graph.hiding import RemovalCheck
from discedit.graph.inner_dimensions import INNER, Footprint, InnerFinder, Projections, in_pieces
from discedit.graph.network import OPAQUE, OUTPUT, Key, Members, Network
from discedit.model.functional import why_not_explicit
from discedit.model.trace import IN_TRAINING, width_of
from discedit.recipes.operations import Operation

__all__ = ["INNER", "KINDS", "Components", "Graph", "Projections"]

KINDS = ("filters", "neurons", "heads", "stream")
_READ = ("in_channels", "in_features", "num_features", "num_channels", "input_size", "embed_dim")  # how many are read
_FOLDED = "its channels are split or folded further on, so that none can go alone"


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
        self.model = model
        self.network = Network(op, model, example_inputs, keep_outputs=keep_outputs)
        self.trace = self.network.trace
        self.groups = ChannelGroups(self.network)
        heads, self.unclear = HeadFinder(self.network, self.groups.problem).find()
        self.heads = {found.layer: found for found in heads}
        self.check = RemovalCheck(self.network, heads, self.groups.doubtful)
        self.inner: dict[str, tuple[Projections, str]] = {}  # name -> attention, and the kind of its dimensions
        self.inspected: dict[str, tuple[Components | None, str]] = {}
        self.footprints: dict[str, list[Footprint]] = {}

    def look_inside(self, kinds: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Dimensions within heads, which then are components like others.

        Args:
            kinds: of `INNER`.

        Returns:
            How many there are by name, and why attention has none that can go.
        """
        reference, finder = self.check.reference, InnerFinder(self.network, list(self.heads.values()), self.unclear)
        self.check.plain, why = finder.find(reference.model, reference.inputs, min(reference.tolerance, 1e-4))
        modules = dict(self.model.named_modules())
        for projections in self.check.plain:
            for kind in kinds:
                if (name := projections.named(kind)) in modules:
                    why[projections.place] = f"it has a layer that is called {kind} already"
                elif projections.width(kind) > 1:
                    self.inner[name] = projections, kind
        widths = {name: projections.width(kind) for name, (projections, kind) in self.inner.items()}
        return widths, {f"{place}.{kind}".lstrip("."): reason for place, reason in why.items() for kind in kinds}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Other values for parameters of the model, with which it is the same function."""
        with torch.no_grad():
            for name, values in tensors.items():
                self.model.get_parameter(name).copy_(values)
        if tensors:  # made of the values before
            vars(self.check).pop("reference", None)

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
        # As they run, since layers that go together are found under the first of them.
        for layer in sorted(layers, key=self.network.turn):
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
        return [(name, gone) for (name, role), gone in removed.items() if role == "in" and name in self.network.order]

    def queries(self, chosen: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
        """Tensors that give queries, with the rows that go with dimensions of heads. No layer reads these; with zeros
        there they are hidden, and so are their keys."""
        return self.check.queries(self._removed({layer: chosen[layer] for layer in self.inner if layer in chosen}))

    def behind_queries(self, chosen: Mapping[str, Iterable[int]]) -> list[str]:
        """The layers that read what attention makes of queries and keys that lose dimensions."""
        losing = [self.inner[layer] for layer, gone in chosen.items() if layer in self.inner and list(gone)]
        return [projections.heads.reader for projections, kind in losing if kind == "qk"]

    def producers(self, chosen: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
        """The layers that lose output rows with the components and run in eval mode, each with these rows."""
        removed = self._removed(chosen)
        return {name: gone for (name, role), gone in removed.items() if role == "out" and name in self.network.order}

    def rows(self, layer: str) -> dict[str, list[list[int]]]:
        """The weights that produce a layer's components, each with the rows of every component."""
        parts = self._found(layer)
        if parts.kind == "heads":
            if not isinstance(self.network.model.get_submodule(layer), nn.MultiheadAttention):
                return {f"{layer}.weight": [list(rows) for rows in parts.rows]}
            members = self.heads[layer].members
            weight = next(key for key in members[0] if key[0] in (f"{layer}.in_proj_weight", f"{layer}.v_proj_weight"))
            return {weight[0]: [part[weight] for part in members]}
        members = self.groups.members_of(layer)
        places = {f"{name}.weight": self.network.own(name) for name in parts.layers}
        return {weight: [part[place] for part in members] for weight, place in places.items()}

    def footprint(self, layer: str) -> list[Footprint]:
        """What one component of a layer takes from each parameter and buffer that shrinks with it.

        Returns:
            Name of the tensor, dim, number of entries along it.
        """
        if layer not in self.footprints:
            shapes = self.network.slots.architecture
            keeps = [o for o in self.check.operations(self._removed({layer: [0]})) if o.kind == "keep"]
            self.footprints[layer] = [(o.target, o.dim, shapes[o.target][o.dim] - len(o.index)) for o in keeps]
        return self.footprints[layer]

    def footprints_of(
        self, layers: Iterable[str], shapes: dict[str, tuple[int, ...]], macs: dict[str, float]
    ) -> dict[str, list[Footprint]]:
        """What a component of each layer takes from the tensors that have shapes. Where attention loses heads and
        dimensions of heads, its tensors are in pieces then, in `shapes` and `macs` as well."""
        found = {layer: [place for place in self.footprint(layer) if place[0] in shapes] for layer in layers}
        kinds: dict[str, tuple[Projections, list[str]]] = {}
        for layer in found:
            if layer in self.inner:
                projections, kind = self.inner[layer]
                kinds.setdefault(projections.place, (projections, []))[1].append(kind)
        in_pieces(kinds.values(), self.model, shapes, found, macs)
        return found

    def without(self, chosen: Mapping[str, Iterable[int]]) -> nn.Module | None:
        """The model without components, where norms run across them; None where it is the model with these hidden from
        the layers that read them."""
        gone = self._removed(chosen)
        return self.check.reduced(gone) if self.check.across(gone) else None

    def smaller(self, chosen: Mapping[str, Iterable[int]]) -> nn.Module:
        """The model without components, which no trial has compared with hiding them, and which may not run."""
        return self.check.reduced(self._removed(chosen))

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
        # Each alone first: one that fails by itself makes every set fail that it is in.
        alone = self._failing({layer: indices for layer, indices in chosen.items() if indices}, problem)
        failed: dict[str, str] = {}
        for layer, why in alone.items():
            more = self.heads[layer].why if layer in self.heads else self.groups.on_the_way(layer)
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

    def _trial(self, chosen: Mapping[str, Iterable[int]]) -> tuple[list[Operation], str]:
        return self.check.trial(self._removed(chosen))

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
        return type(self.network.model.get_submodule(place)).__name__, name

    def warn_of_unseen(self, chosen: Mapping[str, Iterable[int]]) -> None:
        """A warning where modules that ran neither in eval nor in train mode have as many channels as layers that lost
        some: whether they read these cannot be seen.

        Args:
            chosen: layer -> indices of its components, as `find` gives them.
        """
        idle: dict[str, int] = {}
        for name, module in self.network.model.named_modules():
            if name in self.network.order or name in self.network.dependencies.trained:
                continue
            own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            width = next((w for a in _READ if type(w := vars(module).get(a)) is int), 0)
            if own and width and not self.network.dependencies.used.intersection(own):
                idle[name] = width
        found: dict[str, list[str]] = {}
        for layer, indices in chosen.items() if idle else ():
            if any(True for _ in indices):
                sizes = {self.network.size(key) for key in self._removed({layer: [0]}) if key[1] in ("in", "out")}
                for name, width in idle.items():
                    if width in sizes:
                        found.setdefault(name, []).append(layer)
        if found:
            them = [f"{name} as many as {_some(sorted(layers), ', ')}" for name, layers in found.items()]
            warn(
                f"{self.network.op}: example_inputs must run all that is used, in eval or in train mode: whether what "
                "does not run reads channels that were removed, and then no longer fits, cannot be seen. These did not "
                f"run and read as many channels as layers that lost some: {_some(them, '; ')}. If they are used, leave "
                "these layers whole or give inputs on which they run."
            )

    def _removed(self, chosen: Mapping[str, Iterable[int]]) -> dict[Key, list[int]]:
        """Everything that goes with the components, in the order in which it runs."""
        gone: dict[Key, set[int]] = {}
        for layer, indices in chosen.items():
            kind = self._found(layer).kind
            if kind in INNER:
                members = self.inner[layer][0].members(kind)
            else:
                members = self.heads[layer].members if kind == "heads" else self.groups.members_of(layer)
            for index in indices:
                for key, rows in members[index].items():
                    gone.setdefault(key, set()).update(rows)
        return {key: sorted(gone[key]) for key in sorted(gone, key=lambda key: (self.network.turn(key[0]), str(key)))}

    def _found(self, layer: str) -> Components:
        components, why = self._inspect(layer)
        if components is None:
            raise ValueError(f"{self.network.op}: layer {layer!r} has no components that can be removed: {why}.")
        return components

    def _inspect(self, layer: str) -> tuple[Components | None, str]:
        """The layer's components, or why it has none that can be removed."""
        if layer not in self.inspected:
            try:
                self.inspected[layer] = self._classify(layer)
            except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
                self.inspected[layer] = None, f"torch-pruning cannot follow its channels: {error}"
        return self.inspected[layer]

    def _classify(self, layer: str) -> tuple[Components | None, str]:
        if layer in self.inner:
            projections, kind = self.inner[layer]
            dimensions = tuple((index,) for index in range(projections.width(kind)))
            return Components(layer, kind, dimensions, (layer,)), ""
        module = self.network.model.get_submodule(layer)
        if isinstance(module, nn.MultiheadAttention):
            return self._classify_multihead(layer, module)
        if isinstance(self.network.model.get_submodule(layer.rpartition(".")[0]), nn.MultiheadAttention):
            return None, f"what it gives is what {layer.rpartition('.')[0]} gives, in a stream"
        if layer in self.network.dependencies.trained:
            return None, "it runs in train mode alone, so that nothing shows what its components are worth"
        if layer not in self.network.order:
            return None, "it does not run on the example inputs, or not by a call of its module"
        if module not in self.network.graph.module2node:
            return None, "torch-pruning's trace does not reach it"
        own = self.network.own(layer)
        if why := self.groups.problem(own):
            return None, why
        if heads := next((heads for heads in self.check.heads if own in heads.members[0]), None):
            if heads.layer != layer:
                return None, f"its rows belong to the heads that {heads.layer} stands for"
            rows = tuple(tuple(members[own]) for members in heads.members)
            others = tuple(name for name, role in heads.members[0] if role == "out" and name != layer)
            return Components(layer, "heads", rows, (layer,), others), ""
        place = self.unclear.get(layer)
        unclear = f"it belongs to the attention of {place or 'the model'}, whose heads cannot be told apart"
        try:
            members = self.groups.members_of(layer)
        except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
            if place is not None:
                return None, unclear
            known = isinstance(error, Untraceable)
            return None, str(error) if known else f"torch-pruning cannot follow its channels: {error}"
        keys = sorted(set().union(*members), key=lambda key: (self.network.turn(key[0]), str(key)))
        shared = [name for name, role in keys if role == "out" and name != layer]
        alone = not shared and len(members) == self.network.size(own) and any(role == "in" for _, role in keys)
        if place is not None and not alone and all(self.unclear.get(other) == place for other in shared):
            return None, unclear
        if why := self._why_not(layer, members, keys, shared):
            return None, why
        kind = "filters" if isinstance(module, _ConvNd) else "neurons"
        if shared and self.groups.is_stream(layer, members):
            kind = "stream"
        rows = tuple(tuple(sorted(part[own])) for part in members)
        layers = tuple(name for name, role in keys if role == "out" or (name, role) == own)
        through = [name for name, role in keys if role == "through" and name != layer]
        followers = tuple(name for name in through if width_of(self.network.model.get_submodule(name)) is not None)
        return Components(layer, kind, rows, layers, followers), ""

    def _why_not(self, layer: str, members: list[Members], keys: list[Key], shared: list[str]) -> str:
        """Why channels of a layer must stay; empty when they need not.

        Args:
            members: what goes with each component.
            keys: everywhere that they have channels, in the order in which it runs.
            shared: the other layers that produce these channels.
        """
        for key in keys:
            if why := self.groups.problem(key):
                return f"{_shares(shared)}, of which {key[0]} must stay: {why}" if key[1] == "out" else why
        if cut := [why for why, role in keys if role == OPAQUE]:
            return cut[0]
        outputs = [name for name, role in keys if role == OUTPUT and self.network.stays(name)]
        if not any(role == "in" for _, role in keys):
            if outputs:
                return self.network.reshaped(min(outputs, key=lambda place: place.endswith(IN_TRAINING)))
            return f"no layer reads its channels{self.groups.on_the_way(layer)}"
        if outputs and (why := self.check.reshapes(members[0])):
            return why
        if not self.groups.is_even(members) or len(members) == 1 < self.network.size(self.network.own(layer)):
            why = f"{_shares(shared)}, not channel by channel" if shared else _FOLDED
            return f"{why}{self.groups.on_the_way(layer)}"
        return ""

    def _classify_multihead(self, layer: str, module: nn.MultiheadAttention) -> tuple[Components | None, str]:
        if layer in self.heads:
            heads = self.heads[layer]
            if heads.spec is None:
                return None, "its forward insists on its width"
            channels = tuple(tuple(part[heads.reader, "in"]) for part in heads.members)
            return Components(layer, "heads", channels, (layer,)), ""
        if layer in self.network.shared:
            return None, "its parameters are shared"
        why = why_not_explicit(module) or "it has one head alone, or what its heads reach cannot be told apart"
        return None, why

    def _why_not_alone(self, components: Components) -> str:
        """Why components of a kind that was not asked for are left."""
        if components.kind != "stream":
            return f"its components are {components.kind}, which are not among those to remove"
        return _shares([name for name in components.layers if name != components.layer])


def _some(names: list[str], separator: str) -> str:
    more = [f"{len(names) - 3} more"] if len(names) > 4 else []
    return separator.join(names[:3] + more if more else names)


def _shares(others: list[str]) -> str:
    if not others:
        return "its channels are tied to a parameter outside any layer"
    more = f" and {len(others) - 1} more layers" if len(others) > 1 else ""
    return f"it shares its channels with {min(others)}{more}"
