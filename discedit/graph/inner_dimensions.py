"""Dimensions within the heads of attention: of queries and keys ("qk"), of values and what the output reads ("vo").

A component is one dimension of every head of a layer, so that shapes stay plain. Its name is that of the attention's
module with the kind: ``blocks.0.attn.qk``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from discedit.graph.heads import COUNTS, Heads
from discedit.graph.network import Key, Members, Network, innermost_module, is_inside
from discedit.model import attention
from discedit.model.forward import call, frozen_eval, hooked
from discedit.model.functional import why_not_explicit
from discedit.model.plain_attention import NotPlain, is_plain, plain_spec

INNER = ("qk", "vo")

# Tensor and axis -> of each head the entries there that belong to queries, keys, values or the output's reader.
Places = dict[tuple[str, int], Tensor]
Footprint = tuple[str, int, int]  # tensor, axis, entries along it


@dataclass(frozen=True)
class Projections:
    """The projections of plain attention.

    Attributes:
        heads: of the attention.
        place: the module whose forward takes other widths, by `spec`.
        spec: of that forward.
        rows: "q", "k", "v", "o" -> where -> (heads, width) channels there.
    """

    heads: Heads
    place: str
    spec: dict[str, Any]
    rows: dict[str, dict[Key, Tensor]]

    def named(self, kind: str) -> str:
        return f"{self.place}.{kind}" if self.place else kind

    def width(self, kind: str) -> int:
        """Dimensions of each head."""
        return next(iter(self.rows[kind[0]].values())).shape[1]

    def members(self, kind: str) -> list[Members]:
        """What goes with each dimension."""
        found: list[Members] = [{} for _ in range(self.width(kind))]
        for letter in kind:
            for key, rows in self.rows[letter].items():
                for index, part in enumerate(found):
                    part[key] = sorted([*part.get(key, ()), *rows[:, index].tolist()])
        return found

    def is_partly(self, gone: Mapping[Key, list[int]]) -> bool:
        """Whether a head loses some of its channels, but not all."""
        for places in self.rows.values():
            for key, rows in places.items():
                lost = torch.isin(rows, torch.tensor(gone.get(key, []))).sum(1)
                if bool(((lost > 0) & (lost < rows.shape[1])).any()):
                    return True
        return False

    def queries(self, model: nn.Module, gone: Mapping[Key, list[int]]) -> dict[str, list[int]]:
        """The tensors that give queries, with the rows among what goes."""
        found: dict[str, list[int]] = {}
        for key, rows in self.rows["q"].items():
            lost = sorted({*rows.flatten().tolist()}.intersection(gone.get(key, ())))
            found |= {name: lost for name, _ in self.places(model, {key: rows}) if lost}
        return found

    def places(self, model: nn.Module, rows: Mapping[Key, Tensor]) -> Places:
        """The tensors that hold rows, and where."""
        found: Places = {}
        for (name, role), own in rows.items():
            if isinstance(role, int):
                found[name, role] = own
                continue
            found[f"{name}.weight", int(role == "in")] = own
            if role == "out" and getattr(model.get_submodule(name), "bias", None) is not None:
                found[f"{name}.bias", 0] = own
        return found


class InnerFinder:
    """Finds attention of the plain form.

    Args:
        network: in which.
        heads: that were found in it.
        unclear: layers that belong to attention whose heads cannot be told apart -> its module.
    """

    def __init__(self, network: Network, heads: Sequence[Heads], unclear: Mapping[str, str]) -> None:
        self.network, self.heads, self.unclear = network, heads, unclear

    def find(self, model: nn.Module, inputs: Any, tolerance: float) -> tuple[list[Projections], dict[str, str]]:
        """The projections of each, and the modules of attention that is not of the plain form, with the reason.

        Args:
            model: to see it run in, preferably in float64.
            inputs: of the model.
            tolerance: of a difference, over the largest number.
        """
        found: list[Projections] = []
        why = {
            place: "its heads cannot be told apart"
            for place in self.unclear.values()
            if not any(heads.place == place or is_inside(heads.place, place) for heads in self.heads)
        }
        specs = self._specs(model, inputs, tolerance)
        for heads in self.heads:
            place, spec = specs[heads.layer]
            if isinstance(spec, str):
                why[place] = spec
            else:
                rows = _rows_of(self.network, heads, place, spec)
                found.append(Projections(heads, place, spec, rows))
        return found, why

    def _specs(self, model: nn.Module, inputs: Any, tolerance: float) -> dict[str, tuple[str, Any]]:
        """Of each attention the module, and how it runs or why it is not plain."""
        specs: dict[str, tuple[str, Any]] = {}
        handles = []

        def see(
            heads: Heads, place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            specs[heads.layer] = place, _spec_of(self.network, heads, place, module, (args, kwargs, output), tolerance)

        for heads in self.heads:
            if isinstance(model.get_submodule(heads.place), nn.MultiheadAttention):
                specs[heads.layer] = heads.place, _spec_of_multihead(self.network, heads)
                continue
            place = innermost_module([name for name, role in heads.members[0] if role == "out"])
            specs[heads.layer] = place, "its module does not run just once"
            if self.network.trace.runs.get(place) == 1:
                module = model.get_submodule(place)
                handles.append(module.register_forward_hook(partial(see, heads, place), with_kwargs=True))
        with hooked(handles), frozen_eval(model):
            call(model, inputs)
        return specs


def _spec_of(
    network: Network, heads: Heads, place: str, module: nn.Module, seen: tuple[Any, ...], tolerance: float
) -> dict[str, Any] | str:
    layers = sorted((name for name, role in heads.members[0] if role == "out"), key=network.turn)
    if odd := [name for name, role in heads.members[0] if role == "through" or isinstance(role, int)]:
        return f"it has parameters beside its projections ({odd[0]})"
    if (before := attention.forward_of(module)) is not None and is_plain(before):
        return before
    numbers = [len(heads.members[0][layer, "out"]) // heads.width for layer in layers]
    if sum(numbers) != 3:
        return "its queries, keys and values are of different widths"
    if "forward" in module.__dict__:
        return "its forward is not that of its class"
    own = [
        (name.removeprefix(f"{place}.") if place else name, number)
        for name, number in zip(layers, numbers, strict=True)
    ]
    reader = heads.reader.removeprefix(f"{place}.") if place else heads.reader
    reader = reader if is_inside(heads.reader, place) else ""
    if not reader and any(number > 1 for number in numbers):
        return "what reads its heads stands outside of its module"
    count = next((name for name in COUNTS if type(vars(module).get(name)) is int), "")
    args, kwargs, output = seen
    try:
        return plain_spec(module, own, reader, count, (args, kwargs, output), tolerance)
    except NotPlain as error:
        return str(error)
    except Exception as error:  # whatever a module makes of what it is not called with
        return f"it cannot be run as plain attention: {error}"


def _spec_of_multihead(network: Network, heads: Heads) -> dict[str, Any] | str:
    module: Any = network.model.get_submodule(heads.place)
    if why := why_not_explicit(module):
        return why
    before = attention.forward_of(module) or {"reader": "out_proj"}
    return before if "scale" in before else {**before, "scale": float(heads.width**-0.5)}


def _rows_of(network: Network, heads: Heads, place: str, spec: Mapping[str, Any]) -> dict[str, dict[Key, Tensor]]:
    """See `Projections.rows`."""
    prefix = f"{place}." if place else ""
    rows: dict[str, dict[Key, Tensor]] = {letter: {} for letter in "qkvo"}
    for key in heads.members[0]:
        channels = torch.tensor([part[key] for part in heads.members])
        if key == (heads.reader, "in"):
            rows["o"][key] = channels
            continue
        name = key[0].removeprefix(prefix)
        # Of a MultiheadAttention in_proj_weight, or q_proj_weight.
        of_parameter = "qkv" if name.startswith("in_proj") else name[0]
        letters = spec["layers"][name] if "layers" in spec else of_parameter
        for letter, part in zip(letters, channels.chunk(len(letters), 1), strict=True):
            rows[letter][key] = part
    return rows


def in_pieces(
    found: Iterable[tuple[Projections, Sequence[str]]],
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    footprints: dict[str, list[Footprint]],
    macs: dict[str, float],
) -> None:
    """Puts in place of each tensor of attention its pieces, (heads, dimensions, ...) large, so that what heads and what
    dimensions take from it multiply.

    Args:
        found: attention, each with the kinds of dimensions that may go.
        model: of which it is a part.
        shapes, footprints, macs: of tensors, as `Cost` takes them; changed.
    """
    for projections, kinds in found:
        own = {projections.named(kind): kind for kind in kinds}
        for (name, dim), pieces in _pieces(projections, model).items():
            shape, work = shapes.pop(name), macs.pop(name, None)
            for kind, (letters, heads, width) in pieces.items():
                piece = (*shape[:dim], heads, letters * width, *shape[dim + 1 :])
                shapes[f"{name}/{kind}"] = piece
                if work is not None:
                    macs[f"{name}/{kind}"] = work * math.prod(piece) / max(math.prod(shape), 1)
            for layer, places in footprints.items():
                taken = [
                    _taken(place, dim, pieces, own.get(layer)) if place[0] == name else [place] for place in places
                ]
                footprints[layer] = [place for several in taken for place in several]


def _pieces(projections: Projections, model: nn.Module) -> dict[tuple[str, int], dict[str, tuple[int, int, int]]]:
    """Tensor and axis -> kind -> how many of its letters stand there, heads, width."""
    found: dict[tuple[str, int], dict[str, tuple[int, int, int]]] = {}
    for kind in INNER:
        for letter in kind:
            for place, rows in projections.places(model, projections.rows[letter]).items():
                letters = found.setdefault(place, {}).get(kind, (0,))[0]
                found[place][kind] = letters + 1, *rows.shape
    return found


def _taken(place: Footprint, dim: int, pieces: Mapping[str, tuple[int, int, int]], kind: str | None) -> list[Footprint]:
    """What a component takes from pieces: a dimension of all heads (of a kind), a head, or entries of another axis."""
    name, axis, entries = place
    if axis != dim:
        return [(f"{name}/{other}", axis + (axis > dim), entries) for other in pieces]
    if kind is None:
        return [(f"{name}/{other}", dim, 1) for other in pieces]
    return [(f"{name}/{kind}", dim + 1, pieces[kind][0])]
