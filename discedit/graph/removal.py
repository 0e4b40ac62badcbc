"""The operations that remove channels: which axes of which tensors lose entries, and which attributes count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from discedit.graph.heads import Heads, head_attributes
from discedit.graph.inner_dimensions import Projections
from discedit.graph.network import Key, Network, is_depthwise, kept_indices
from discedit.model import attention
from discedit.model.trace import width_of
from discedit.recipes.operations import Operation

_Changes = dict[tuple[str, str], tuple[Any, Any]]  # module and attribute -> before and after
# Attributes that grow with the channels on a side of a module; a `MultiheadAttention` gives as many as it reads.
_WIDTHS = {
    "in": ("in_channels", "in_features", "input_size", "embed_dim", "kdim", "vdim"),
    "out": ("out_channels", "out_features", "groups"),
    "through": ("num_features", "num_channels", "num_groups", "num_parameters", "normalized_shape", "embedding_dim"),
}


def operations_of(
    network: Network,
    heads: Sequence[Heads],
    removed: Mapping[Key, list[int]],
    plain: Sequence[Projections] = (),
) -> list[Operation]:
    """What removes channels.

    Args:
        heads: of all attention whose heads can go.
        removed: where channels go, and which.
        plain: attention whose heads can lose dimensions.
    """
    keeps: list[Operation] = []
    changes: _Changes = {}
    sides: dict[str, dict[str, list[int]]] = {}  # of modules
    for key, gone in removed.items():
        name, role = key
        if isinstance(role, int):
            owner, size = name.rpartition(".")[0], network.size(key)
            index = kept_indices(size, gone)
            keeps.append(Operation("keep", name, dim=role, index=tuple(index)))
            for attribute, shape in _sizes(network.original.get_submodule(owner)).items():
                if isinstance(shape, list) and size in shape:  # of a norm, or of a view; heads come last there
                    place = len(shape) - 1 - shape[::-1].index(size)
                    changes[owner, attribute] = (shape, [*shape[:place], len(index), *shape[place + 1 :]])
        elif network.module(key) is not None:
            sides.setdefault(name, {})[role] = gone
    for name, lost in sides.items():
        keeps += _keeps(network, name, lost)
        changes |= _width_changes(network, name, lost)
    changes |= _changes_of_attention(network, heads, removed)
    for name in sides:
        if isinstance(network.original.get_submodule(name), nn.MultiheadAttention):
            changes |= _forward_changes(network, name, {"reader": "out_proj"})
    for projections in plain:
        if projections.is_partly(removed):
            changes |= _forward_changes(network, projections.place, projections.spec)
    return keeps + [
        Operation("attribute", module, name=attribute, before=before, value=value)
        for (module, attribute), (before, value) in changes.items()
    ]


def _keeps(network: Network, name: str, lost: Mapping[str, list[int]]) -> list[Operation]:
    """What is left of the tensors of a module that loses channels on some of its sides."""
    module, found = network.original.get_submodule(name), []
    for tensor_name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        for axis, size in enumerate(tensor.shape):
            side = _side_of(module, tensor_name, axis)
            if side in lost and size == network.size((name, side)):
                index = tuple(kept_indices(size, lost[side]))
                found.append(Operation("keep", f"{name}.{tensor_name}", dim=axis, index=index))
    return found


def _side_of(module: nn.Module, tensor: str, axis: int) -> str:
    """The side of a module whose channels an axis of one of its tensors may have; empty: none."""
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return "in" if axis == 1 and tensor.startswith(("weight_ih_l0", "in_proj_weight")) else ""
    if is_depthwise(module):
        return "through" if axis == 0 else ""
    if width_of(module) is None:  # a norm, a PReLU, or an embedding: (tokens, channels)
        return "through" if axis == isinstance(module, nn.Embedding) else ""
    # Subclasses have more than weight and bias, such as gains of filters.
    turned = isinstance(module, _ConvNd) and module.transposed and tensor == "weight"
    return ("in" if (axis == 1) != turned else "out") if axis < 2 else ""


def _width_changes(network: Network, name: str, lost: Mapping[str, list[int]]) -> _Changes:
    """Attributes of a module that count the channels on its sides, or groups of them."""
    module, found = network.original.get_submodule(name), {}
    for attribute, before in _sizes(module).items():
        side = next((side for side, names in _WIDTHS.items() if attribute in names), "")
        side = "through" if side and is_depthwise(module) else side
        if side in lost and (size := network.size((name, side))):
            # In proportion, as some attributes count groups of channels.
            counts = before if isinstance(before, list) else [before]
            after = [count - len(lost[side]) * count // size for count in counts]
            if after != counts:
                found[name, attribute] = (before, after if isinstance(before, list) else after[0])
    return found


def _changes_of_attention(network: Network, heads: Sequence[Heads], removed: Mapping[Key, list[int]]) -> _Changes:
    changes: _Changes = {}
    for one in heads:
        if read := {*removed.get((one.reader, "in"), ())}:
            # Heads, not dimensions of them.
            whole = sum(read.issuperset(part[one.reader, "in"]) for part in one.members)
            changes |= head_attributes(network, one, whole * one.width)
        layers = {name for name, role in one.members[0] if role == "out"}
        # Without channels of its input, its width is no longer that of all heads either.
        if one.spec is not None and any(key[1] == "in" and key[0] in (one.reader, *layers) for key in removed):
            changes |= _forward_changes(network, *one.spec)
    return changes


def _forward_changes(network: Network, name: str, spec: dict[str, Any]) -> _Changes:
    """What gives attention a forward of another width, and keeps torch's encoders from doing without it."""
    changes: _Changes = {}
    for place in [name[:i] for i, letter in enumerate(name) if letter == "."]:
        around = network.original.get_submodule(place)
        if isinstance(around, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            for inner, layer in around.named_modules(prefix=place):
                # 0: neither relu nor gelu, so that its fast path, which knows one width alone, is not taken.
                if isinstance(layer, nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu:
                    changes[inner, "activation_relu_or_gelu"] = (layer.activation_relu_or_gelu, 0)
    before = attention.forward_of(network.original.get_submodule(name))
    if before is not None and "scale" in before:  # of dimensions that went before
        spec = before
    changes[name, "forward"] = (before, spec)
    return changes


def _sizes(module: nn.Module) -> dict[str, Any]:
    """A module's public integer attributes and tuples of them: its widths among them."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        # A bool is an integer to Python, but counts nothing.
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[name] = value
        elif isinstance(value, tuple) and value and all(type(entry) is int for entry in value):
            found[name] = list(value)
    return found
