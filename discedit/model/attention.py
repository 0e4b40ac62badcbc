"""Attention that runs with fewer heads than its forward insists on.

`torch.nn.MultiheadAttention`, and much attention written by hand, takes the width of its heads for that of its input:
``reshape(B, N, C)``, ``C // num_heads``. Here such a module gets a forward in which that width is the one that its
output projection reads. It stays what it was otherwise: a module of a subclass of its class, with its parameters and
attributes, which runs under autograd, is copied, pickled, compiled and exported.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from discedit.model.functional import attend, class_of, why_not_explicit
from discedit.model.plain_attention import is_plain, plain_attention

_WINDOWS = "torchvision.models.swin_transformer.ShiftedWindowAttention"  # and V2
_SIZES = {"reshape", "view", "unflatten", "split", "split_with_sizes"}  # methods that are given widths


class Untraceable(ValueError):
    """Why channels, or a module's forward, cannot be followed."""


class NarrowAttention(nn.Module):
    """What a module is, beside its own class, while its forward is another."""

    narrow_spec: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        width = width_of_heads(self, self.narrow_spec["reader"])
        made = self.__dict__.get("_narrow")
        if made is None or made[0] != width:
            made = self._made()
        return made[1 if self.training else 2](self, *args, **kwargs)

    def _made(self) -> tuple[Any, ...]:
        """The width, and the forward in train and in eval mode."""
        made = (width_of_heads(self, self.narrow_spec["reader"]), *_forwards(self, self.narrow_spec))
        self.__dict__["_narrow"] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = getattr(class_of(self), "__getstate__", None)  # of objects in general from Python 3.11 on
        state = dict(self.__dict__ if own is None else own(self))
        state.pop("_narrow", None)
        return _rebuilt, (class_of(self), self.narrow_spec), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._made()  # now, so that nothing has to follow it when the module is compiled


def _rebuilt(base: type[nn.Module], spec: dict[str, Any]) -> nn.Module:
    narrow = _class_of(base, spec)
    return narrow.__new__(narrow)


def _class_of(base: type[nn.Module], spec: dict[str, Any]) -> type[nn.Module]:
    # Methods of NarrowAttention come first, all else from the module's class.
    return type(base.__name__, (NarrowAttention, base), {"narrow_spec": spec, "__module__": base.__module__})


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward of a module is called with, by name.

    Raises:
        TypeError, ValueError: it has no signature, or another one.
    """
    return dict(list(inspect.signature(class_of(module).forward).bind(module, *args, **kwargs).arguments.items())[1:])


def width_of_heads(module: nn.Module, reader: str) -> int:
    """How many channels the layer that reads the heads of a module reads; 0 where it stands elsewhere."""
    layer: Any = module.get_submodule(reader) if reader else None
    return int(layer.weight.shape[1]) if reader else 0


def forward_of(module: nn.Module) -> dict[str, Any] | None:
    """What `set_forward` was given; None: the module has the forward of its class."""
    return module.narrow_spec if isinstance(module, NarrowAttention) else None


def set_forward(module: nn.Module, spec: dict[str, Any] | None) -> None:
    """Gives a module a forward for heads of any number, or (None) its own again; see `spec_of`.

    Raises:
        ValueError: the module lacks a layer of which the spec speaks, or its forward cannot be followed.
    """
    layers = [] if spec is None else [*spec.get("layers", ()), spec["reader"], *spec.get("behind", ())]
    known = dict(module.named_modules())
    if missing := [layer for layer in layers if layer not in known]:
        raise ValueError(
            f"Recipe: the attention {type(module).__name__} must have a layer {missing[0]!r}, it has none."
        )
    wanted = [spec["count"], spec["dropout"]] if spec is not None and is_plain(spec) else []
    if missing := [attribute for attribute in wanted if attribute and not hasattr(module, attribute)]:
        raise ValueError(f"Recipe: the attention {type(module).__name__} must have {missing[0]!r}, it has none.")
    base = class_of(module)
    # What was made for the widths before.
    module.__dict__.pop("_narrow", None)
    module.__class__ = base if spec is None else _class_of(base, spec)
    if isinstance(module, NarrowAttention):
        module._made()


def spec_of(
    module: nn.Module,
    layers: list[str],
    reader: str,
    given: Mapping[str, Any],
    channels_last: bool,
    attributes: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What a forward for another number of heads needs to know; None where the module's own can stay.

    Args:
        module: the attention.
        layers: that give queries, keys and values, by their names in it.
        reader: the layer that reads the heads, by its name in it.
        given: arguments of the forward, by name, in a call.
        channels_last: whether the layers' channels are on the last axis; otherwise on axis 1.
        attributes: of the module, as they are with a head less.

    Raises:
        Untraceable: its forward cannot be followed.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward is not that of its class")
    before = forward_of(module)
    if isinstance(module, nn.MultiheadAttention):
        if why := why_not_explicit(module):
            raise Untraceable(why)
        return before or {"reader": reader}
    if is_plain(before):
        return None
    if f"{class_of(module).__module__}.{class_of(module).__name__}".startswith(_WINDOWS):
        return {"reader": reader}
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if not tensors:
        raise Untraceable("it is called without a tensor")
    spec = {
        "layers": layers,
        "reader": reader,
        "whole": width_of_heads(module, reader) if before is None else before["whole"],
        "given": {
            name: len(value) if isinstance(value, (tuple, list)) else 0
            for name, value in given.items()
            if value is not None
        },
        "ndim": tensors[0].ndim,
        "channels_last": channels_last,
    }
    return spec if _Narrowed(module, spec, training=False, attributes=attributes).changed else None


def shifted_windows(module: Any, x: Tensor) -> Tensor:
    """What torchvision's `ShiftedWindowAttention` and its V2 give, for any number of heads of any width.

    Args:
        module: with `window_size`, `shift_size`, `num_heads`, `qkv`, `proj` and its table of biases.
        x: (samples, height, width, channels).
    """
    sizes = x.shape[1:3]
    padded = [size + -size % window for size, window in zip(sizes, module.window_size, strict=True)]
    shifts = [
        # As in torchvision: where one window holds the whole map, there is nothing to shift into.
        0 if window >= size else shift
        for shift, window, size in zip(module.shift_size, module.window_size, padded, strict=True)
    ]
    x = functional.pad(x, (0, 0, 0, padded[1] - sizes[1], 0, padded[0] - sizes[0]))
    x = _cut(x.roll([-shift for shift in shifts], (1, 2)), module.window_size)
    q, k, v = torch.unflatten(_projected(module, x), -1, (3, module.num_heads, -1)).movedim(-2, -4).unbind(-2)
    scale = getattr(module, "logit_scale", None)
    if scale is None:
        products = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    else:  # V2: cosines
        products = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-1, -2)
        products = products * scale.clamp(max=math.log(100.0)).exp()
    products = products + module.get_relative_position_bias()
    if any(shifts):  # what lies side by side in a window, but not in the map, does not mix
        parts = torch.zeros(1, *padded, 1, device=x.device)
        for axis, (size, window, shift) in enumerate(zip(padded, module.window_size, shifts, strict=True), start=1):
            border = torch.arange(size, device=x.device)
            place = (border >= size - window).float() + ((border >= size - shift).float() if shift else 0)
            # In base 3, so that each combination of borders is a number of its own.
            parts = 3 * parts + place.view([-1 if dim == axis else 1 for dim in range(4)])
        parts = _cut(parts, module.window_size)
        apart = (parts != parts.transpose(-1, -2)).unsqueeze(-3).to(products.dtype)
        # torchvision's number, not -inf: the same digits as its own forward gives.
        products = products - 100.0 * apart
    shares = functional.dropout(products.softmax(-1), module.attention_dropout, module.training)
    x = functional.dropout(module.proj((shares @ v).transpose(-2, -3).flatten(-2)), module.dropout, module.training)
    x = torch.unflatten(x, 3, tuple(module.window_size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x.roll(shifts, (1, 2))[:, : sizes[0], : sizes[1]]


def _cut(x: Tensor, window: list[int]) -> Tensor:
    """(samples, height, width, channels) -> (samples, rows of windows, windows, places, channels)."""
    x = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4)


def _projected(module: Any, x: Tensor) -> Tensor:
    bias = module.qkv.bias
    if bias is None or getattr(module, "logit_scale", None) is None:
        projected: Tensor = module.qkv(x)
        return projected
    third = len(bias) // 3  # V2 does without biases of keys
    bias = torch.cat((bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]))
    return functional.linear(x, module.qkv.weight, bias)


def is_spec(value: Any) -> bool:
    """Whether a value of a file can be what `spec_of` gives."""
    if not isinstance(value, dict) or not isinstance(value.get("reader"), str):
        return False
    if set(value) <= {"reader", "scale"}:
        return type(value.get("scale", 1.0)) is float
    if is_plain(value):
        return True
    kinds = {"layers": list, "reader": str, "whole": int, "given": dict, "ndim": int, "channels_last": bool}
    return (
        {name: type(part) for name, part in value.items()} == kinds
        and all(isinstance(name, str) for name in value["layers"])
        and all(type(length) is int for length in value["given"].values())
    )


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _is_same(now: Any, before: Any) -> bool:
    """Whether it is the same object, or a container of the same objects."""
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(now[key] is value for key, value in before.items())
    if isinstance(before, (list, set)):
        return len(now) == len(before) and all(one is other for one, other in zip(now, before, strict=True))
    return now is before


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or what is made of buffers would be a constant

    def __init__(self, lengths: Mapping[str, int]) -> None:
        super().__init__()
        self.lengths = lengths  # of arguments that are tuples

    # Layers stay calls of layers, so that edits of them count and hooks see them.
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        length: Any = self.lengths.get(str(node.target)) if node.op == "placeholder" else None
        if node.op == "call_method" and node.target == "chunk":
            length = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return _Tuple(node, self, length) if type(length) is int and length else super().proxy(node)


class _Tuple(fx.Proxy):
    """Stands for a tuple of known length."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, length: int) -> None:
        super().__init__(node, tracer)
        self.__dict__["_length"] = length

    def __len__(self) -> int:
        return int(self.__dict__["_length"])

    def __iter__(self) -> Iterator[Any]:
        part: Any = super().__getitem__  # type: ignore[misc]
        return iter([part(index) for index in range(len(self))])


def _forwards(module: nn.Module, spec: Mapping[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A module's forward in train and in eval mode."""
    forward: Callable[..., Any]
    if "layers" not in spec or is_plain(spec):
        forward = partial(plain_attention, plain=spec)
        if "layers" not in spec:
            attends = isinstance(module, nn.MultiheadAttention)
            forward = partial(attend, scale=spec.get("scale")) if attends else shifted_windows
        return forward, forward
    return _Narrowed(module, spec, training=True).forward, _Narrowed(module, spec, training=False).forward


class _Narrowed:
    """A module's forward, followed, with the width of the heads in place of that of the input.

    The width is a number that the forward reads from the shape of its input (or of what does not come from the heads)
    and hands to what is made of the heads, up to the layer that reads them.
    """

    def __init__(
        self, module: nn.Module, spec: Mapping[str, Any], *, training: bool, attributes: Mapping[str, Any] | None = None
    ) -> None:
        self.spec = spec
        self.width = width_of_heads(module, spec["reader"])
        self.changed = False
        self._known: dict[fx.Node, Any] = {}  # what nodes become for the heads
        base = class_of(module)
        state = {name: value for name, value in module.__dict__.items() if name != "_narrow"} | {"training": training}
        state |= attributes or {}
        try:
            clone = base.__new__(base)  # with containers of its own, which a forward may write to
            clone.__dict__.update({name: _copied(value) for name, value in state.items()})
            parameters = inspect.signature(base.forward).parameters
            fixed = {
                name: parameter.default
                for name, parameter in list(parameters.items())[1:]
                if name not in spec["given"] and parameter.default is not parameter.empty
            }
            self.graph = _Tracer(spec["given"]).trace(clone, concrete_args=fixed)
            places = [node for node in self.graph.nodes if node.op == "placeholder"]
            for node, name in zip(places, [*parameters][1:], strict=True):
                if name in fixed:
                    node.target = name  # torch.fx numbers those that are fixed
        except Exception as error:  # whatever a forward makes of what has no value yet
            raise Untraceable(f"torch.fx cannot follow its forward ({error})") from error
        if clone.__dict__.keys() != state.keys() or not all(
            _is_same(clone.__dict__[name], state[name]) for name in state
        ):
            raise Untraceable("its forward keeps what it finds for the next call")
        self._rewrite()
        code = self.graph.python_code("self")
        scope = dict(code.globals)
        try:
            # Written by torch.fx from the forward of the module's own class; nothing of a file is run.
            exec(compile(code.src, f"<{base.__name__}.forward>", "exec"), scope)
        except SyntaxError as error:  # arguments in an order that torch.fx does not keep
            raise Untraceable(f"torch.fx cannot follow its forward ({error})") from error
        self.forward: Callable[..., Any] = scope["forward"]

    def _rewrite(self) -> None:
        for node in list(self.graph.nodes):
            if node not in self._heads:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._told)
            if (node.op == "call_method" and node.target in _SIZES) or node.target in (torch.reshape, torch.split):
                args, kwargs = fx.node.map_aggregate((args, kwargs), self._size)
            self.changed |= (args, kwargs) != (node.args, node.kwargs)
            node.args, node.kwargs = args, kwargs

    def _size(self, size: Any) -> Any:
        """A size that the module keeps: the width is the same number for it, whatever it stands for."""
        if type(size) is not int or size != self.spec["whole"]:
            return size
        self.changed = True
        return self.width

    @cached_property
    def _heads(self) -> set[fx.Node]:
        """What is made of the heads, and read by the reader: shapes behind it are those of the input again."""
        made, read = set[fx.Node](), set[fx.Node]()
        for node in self.graph.nodes:
            if not self._calls(node, self.spec["reader"]) and (
                self._calls(node, *self.spec["layers"]) or not made.isdisjoint(node.all_input_nodes)
            ):
                made.add(node)
        for node in reversed(self.graph.nodes):
            if node in read or self._calls(node, self.spec["reader"]):
                read |= made.intersection(node.all_input_nodes)
        return read

    def _calls(self, node: fx.Node, *layers: str) -> bool:
        """Whether a node calls one of these layers, be it with others or by a function that is handed its weight."""
        called = self._called(node)
        return bool(called) and any(layer == called or layer.startswith(f"{called}.") for layer in layers)

    def _called(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        if node.op == "call_function" and node.target is nn.functional.linear:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                return str(weight.target).removesuffix(".weight")
        return ""

    def _told(self, node: fx.Node) -> Any:
        """What a node that is no part of the heads becomes there: itself, unless it is made of the width."""
        if node in self._heads:
            return node
        if node not in self._known:
            self._known[node] = self.width if self._is_width(node) else node
            if self._known[node] is node and node.op == "call_function" and node.target in _ARITHMETIC:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._told)
                function: Any = node.target
                if not any(isinstance(arg, fx.Node) for arg in args):
                    self._known[node] = function(*args, **kwargs)
                elif (args, kwargs) != (node.args, node.kwargs):
                    with self.graph.inserting_after(node):
                        self._known[node] = self.graph.call_function(function, args, kwargs)
        return self._known[node]

    def _is_width(self, node: fx.Node) -> bool:
        """Whether a node is the number of channels of a tensor."""
        index: Any = None
        if node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            if not isinstance(source, fx.Node) or not _is_shape(source):
                return False
        elif node.op == "call_method" and node.target == "size":
            index = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if type(index) is not int:
            return False
        axis = self.spec["ndim"] - 1 if self.spec["channels_last"] else 1
        return bool(index % self.spec["ndim"] == axis)


_ARITHMETIC = {operator.floordiv, operator.truediv, operator.mul, operator.add, operator.sub, operator.pow, int, float}


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
