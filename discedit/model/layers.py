"""What a module does, found out by running it: a class says what a layer is meant to be, not what it became.

Subclasses pad by themselves, standardise their weights or add to them; norms have activations inside; hooks change what
is given. Closed forms write weights, and hold only where the weights are what the output is made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit.model.forward import frozen_eval

# Subclasses that pad by themselves often override the latter alone, which torch's forward calls.
METHODS = ("forward", "_conv_forward")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SAMPLES = 4  # that a module is tried on
ROUNDING, ROUNDING_OF_HALVES = 1000, 16  # units in the last place of the largest number


def why_not_plain(layer: nn.Module) -> str:
    """Why the output of a convolution or linear layer is not what its class makes of weight, bias and input; empty when
    it is. Weights that are computed (parametrized) are taken as they are now."""
    if is_own(layer):
        return ""
    x = input_of(layer)
    try:
        with frozen_eval(layer):
            own = {name: getattr(layer, name) for name in ("weight", "bias")}
            names = [name for name in own if isinstance(layer._parameters.get(name), Tensor)]
            drawn = {name: _numbers(own[name].shape, own[name]) for name in names}
            ours = functional_call(layer, drawn, (x,))
            theirs = as_its_class(layer, own | drawn, x)
    except Exception as error:  # whatever a forward of somebody's own may need
        return f"it is a {_name_of(layer)} that cannot be run by itself ({type(error).__name__}: {error})"
    if is_close(ours, theirs):
        return ""
    base = _base_of(layer).__name__
    return f"it is a {_name_of(layer)}, whose output is not what {base} makes of its weight and bias"


def is_affine(norm: _BatchNorm) -> bool:
    """Whether a batch norm with running statistics is a plain affine map per channel, with no activation inside."""

    def both(x: Tensor) -> tuple[Any, Tensor]:
        state = {}
        for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            if value.is_floating_point():
                # A variance must be positive; near 0 its root would blow up the rounding.
                drawn = _numbers(value.shape, value)
                state[name] = drawn.abs() + 0.5 if name == "running_var" else drawn
        weight, bias = state.get("weight"), state.get("bias")
        mean, variance = state["running_mean"], state["running_var"]
        plain = nn.functional.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)
        return functional_call(norm, state, (x,)), plain

    return is_own(norm) or _agree(norm, both)


def takes_constants(norm: _BatchNorm) -> bool:
    """Whether adding constants to the input of a batch norm and to its running mean leaves its output the same."""

    def both(x: Tensor) -> tuple[Any, Tensor]:
        assert norm.running_mean is not None
        constants = _numbers(norm.running_mean.shape, norm.running_mean)
        moved = x + constants.view(-1, *[1] * (x.ndim - 2))
        return functional_call(norm, {"running_mean": norm.running_mean + constants}, (moved,)), norm(x)

    return is_own(norm) or _agree(norm, both)


def _agree(module: nn.Module, both: Callable[[Tensor], tuple[Any, Any]]) -> bool:
    """Whether two ways to run a module on numbers of its kind give the same; not where one of them fails."""
    x = input_of(module)
    try:
        with frozen_eval(module):
            return is_close(*both(x))
    except Exception:  # whatever a forward of somebody's own may need
        return False


def is_own(module: nn.Module) -> bool:
    """Whether a module runs the code of torch's class, and nothing else."""
    base = _base_of(module)
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in METHODS)
    replaced = any(name in module.__dict__ for name in METHODS)
    return same and not replaced and not any(module.__dict__[name] for name in HOOKS)


def _base_of(module: nn.Module) -> type[nn.Module]:
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules."))


def _name_of(module: nn.Module) -> str:
    name = type(module).__name__
    return name if name != _base_of(module).__name__ else f"{name} with a forward or hooks of its own"


def as_its_class(layer: nn.Module, weights: Mapping[str, Tensor | None], x: Tensor) -> Any:
    """What the class of torch gives, without what was added to this instance."""
    base = _base_of(layer)
    # Not a copy of the layer: its class, its hooks and its own methods are what is to be left out.
    plain = base.__new__(base)
    plain.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in METHODS})
    plain.__dict__["_parameters"] = dict(weights)
    plain.__dict__ |= {name: OrderedDict() for name in HOOKS}
    return base.forward(plain, x)


def input_of(module: nn.Module) -> Tensor:
    """Numbers of a kind that the module reads: maps just large enough to show how their borders are padded."""
    shape: tuple[int, ...]
    if isinstance(module, _ConvNd):
        spans = zip(module.dilation, module.kernel_size, module.stride, strict=True)
        shape = (SAMPLES, module.in_channels, *(d * (k - 1) + 2 + 2 * s for d, k, s in spans))
    elif isinstance(module, nn.Linear):
        shape = (SAMPLES, module.in_features)
    else:
        assert isinstance(module, _BatchNorm)
        dims = 0 if isinstance(module, nn.BatchNorm1d) else 3 if isinstance(module, nn.BatchNorm3d) else 2
        shape = (SAMPLES, module.num_features, *[2] * dims)
    tensors = (*module.parameters(), *module.buffers())
    return _numbers(shape, next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0)))


def _numbers(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same for the same sizes; torch's own random state is left alone."""
    generator = torch.Generator(like.device).manual_seed(len(shape))
    return torch.randn(tuple(shape), generator=generator, device=like.device, dtype=like.dtype)


def is_close(one: Any, other: Any, tolerance: float | None = None) -> bool:
    """Whether two outputs are the same tensor but for a share of the largest number, by default for rounding; what is
    not finite must be the same."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == other).all())
    units = ROUNDING if one.element_size() >= 4 else ROUNDING_OF_HALVES
    share = units * torch.finfo(one.dtype).eps if tolerance is None else tolerance
    same = (one == other) | (one.isnan() & other.isnan())
    # And 1e-12, since of numbers that are all 0 no share allows any rounding.
    off, size = (one - other).abs().masked_fill(same, 0), one.abs().masked_fill(~one.isfinite(), 0)
    return not one.numel() or float(off.max()) <= share * float(size.max()) + 1e-12
