"""Layers whose weights a model hands to functions, called as if it had called them, so that hooks see all there is.

Attention does so: `torch.nn.MultiheadAttention` with its output projection, others where they put a bias together.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_ATTENTION = functional.multi_head_attention_forward
_PARAMETERS = inspect.signature(_ATTENTION)
_DEEP = 16  # frames between a function and the module that calls it


class LayersCalled(TorchFunctionMode):
    """Entered around passes of a model: `functional.linear` with the weight of a linear layer is a call of the layer.

    Args:
        for_graph: whether the graph of autograd is looked at: a bias that is not the layer's own is then added behind
            it, and a `MultiheadAttention` runs as a whole.
    """

    def __init__(self, model: nn.Module, *, for_graph: bool = False) -> None:
        super().__init__()
        self.for_graph = for_graph
        self._model = model
        self._acted = self._entered = False
        self._layers: dict[int, nn.Linear] = {}  # by the identity of their weights

    def __enter__(self) -> LayersCalled:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._entered = True
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._entered:
            self._entered = False
            super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def rest(self) -> None:
        """Leaves at once where nothing that ran so far needed it: each function that runs costs some microseconds."""
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if not self._acted and modes and modes[-1] is self:  # not where the loader has entered one of its own
            self.__exit__(None, None, None)

    def _layer_of(self, weight: Any) -> nn.Linear | None:
        """The layer that has this weight now: edits replace weights."""
        if not isinstance(weight, nn.Parameter):
            return None
        known = self._layers.get(id(weight))
        if known is None or known._parameters.get("weight") is not weight:
            layers = (module for module in self._model.modules() if isinstance(module, nn.Linear))
            # A subclass with a forward of its own does more than the function that it would stand for.
            plain = (layer for layer in layers if type(layer).forward is nn.Linear.forward)
            self._layers = {id(layer._parameters.get("weight")): layer for layer in plain}
        return self._layers.get(id(weight))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            caller = _caller(sys._getframe(1))
            # `nn.Linear.forward` calls this function too: to call the layer for that would never end.
            called = caller is not None and caller._parameters.get("weight") is given["weight"]
            layer = None if called else self._layer_of(given["weight"])
            if layer is not None:
                self._acted = True
                bias = given.get("bias")
                apart = self.for_graph and bias is not layer.bias and bias is not None
                with _bias_of(layer, None if apart else bias):
                    output = layer(given["input"])
                return output + bias if apart else output
        elif func is _ATTENTION and not self.for_graph:
            module = _caller(sys._getframe(1))
            if isinstance(module, nn.MultiheadAttention) and not why_not_explicit(module):
                given = _PARAMETERS.bind(*args, **kwargs).arguments
                kept = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
                options = {name: given[name] for name in kept if name in given}
                self._acted = True  # inside, it does not; the module itself calls its output projection
                return attend(module, *args[:3], batch_first=False, **options)
        return func(*args, **kwargs)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, or that which it had before it was given a forward for other widths (`_attention`)."""
    cls = type(module)
    return cls.__mro__[2] if hasattr(cls, "narrow_spec") else cls


def why_not_explicit(module: nn.MultiheadAttention) -> str:
    """Why `attend` is not the same as the module; empty when it is."""
    if class_of(module).forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
        return "its forward is not that of torch's class"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own to those that it is given"
    return ""


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.MultiheadAttention` gives, for any number of heads of any width, with its layers called.

    Args:
        module: with `num_heads`; the width of its heads is that of its projections over their number.
        batch_first: in place of the module's own.
        scale: of products, by default one over the root of the width of queries.
        Others: as torch has them; an attn_mask of three axes has one entry per sample and head.
    """
    batched = query.ndim == 3
    first = module.batch_first if batch_first is None else batch_first
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    separate = module.in_proj_weight is None
    values = module.out_proj.weight.shape[1]
    weights: Sequence[Tensor] = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if not separate:
        queries = (len(module.in_proj_weight) - values) // 2  # as wide as keys, but perhaps not as values
        weights = torch.split(module.in_proj_weight, [queries, queries, values])
    biases: Sequence[Tensor | None] = (None, None, None)
    if module.in_proj_bias is not None:
        biases = torch.split(module.in_proj_bias, [len(weight) for weight in weights])
    q, k, v = (
        torch.unflatten(functional.linear(x, weight, bias), -1, (module.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    if is_causal and attn_mask is None:
        raise ValueError("MultiheadAttention: is_causal needs an attn_mask, got None.")
    # As in torch, the hint replaces the mask only where nothing else hides keys and no weights are asked for.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q)
    dropout = module.dropout if module.training else 0.0
    shares: Tensor | None = None
    if need_weights:
        # Scaled before the product, as torch does where it gives the weights.
        products = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        shares = (products if mask is None else products + mask).softmax(-1)
        shares = functional.dropout(shares, dropout) if dropout else shares
        mixed = shares @ v
        shares = shares.mean(1) if average_attn_weights else shares
    else:
        mixed = attention_of_widths(q, k, v, mask, dropout, causal, scale=scale)
    output: Tensor = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if not batched:
        return output.squeeze(0), None if shares is None else shares.squeeze(0)
    return output if first else output.transpose(0, 1), shares


def attention_of_widths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """`scaled_dot_product_attention`; the narrower of queries (and keys) and values get zeros, since torch's fast
    kernels know one width alone: without them it took twice as long as with (197 positions, on the CPU)."""
    width, of_queries, of_values = max(q.shape[-1], v.shape[-1]), q.shape[-1], v.shape[-1]
    if of_queries < width:
        scale = of_queries**-0.5 if scale is None else scale
        q, k = (functional.pad(x, (0, width - of_queries)) for x in (q, k))
    if of_values < width:
        v = functional.pad(v, (0, width - of_values))
    mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
    return mixed[..., :of_values] if of_values < width else mixed


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as numbers to add, for (samples, heads, queries, keys)."""

    # In masks of `MultiheadAttention` True hides; `scaled_dot_product_attention` would take it for what is seen.
    def numbers(mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype is torch.bool else mask

    found: Tensor | None = None
    if attn_mask is not None:
        if attn_mask.ndim == 3 and len(attn_mask) != len(q) * q.shape[1]:
            raise ValueError(
                "MultiheadAttention: an attn_mask of three axes must have one entry per sample and head, "
                f"{len(q)} x {q.shape[1]}, got {len(attn_mask)}."
            )
        found = numbers(attn_mask)
        found = torch.unflatten(found, 0, (len(q), q.shape[1])) if found.ndim == 3 else found
    if key_padding_mask is not None:
        padding = numbers(key_padding_mask)[:, None, None, :]
        found = padding if found is None else found + padding
    return found


def _caller(frame: FrameType | None) -> nn.Module | None:
    """The module in whose method a function was called, perhaps by other functions."""
    for _ in range(_DEEP):
        if frame is None:
            return None
        # A method has its module as the first argument, whatever it is called there.
        names = frame.f_code.co_varnames
        first = frame.f_locals.get(names[0]) if names and frame.f_code.co_argcount else None
        if isinstance(first, nn.Module):
            return first
        frame = frame.f_back
    return None


@contextmanager
def _bias_of(layer: nn.Linear, bias: Tensor | None) -> Iterator[None]:
    own = layer._parameters["bias"]
    layer._parameters["bias"] = bias  # type: ignore[assignment]
    try:
        yield
    finally:
        layer._parameters["bias"] = own
