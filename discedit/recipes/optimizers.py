"""Optimizers and edits: one that was built before an edit holds parameters that the edited model does not have."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

RESTORED = "restored"
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

# Both forget a parameter when nobody holds it any more, so that a step without old parameters costs nothing.
_replaced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> what was done to the model it hung in
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> {edited copy of its model: what was done}


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """All of an optimizer's parameters, in the order in which its state dict numbers them."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def watch(before: Iterable[nn.Parameter], source: nn.Module, result: nn.Module, event: str) -> None:
    """From now on, the step of an optimizer over parameters that an edit left behind is an error.

    Parameters that an edit in place has replaced are refused before the step. A model of which an edit made a copy may
    still be trained: its optimizer is refused only when it found no gradient at all and the copy has some. That is
    asked after the step, which then did nothing, because a closure computes gradients within it. Compiled steps are
    not checked.

    Args:
        before: the parameters of `source` before the edit.
        source: the model that was edited.
        result: `source` itself, or the edited copy.
        event: what was done to the model: "pruned", "edited" or RESTORED, which is undoing.
    """
    _register_hooks()
    if result is source:
        present = {id(parameter) for parameter in result.parameters()}
        for parameter in before:
            if id(parameter) not in present:
                _replaced[parameter] = event
        return
    # A copy of a copy also descends from the first model; the copy between them may not live long.
    for parameter in _copies:
        if source in _copies[parameter]:
            _copies[parameter][result] = event
    fresh: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
    for parameter in before:
        if parameter not in _copies:
            _copies[parameter] = fresh
        _copies[parameter][result] = event


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_refuse_replaced)
    register_optimizer_step_post_hook(_refuse_originals)


def _refuse_replaced(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not len(_replaced):
        return
    events = [_replaced[parameter] for parameter in parameters_of(optimizer) if parameter in _replaced]
    if events:
        raise _left_behind(events[0], len(events))


def _refuse_originals(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not len(_copies):
        return
    parameters = parameters_of(optimizer)
    if any(parameter.grad is not None for parameter in parameters):
        return
    found = [_copies[parameter] for parameter in parameters if parameter in _copies]
    for copies in {id(copies): copies for copies in found}.values():
        for model, event in copies.items():
            if any(parameter.grad is not None for parameter in model.parameters()):
                raise _left_behind(event, len(found))


def _left_behind(event: str, count: int) -> RuntimeError:
    remedy = "edit.model.parameters(), or take edit.optimizer(optimizer)"
    if event == RESTORED:
        remedy = "the parameters of the model that undo gave"
    return RuntimeError(
        f"optimizer was built before the model was {event} and holds {count} parameters that are no longer in it; "
        f"build a new one over {remedy}."
    )


@torch.no_grad()
def carried(optimizer: OptimizerT, parameters: list[nn.Parameter], kept: list[list[tuple[int, Tensor]]]) -> OptimizerT:
    """The same optimizer over other parameters, with its state cut as they were.

    Args:
        optimizer: unchanged; nothing is shared with it.
        parameters: what takes the place of each of its parameters, in `parameters_of`'s order.
        kept: what is left of each: dimensions, each with the indices that stay, in order.

    Raises:
        ValueError: state that is neither a number nor of its parameter's shape, which nobody knows how to cut.
    """
    packed = optimizer.state_dict()
    for i, old in enumerate(parameters_of(optimizer)):
        if i in packed["state"]:
            packed["state"][i] = {
                key: _cut(optimizer, key, value, old, kept[i]) for key, value in packed["state"][i].items()
            }
    rest = iter(parameters)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
    # AdamW keeps a default that its constructor does not take; the groups carry all of them.
    known = inspect.signature(type(optimizer)).parameters
    new = type(optimizer)(groups, **{name: value for name, value in optimizer.defaults.items() if name in known})
    new.load_state_dict(packed)
    return new


def _cut(optimizer: Optimizer, key: str, value: Any, old: Tensor, kept: list[tuple[int, Tensor]]) -> Any:
    if not isinstance(value, (Tensor, list, tuple, dict)):
        return copy.copy(value)
    if isinstance(value, Tensor) and value.shape == old.shape:
        for dim, index in kept:
            value = value.index_select(dim, index.to(value.device))
        return value if kept else value.clone()
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.clone()
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    raise ValueError(
        "Edit.optimizer: optimizer must keep numbers and tensors of its parameters' shapes, "
        f"{type(optimizer).__name__} keeps {key!r} of {found} for a parameter of shape {tuple(old.shape)}; build a new "
        "one over edit.model.parameters()."
    )
