"""The operations that remove channels.

torch-pruning's functions remove them from copies of the modules whose tensors hold their own flat indices: what is left
says what a recipe must keep, whatever torch-pruning did to get there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.graph.heads import Heads, head_attributes
from discedit.graph.network import OUTPUT, Key, Network, groups_of, kept_indices
from discedit.model import attention
from discedit.model.trace import width_of
from discedit.recipes.operations import Operation

_Changes = dict[tuple[str, str], tuple[Any, Any]]  # module and attribute -> before and after


def operations_of(network: Network, heads: Sequence[Heads], removed: Mapping[Key, list[int]]) -> list[Operation]:
    """Removes channels from copies of the modules and reads off what that changed.

    Args:
        heads: of all attention whose heads can go.
        removed: where channels go, and which.
    """
    keeps: list[Operation] = []
    changes: _Changes = {}
    copies: dict[str, nn.Module] = {}
    for key, gone in removed.items():
        name, role = key
        if role == OUTPUT:
            continue
        if isinstance(role, int):
            owner, size = name.rpartition(".")[0], network.size(key)
            index = kept_indices(size, gone)
            keeps.append(Operation("keep", name, dim=role, index=tuple(index)))
            for attribute, shape in _sizes(network.original.get_submodule(owner)).items():
                if isinstance(shape, list) and size in shape:  # of a norm, or of a view; heads come last there
                    place = len(shape) - 1 - shape[::-1].index(size)
                    changes[owner, attribute] = (shape, [*shape[:place], len(index), *shape[place + 1 :]])
            continue
        if name not in copies:
            copies[name] = _tagged(network.original.get_submodule(name))
        _cut(copies[name], key, removed, network.graph)
    for name, module in copies.items():
        original = network.original.get_submodule(name)
        for tensor, left in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            keeps += _kept(f"{name}.{tensor}", _tags(getattr(original, tensor)), left.detach())
        before, after = _sizes(original), _sizes(module)
        changes |= {(name, key): (before[key], after[key]) for key in before if before[key] != after[key]}
    changes |= _changes_of_attention(network.original, heads, removed)
    for name, module in copies.items():
        if isinstance(module, nn.MultiheadAttention):
            changes |= _forward_changes(network.original, name, {"reader": "out_proj"})
    return keeps + [
        Operation("attribute", module, name=attribute, before=before, value=value)
        for (module, attribute), (before, value) in changes.items()
    ]


def _cut(module: nn.Module, key: Key, removed: Mapping[Key, list[int]], graph: Any) -> None:
    """Removes channels from one side of a module, or from both where they are in groups."""
    (name, side), gone = key, removed[key]
    if groups_of(module):
        if side != "in":
            _cut_groups(module, gone, removed.get((name, "in"), gone))
        return
    cut_own_tensors(module, str(side), gone)
    if isinstance(module, nn.MultiheadAttention):
        module.in_proj_weight.data = module.in_proj_weight.data[:, kept_indices(module.embed_dim, gone)]
        module.embed_dim -= len(gone)
        module.kdim = module.vdim = module.embed_dim
        return
    pruner = graph.get_pruner_of_module(module)
    (pruner.prune_in_channels if side == "in" else pruner.prune_out_channels)(module, gone)


def _changes_of_attention(model: nn.Module, heads: Sequence[Heads], removed: Mapping[Key, list[int]]) -> _Changes:
    changes: _Changes = {}
    for one in heads:
        if (one.reader, "in") in removed:
            changes |= head_attributes(model, one, len(removed[one.reader, "in"]))
        layers = {name for name, role in one.members[0] if role == "out"}
        # Without channels of its input, its width is no longer that of all heads either.
        if one.spec is not None and any(key[1] == "in" and key[0] in (one.reader, *layers) for key in removed):
            changes |= _forward_changes(model, *one.spec)
    return changes


def _forward_changes(model: nn.Module, name: str, spec: dict[str, Any]) -> _Changes:
    """What gives attention a forward of another width, and keeps torch's encoders from doing without it."""
    changes: _Changes = {}
    for place in [name[:i] for i, letter in enumerate(name) if letter == "."]:
        around = model.get_submodule(place)
        if isinstance(around, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            for inner, layer in around.named_modules(prefix=place):
                # 0: neither relu nor gelu, so that its fast path, which knows one width alone, is not taken.
                if isinstance(layer, nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu:
                    changes[inner, "activation_relu_or_gelu"] = (layer.activation_relu_or_gelu, 0)
    changes[name, "forward"] = (attention.forward_of(model.get_submodule(name)), spec)
    return changes


def _cut_groups(module: nn.Module, gone: list[int], read: list[int]) -> None:
    """Removes whole groups of channels.

    Args:
        gone: output channels. read: input channels.
    """
    groups = groups_of(module)
    if isinstance(module, nn.GroupNorm):
        outputs = inputs = module.num_channels
    else:
        assert isinstance(module, _ConvNd)
        outputs, inputs = module.out_channels, module.in_channels
    left = kept_indices(outputs, gone)
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


def cut_own_tensors(module: nn.Module, role: str, gone: list[int]) -> None:
    """Removes channels from what a subclass of a layer has beside weight and bias, such as gains of filters."""
    if width_of(module) is None:
        return
    linear = isinstance(module, nn.Linear)
    size = getattr(module, f"{'in' if role == 'in' else 'out'}_{'features' if linear else 'channels'}")
    left = kept_indices(size, gone)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        axis = int(role == "in")
        if name not in ("weight", "bias") and tensor.ndim > axis and tensor.shape[axis] == size:
            tensor.data = tensor.data.index_select(axis, torch.tensor(left, device=tensor.device))


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
