"""An optimizer that was built before an edit, made over for the edited model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from discedit.recipes.operations import Operation

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
_Cuts = list[tuple[int, Tensor]]  # of one tensor: dimensions, each with the indices that stay, in order


@torch.no_grad()
def carried(
    optimizer: OptimizerT, names: Mapping[Tensor, str], model: nn.Module, operations: Iterable[Operation]
) -> OptimizerT:
    """The same optimizer over an edited model, with its state cut as its parameters were; see `Edit.optimizer`.

    Args:
        optimizer: unchanged; nothing is shared with it.
        names: of the parameters before the edit.
        model: as the edit left it.
        operations: of the edit.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Edit.optimizer: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    held: list[Tensor] = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    if unknown := sum(parameter not in names for parameter in held):
        raise ValueError(
            "Edit.optimizer: optimizer must hold parameters of the model before the edit, "
            f"{unknown} of its {len(held)} are not in it."
        )
    present = dict(model.named_parameters(remove_duplicate=False))
    # By identity: an operation may call a tensor that hangs in several places by another name.
    cuts: dict[int, _Cuts] = {}
    for operation in operations:
        if operation.kind == "keep" and operation.target in present:
            index = torch.tensor(operation.index, dtype=torch.int64)
            cuts.setdefault(id(present[operation.target]), []).append((operation.dim, index))
    parameters = [present.get(names[old]) for old in held]
    packed = optimizer.state_dict()
    for i, (old, new) in enumerate(zip(held, parameters, strict=True)):
        cut = cuts.get(id(new), [])
        shape = list(old.shape)
        for dim, index in cut:
            shape[dim] = len(index)
        if new is None or list(new.shape) != shape:
            found = "gone" if new is None else f"of shape {list(new.shape)} instead of {shape}"
            raise ValueError(
                f"Edit.optimizer: edit.model must be as the edit left it, its parameter {names[old]!r} is {found}."
            )
        if i in packed["state"]:
            state = packed["state"][i]
            packed["state"][i] = {key: _cut(optimizer, key, value, old, cut) for key, value in state.items()}
    rest = iter(parameters)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
    # AdamW keeps a default that its constructor does not take; the groups carry all of them.
    known = inspect.signature(type(optimizer)).parameters
    made = type(optimizer)(groups, **{name: value for name, value in optimizer.defaults.items() if name in known})
    made.load_state_dict(packed)
    return made


def _cut(optimizer: Optimizer, key: str, value: Any, old: Tensor, kept: _Cuts) -> Any:
    if not isinstance(value, (Tensor, list, tuple, dict)):
        return copy.copy(value)
    if isinstance(value, Tensor) and value.shape == old.shape:
        for dim, index in kept:
            value = value.index_select(dim, index.to(value.device))
        return value if kept else value.clone()
    # A count of steps, which holds for the parameter as a whole.
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.clone()
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    raise ValueError(
        "Edit.optimizer: optimizer must keep numbers and tensors of its parameters' shapes, "
        f"{type(optimizer).__name__} keeps {key!r} of {found} for a parameter of shape {tuple(old.shape)}; build a new "
        "one over edit.model.parameters()."
    )
