"""Attention whose heads can go: found by what the rows of its layers reach, and what it must be told with fewer."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit.graph.network import Key, Members, Network, channel_axis, innermost_module, is_inside
from discedit.model import attention
from discedit.model.forward import call, frozen_eval, hooked
from discedit.model.functional import why_not_explicit
from discedit.model.trace import width_of

_Probe = tuple[Key, int]  # one of the channels there
_Reached = Mapping[_Probe, Mapping[str, list[int]]]  # and the input channels of layers that it reaches
_JOINT = ("all_head_size", "attn_dim", "inner_dim", "val_attn_dim")  # attributes that are the heads' width together
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")  # and that count them
_SHAPES = re.compile("(Unsafe)?(View|Reshape|Flatten|Transpose|Permute|Squeeze|Unsqueeze|Clone)")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of a MultiheadAttention


@dataclass(frozen=True)
class Heads:
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
    members: list[Members]
    spec: tuple[str, dict[str, Any]] | None = None
    why: str = ""


class HeadFinder:
    """Finds attention whose heads can go.

    Args:
        network: in which.
        problem: why channels somewhere must stay; empty when they need not.
    """

    def __init__(self, network: Network, problem: Callable[[Key], str]) -> None:
        self.network, self.model, self.problem = network, network.model, problem

    def find(self) -> tuple[list[Heads], dict[str, str]]:
        """Attention whose heads can go; the layers of the rest, each with the module that it belongs to.

        Found by probes: one row of a linear layer, or one index of another tensor, in a module that counts heads. A row
        of query or key reaches all channels of its head in the layer that reads attention, a row of value one of them.
        """
        modules = dict(self.model.named_modules())
        counts = {name: count for name, module in modules.items() if (count := _count_of_heads(module))}
        places: dict[str, str] = {}  # of layers: the innermost module around that counts heads
        for name, module in modules.items():
            mixes = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
            if mixes and name in self.network.order:
                # A MultiheadAttention's own layer reads heads alone.
                around = [p for p in counts if is_inside(name, p) and not isinstance(modules[p], nn.MultiheadAttention)]
                places |= {name: max(around, key=len)} if around else {}
        probes = self._probes(counts, places)
        reached: dict[_Probe, dict[str, list[int]]] = {}
        depths = {place: sum(is_inside(place, other) for other in counts) for place in counts}
        for depth in set(depths.values()):  # one in another reaches the same
            here = [probes[place] for place in counts if depths[place] == depth]
            for turn in itertools.zip_longest(*here):
                now = [probe for probe in turn if probe is not None]
                try:
                    reached |= dict.fromkeys(now, self._reached(now))
                except Exception:  # whatever a model makes of NaN
                    return [], places
        heads = {place: self._heads_of(place, probes[place], reached, count) for place, count in counts.items()}
        unclear = {name: place for name, place in places.items() if heads[place] is None}
        return [found for found in heads.values() if found is not None], unclear

    def _probes(self, counts: Mapping[str, int], places: Mapping[str, str]) -> dict[str, list[_Probe]]:
        """Where to look in each module that counts heads: rows of layers, and indices of other tensors."""
        from torch_pruning.ops import OPTYPE, module2type

        size_of = {name: self.network.size((name, "out")) for name in places}
        probes: dict[str, list[_Probe]] = {place: [] for place in counts}
        for name, place in places.items():
            size, count = size_of[name], counts[place]
            if size % count == 0 and not self.problem((name, "out")):
                edge = [size // count - 1, size // count]  # between the first two heads, where they lie one by one
                probes[place] += [((name, "out"), start) for start in dict.fromkeys((*_starts(size, count), *edge))]
        for name, place in places.items():  # one number per head, from a module that counts them as well
            for other in counts:
                if is_inside(place, other) and other != place and size_of[name] == counts[other]:
                    probes[other].append(((name, "out"), 0))
        rows = {place: {self.network.size(key) for key, _ in found} for place, found in probes.items()}
        for name, tensor in self.network.tensors.items():
            owner = name.rpartition(".")[0]
            module = self.model.get_submodule(owner)
            if isinstance(module, nn.MultiheadAttention) and owner in counts and owner not in self.network.shared:
                probes[owner] += [((name, 0), start) for start in _starts(len(tensor), counts[owner])]
            elif module2type(module) == OPTYPE.ELEMENTWISE and tensor.is_floating_point():
                around = [place for place in counts if is_inside(name, place)]
                beside = [place for place in counts if is_inside(name, place.rpartition(".")[0])]
                for place in around or beside:  # tables of biases may belong to the block
                    dims = [dim for dim, size in enumerate(tensor.shape) if size == counts[place]]
                    if tensor.ndim == 1 and place in around:  # biases that layers are handed
                        dims = [0] if len(tensor) in rows[place] | {s // 3 for s in rows[place]} else dims
                    probes[place] += [((name, dim), 0) for dim in dims]
        return probes

    def _reached(self, probes: list[_Probe]) -> dict[str, list[int]]:
        """Input channels of layers that some indices of tensors reach without passing through another layer.

        NaN shows it: it passes whatever works on its channel, however small its share.
        """
        found: dict[str, list[int]] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not bool(args[0].isnan().any()):
                return None
            nan = args[0].isnan()
            hit = nan.movedim(channel_axis(module), -1).flatten(0, -2).any(0).nonzero().flatten()
            found[name] = sorted({*found.get(name, ()), *hit.tolist()})
            # NaN ends here: this layer would spread it over everything behind.
            return (args[0].masked_fill(nan, 0), *args[1:])

        layers = {name: module for name, module in self.model.named_modules() if width_of(module) is not None}
        saved: dict[str, Tensor] = {}
        tensors = self.network.tensors
        try:
            for (name, role), index in probes:
                name, dim = (name, role) if isinstance(role, int) else (f"{name}.weight", 0)
                saved.setdefault(name, tensors[name].detach().clone())
                tensors[name].data.select(dim, index).fill_(math.nan)
            # The other kernels of attention need not pass NaN on.
            handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in layers.items()]
            with hooked(handles), frozen_eval(self.model), sdpa_kernel(SDPBackend.MATH):
                call(self.model, self.network.inputs)
        finally:
            for name, value in saved.items():
                tensors[name].data.copy_(value)
        return found

    def _heads_of(self, place: str, probes: list[_Probe], reached: _Reached, count: int) -> Heads | None:
        """Heads, if what the probes reach in one layer is what they reach in attention."""
        readers: dict[str, list[_Probe]] = {}
        for probe in probes:
            (name, role), index = probe
            if role == "out" and index not in _starts(self.network.size(probe[0]), count):
                continue
            owner = name.rpartition(".")[0] if isinstance(role, int) else name
            # Tables may be read without a call of their module.
            start = self.network.order.get(owner, self.network.turn(place))
            for reader in sorted(reached[probe], key=self.network.turn):
                size = self.network.size((reader, "in"))
                head = [list(range(size // count)), list(range(0, size, count))]  # one by one, or interleaved
                if self.network.turn(reader) > start and size % count == 0 and reached[probe][reader] in ([0], *head):
                    readers.setdefault(reader, []).append(probe)
                    break
        for reader, found in readers.items():
            blocks, values, parts = self._blocks(place, reader, found, reached, count)
            if not blocks:
                return None
            if parts >= 3 and values:
                members = [{key: block[head].tolist() for key, block in blocks.items()} for head in range(count)]
                width = self.network.size((reader, "in")) // count
                return self._with_spec(Heads(place, min(values, key=self.network.turn), reader, width, members))
        return None

    def _blocks(
        self, place: str, reader: str, probes: list[_Probe], reached: _Reached, count: int
    ) -> tuple[dict[Key, Tensor], list[str], int]:
        """What belongs to the heads that a layer reads.

        Returns:
            Where they have channels -> which, (heads, channels of each), empty where it cannot be told; the layers that
            give values; how many of queries, keys and values were found.
        """
        size = self.network.size((reader, "in"))
        width = size // count
        channels = torch.arange(size)
        apart = width > 1 and any(reached[probe][reader][1:2] == [count] for probe in probes)
        channels = channels.view(-1, count).T if apart else channels.view(count, -1)
        blocks: dict[Key, Tensor] = {(reader, "in"): channels}
        values, parts = [], 0
        for key, start in probes:
            rows = torch.arange(self.network.size(key))
            edge = len(rows) // count
            seen = [reached.get((key, index), {}).get(reader) for index in (0, edge - 1, edge)]
            one_by_one = seen == [list(range(width)), [width - 1], list(range(width, 2 * width))]
            if key[1] == "out" and width > 1 and one_by_one:  # queries, keys and values together for each head
                blocks[key] = rows.view(count, -1)
                parts += 3
                values.append(key[0])
                continue
            gives = key[1] == "out" or key[0].startswith(tuple(f"{place}.{name}" for name in _PROJECTIONS))
            fused = len(rows) // size if gives or key[0].startswith(f"{place}.in_proj") else 1
            if len(rows) not in (size, 2 * size, 3 * size):
                fused = 1
            if gives and not all((key, part * size) in probes for part in range(fused)):
                return {}, [], 0
            blocks[key] = rows.view(fused, count, -1).transpose(0, 1).flatten(1)
            if gives:
                parts += 1
                if len(reached[key, start][reader]) == 1 and len(rows) == fused * size:
                    values.append(key[0] if key[1] == "out" else place)
        for key in [key for key in blocks if key[1] == "out"]:
            if norm := self._batch_norm_behind(key[0]):
                blocks[norm, "through"] = blocks[key]
        return blocks, values, parts

    def _with_spec(self, heads: Heads) -> Heads:
        """With what the attention's forward must be told, where it takes the heads' width for that of its input."""
        module = self.model.get_submodule(heads.place)
        if isinstance(module, nn.MultiheadAttention):
            place, layers = heads.place, []
        else:
            layers = [name for name, role in heads.members[0] if role == "out"]
            place = innermost_module(layers)
            module = self.model.get_submodule(place)
        if not is_inside(heads.reader, place) or place not in self._given:
            return heads
        own = [name.removeprefix(f"{place}.") if place else name for name in (*layers, heads.reader)]
        changes = head_attributes(self.network, heads, heads.width)
        attributes = {attribute: value for (name, attribute), (_, value) in changes.items() if name == place}
        last = not isinstance(self.model.get_submodule(heads.reader), _ConvNd)
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
            for name, module in self.model.named_modules()
            if next(module.children(), None) is not None and not isinstance(module, torch.jit.ScriptModule)
        ]
        with hooked(handles), frozen_eval(self.model):
            call(self.model, self.network.inputs)
        return given

    def _batch_norm_behind(self, layer: str) -> str | None:
        """The batch norm that reads a layer's rows, perhaps in another shape."""
        graph, names, size = self.network.graph, self.network.names, self.network.size((layer, "out"))
        module = self.model.get_submodule(layer)
        nodes = [graph.module2node[module]] if module in graph.module2node else []
        while nodes:
            nodes = [node for before in nodes for node in before.outputs]
            for node in nodes:
                if isinstance(node.module, _BatchNorm) and node.module.num_features == size:
                    return str(names[id(node.module)])
            nodes = [node for node in nodes if id(node.module) not in names and _SHAPES.match(node.grad_fn.name())]
        return None


def head_attributes(network: Network, heads: Heads, gone: int) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Counts of heads and their joint width, in the attention's module or those in it; without so many channels."""
    names = [name for name, role in heads.members[0] if not isinstance(role, int)]
    common = innermost_module([*names, f"{heads.place}."] if heads.layer == heads.place else names)
    count = len(heads.members)
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for name, module in network.original.get_submodule(common).named_modules(prefix=common):
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


def _count_of_heads(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention) and why_not_explicit(module):
        return 0
    counts = [vars(module).get(name) for name in COUNTS]
    return next((count for count in counts if type(count) is int and count > 1), 0)


def _starts(size: int, count: int) -> list[int]:
    """The first rows of what may be queries, keys and values of some heads in one tensor, or two of them."""
    parts = [parts for parts in (1, 2, 3) if size % (parts * count) == 0]
    return sorted({size // n * part for n in parts for part in range(n)})
