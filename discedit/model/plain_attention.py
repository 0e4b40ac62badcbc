"""Attention of the plain form, softmax(scale q'k + mask) v, whose queries and keys may have another width than values.

Where a module's own forward gives the same, it can run with this one, which takes all widths from its layers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from discedit.model.functional import attention_of_widths, class_of
from discedit.model.layers import is_close

_SCALES = ("scale", "scaling")  # attributes
# What a specification holds, as JSON has it; layers: name -> which of "q", "k", "v" it gives, in order.
_KINDS = {
    "layers": dict,
    "reader": str,  # of the heads; empty where it stands outside of the module
    "count": str,  # the attribute that counts heads
    "scale": float,
    "dropout": str,  # of the weights: an attribute, a rate or a layer; empty: none
    "explicit": bool,  # whether weights are computed as such, and then by a softmax in float32 whatever the type
    "single": bool,
    "behind": list,  # layers that run behind the reader
    "arguments": list,  # of the forward, by name; the first is what is read
    "mask": str,  # the argument that masks; empty: none
    "given": dict,  # other arguments -> the only value that they may have
    "returns": int,  # entries of the tuple that is returned; 0: the tensor itself
}


class NotPlain(ValueError):
    """Why attention is not of the plain form."""


def is_plain(spec: Any) -> bool:
    """Whether a value, perhaps of a file, can be what `plain_spec` gives."""
    if not isinstance(spec, Mapping) or {name: type(part) for name, part in spec.items()} != _KINDS:
        return False
    names = [*spec["layers"], *spec["layers"].values(), *spec["behind"], *spec["arguments"]]
    plain = all(isinstance(value, (bool, int, float, str)) for value in spec["given"].values())
    letters = sorted("".join(map(str, spec["layers"].values())))
    return plain and letters == ["k", "q", "v"] and bool(spec["arguments"]) and all(isinstance(n, str) for n in names)


def plain_attention(module: nn.Module, *args: Any, plain: Mapping[str, Any], **kwargs: Any) -> Any:
    """What a module gives, by its specification: see `plain_spec`."""
    x, mask = _read(module, plain, args, kwargs)
    q, k, v = _projected(module, plain, x)
    rate = _rate(module, plain["dropout"])
    shares: Tensor | None = None
    if plain["explicit"]:
        products = q @ k.transpose(-1, -2) * plain["scale"]
        products = products if mask is None else products + mask
        shares = products.softmax(-1, dtype=torch.float32).to(q) if plain["single"] else products.softmax(-1)
        shares = functional.dropout(shares, rate)
        mixed = shares @ v
    else:
        mixed = attention_of_widths(q, k, v, mask, rate, scale=plain["scale"])
    output = mixed.transpose(-2, -3).flatten(-2)
    for name in (plain["reader"], *plain["behind"]):
        output = module.get_submodule(name)(output) if name else output
    return (output, shares, None, None)[: plain["returns"]] if plain["returns"] else output


def _read(
    module: nn.Module, plain: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What attention reads, and its mask."""
    given = dict(zip(plain["arguments"], args, strict=False)) | dict(kwargs)
    x, mask = given.pop(plain["arguments"][0]), given.pop(plain["mask"], None)
    for name, value in given.items():
        if (
            value is not None
            and value is not False
            and (isinstance(value, Tensor) or name not in plain["given"] or value != plain["given"][name])
        ):
            raise ValueError(
                f"{type(module).__name__}: argument {name!r} must be left out, as in the example inputs that "
                f"dimensions of heads were pruned with, got {value if not isinstance(value, Tensor) else 'a tensor'!r}."
            )
    return x, mask


def _projected(module: nn.Module, plain: Mapping[str, Any], x: Tensor) -> list[Tensor]:
    """Queries, keys and values: (..., heads, positions, width of each)."""
    heads = getattr(module, plain["count"])
    found = {}
    for name, letters in plain["layers"].items():
        projected = module.get_submodule(name)(x)
        width = projected.shape[-1] // heads
        if len(letters) > 1:
            of_values = _reads(module, plain) // heads if "v" in letters else 0
            of_queries = (width - of_values) // (len(letters) - bool(of_values))
            parts = projected.split([heads * (of_values if letter == "v" else of_queries) for letter in letters], -1)
        else:
            parts = (projected,)
        for letter, part in zip(letters, parts, strict=True):
            found[letter] = torch.unflatten(part, -1, (heads, -1)).transpose(-2, -3)
    return [found[letter] for letter in "qkv"]


def _reads(module: nn.Module, plain: Mapping[str, Any]) -> int:
    reader: Any = module.get_submodule(plain["reader"])
    return int(reader.weight.shape[1])


def _rate(module: nn.Module, attribute: str) -> float:
    """Of dropout, now."""
    dropout: Any = getattr(module, attribute) if attribute else 0.0
    if isinstance(dropout, nn.Dropout):
        return dropout.p if dropout.training else 0.0
    return float(dropout) if module.training else 0.0


def plain_spec(
    module: nn.Module,
    layers: Sequence[tuple[str, int]],
    reader: str,
    count: str,
    call: tuple[tuple[Any, ...], Mapping[str, Any], Any],
    tolerance: float,
) -> dict[str, Any]:
    """What `plain_attention` needs to know to give what a module gives.

    Args:
        module: in eval mode; runs once more in train mode, to see its dropout.
        layers: that give queries, keys and values, by their names in it, and how many of these; in their order.
        reader: the layer that reads the heads, by its name in it; empty where it stands outside.
        count: the attribute that counts heads.
        call: arguments, arguments by name and output of a call.
        tolerance: of a difference, over the largest number.

    Raises:
        NotPlain: it gives something else, with the reason.
    """
    args, kwargs, output = call
    spec = _form(module, [name for name, _ in layers], reader, count, args, kwargs, output)
    kinds = (False, True) if spec["explicit"] else (False,)
    for letters, scale, single in itertools.product(_letters(layers), _scales(module, layers, count), kinds):
        found = spec | {"layers": letters, "scale": scale, "single": single}
        if _is_same(plain_attention(module, *args, plain=found, **kwargs), output, tolerance):
            found = _with_mask(module, found, args, kwargs, tolerance)
            return _with_dropout(module, found, args, kwargs, tolerance)
    raise NotPlain(
        "what it gives is not softmax(scale q'k) v of its projections, as with rotary or relative positions, or norms "
        "of queries and keys"
    )


def _form(
    module: nn.Module,
    layers: list[str],
    reader: str,
    count: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> dict[str, Any]:
    """What can be read off a module and a call, and what it must not have."""
    own = {layer: module.get_submodule(layer) for layer in (*layers, reader) if layer}
    known = {f"{layer}.{name}" for layer, part in own.items() for name, _ in part.named_parameters()}
    if further := [name for name, _ in module.named_parameters() if name not in known]:
        raise NotPlain(f"it has parameters beside its projections ({further[0]})")
    if odd := [layer for layer, part in own.items() if type(part) is not nn.Linear]:
        raise NotPlain(f"its {odd[0]} is a {type(own[odd[0]]).__name__}")
    if type(vars(module).get(count)) is not int:
        raise NotPlain("another module counts its heads")
    arguments = [*inspect.signature(class_of(module).forward).parameters][1:]
    given = dict(zip(arguments, args, strict=False)) | dict(kwargs)
    rest = {name: value for name, value in list(given.items())[1:] if value is not None and value is not False}
    masks = [name for name, value in rest.items() if isinstance(value, Tensor) and "mask" in name]
    if len(masks) > 1 or any(not isinstance(rest[n], (bool, int, float, str)) for n in rest if n not in masks):
        raise NotPlain(f"it is called with more than a mask ({', '.join(rest)})")
    parts = output if isinstance(output, tuple) else (output,)
    if (
        len(parts) > 4
        or not all(isinstance(part, Tensor) for part in parts[:1])
        or any(part is not None for part in parts[2:])
    ):
        raise NotPlain("it gives more than its output and its weights")
    return {
        "reader": reader,
        "count": count,
        "dropout": "",
        "explicit": len(parts) > 1 and parts[1] is not None,
        "behind": _behind(module, reader, args, kwargs) if reader else [],
        "arguments": arguments,
        "mask": masks[0] if masks else "",
        "given": {name: value for name, value in rest.items() if name not in masks},
        "returns": len(parts) if isinstance(output, tuple) else 0,
    }


def _behind(module: nn.Module, reader: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Layers that a module calls after the one that reads the heads."""
    called: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    handles = [part.register_forward_pre_hook(noting(name)) for name, part in module.named_modules() if name]
    try:
        class_of(module).forward(module, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return called[called.index(reader) + 1 :]


def _letters(layers: Sequence[tuple[str, int]]) -> Iterator[dict[str, str]]:
    """What layers may give, the usual first: queries, keys, values."""
    for letters in itertools.permutations("qkv"):
        each = iter(letters)
        yield {name: "".join(itertools.islice(each, number)) for name, number in layers}


def _scales(module: nn.Module, layers: Sequence[tuple[str, int]], count: str) -> list[float]:
    name, number = layers[0]
    first: Any = module.get_submodule(name)
    width = len(first.weight) // number // getattr(module, count)
    kept = [value for attribute in _SCALES if isinstance(value := getattr(module, attribute, None), float)]
    return list(dict.fromkeys([width**-0.5, *kept]))


def _with_mask(
    module: nn.Module, spec: dict[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """With an argument that masks, if it was not given but would do the same: exporters make one up."""
    name = next((name for name in spec["arguments"] if "mask" in name), "")
    if spec["mask"] or not name:
        return spec
    found = spec | {"mask": name}
    given = dict(zip(spec["arguments"], args, strict=False)) | dict(kwargs)
    x = given[spec["arguments"][0]]
    numbers = torch.randn((1, 1, x.shape[-2], x.shape[-2]), generator=torch.Generator().manual_seed(0))
    for mask in (numbers.to(x), (numbers > 0).to(x.device)):
        try:
            expected = class_of(module).forward(module, **given | {name: mask})
            if not _is_same(plain_attention(module, plain=found, **given | {name: mask}), expected, tolerance):
                return spec
        except Exception:  # it takes masks of another shape
            return spec
    return found


def _with_dropout(
    module: nn.Module, spec: dict[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """With what gives the same in train mode, from the same random numbers."""
    names = [name for name, part in module.named_children() if isinstance(part, nn.Dropout)]
    names += [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    names = [name for name in names if name not in spec["behind"]]
    names.sort(key=lambda name: "att" not in name)

    def drawn(forward: Callable[..., Any], **more: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return forward(module, *args, **kwargs, **more)

    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        expected = drawn(class_of(module).forward)
        for name, explicit in itertools.product([*names, ""], dict.fromkeys((spec["explicit"], True))):
            found = spec | {"dropout": name, "explicit": explicit}
            if _is_same(drawn(plain_attention, plain=found), expected, tolerance):
                return found
    finally:
        for part, mode in modes:
            part.training = mode
    raise NotPlain("in train mode it does not just drop some of its weights")


def _is_same(found: Any, expected: Any, tolerance: float) -> bool:
    if not isinstance(expected, tuple):
        return is_close(found, expected, tolerance)
    pairs = zip(found, expected, strict=True)
    return all((other is None) or is_close(one, other, tolerance) for one, other in pairs)
