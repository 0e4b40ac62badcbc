"""A forward pass that begins again in the middle: what was computed before a module ran is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from discedit.model.forward import call, hooked, map_tensors
from discedit.model.trace import ModelTrace


class _Kept(NamedTuple):
    """What a module gave."""

    output: Any
    used: bool  # by something that runs again


class Replay:
    """Runs a model on one batch from a module on, as often as that and what follows it change.

    The outermost modules that had ended before it began give what they gave; all else is computed. Inside
    `frozen_eval`.

    Args:
        trace: of the model, which does the same for this batch.
        inputs: the batch.
    """

    def __init__(self, trace: ModelTrace, inputs: Any) -> None:
        self.model, self.inputs = trace.model, inputs
        # Hooks that somebody has set would change a kept output once more.
        self._may_keep = {
            module: name
            for name, module in self.model.named_modules()
            if name and trace.runs.get(name) == 1 and not module._forward_hooks
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self._kept: dict[str, _Kept] = {}
        self.start = ""  # the module from which on it runs; empty: the whole model does

    def run(self) -> Any:
        """What the model gives now."""
        before = []
        for name, kept in self._kept.items():
            module = self.model.get_submodule(name)
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _giving(kept)
        try:
            return call(self.model, self.inputs)
        finally:
            for module, forward in before:
                if forward is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = forward

    def start_at(self, module: str) -> None:
        """Keeps what runs before a module, which must not be in front of the one before."""
        recording = _Recording(self.model.get_submodule(module), self._may_keep)
        with hooked(recording.handles), recording:
            self.run()
        self._kept, self.start = recording.kept(), module


def _giving(kept: _Kept) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        # What reads it may change it in place.
        return map_tensors(kept.output, Tensor.clone) if kept.used else kept.output

    return forward


class _Recording(TorchFunctionMode):
    """Sees which modules end before another begins, and which of their outputs are used outside of them."""

    def __init__(self, start: nn.Module, may_keep: dict[nn.Module, str]) -> None:
        super().__init__()
        self._begun = False
        self._within = [""]  # modules that run now
        self._outputs: dict[str, Any] = {}  # of the outermost modules that have ended
        # Module in which functions run -> identities of the tensors that they read. Outputs are held, so that no later
        # tensor takes the identity of one; that of one before is at worst kept in vain.
        self._read: dict[str, set[int]] = {}
        self.handles: list[RemovableHandle] = [start.register_forward_pre_hook(self._begin)]
        for module, name in may_keep.items():
            self.handles.append(module.register_forward_pre_hook(self._enter(name)))
            self.handles.append(module.register_forward_hook(self._leave(name)))

    def _begin(self, *_: Any) -> None:
        self._begun = True

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._begun:
                self._within.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not self._begun:
                self._within.pop()
                if _is_plain(output):
                    for seen in (self._outputs, self._read):
                        for inner in [key for key in seen if key == name or key.startswith(f"{name}.")]:
                            del seen[inner]
                    self._outputs[name] = output

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = self._read.setdefault("" if self._begun else self._within[-1], set())
        read.update(map(id, _tensors_of((*args, *(kwargs or {}).values()))))
        return func(*args, **(kwargs or {}))

    def kept(self) -> dict[str, _Kept]:
        used = set().union(*self._read.values())
        found = {}
        for name, output in self._outputs.items():
            if any(id(tensor) in used for tensor in _tensors_of((output,))):
                found[name] = _Kept(output, used=True)
            else:  # its shape alone is asked for, by modules that do not run
                found[name] = _Kept(map_tensors(output, lambda x: x.new_zeros(()).expand(x.shape)), used=False)
        return found


def _is_plain(output: Any) -> bool:
    """Whether an output is a tensor or a tuple of tensors, which can be given again."""
    return type(output) is Tensor or (type(output) is tuple and all(map(_is_plain, output)))


def _tensors_of(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_of(value)
