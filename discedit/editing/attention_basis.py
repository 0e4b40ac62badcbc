"""The basis in which dimensions of heads can go one by one: the same function, in the order of what they give to it.

Attention logits are q'k, so the best r of d dimensions of a head are no choice of axes. With L_q and L_k the Cholesky
factors of the second moments of its queries and keys, and the singular value decomposition L_q' L_k = U s V', queries
s^1/2 U' L_q^-1 q and keys s^1/2 V' L_k^-1 k have the same products. Their first r dimensions make the best products
of rank r, for queries and keys that are independent. The same holds for values and the weights that read them.

Source: for values, MoDeGPT (Lin et al., 2408.09632), which decomposes weights in the metric of what they read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from discedit.graph.pruning_graph import Graph, Projections
from discedit.model.forward import call, frozen_eval, hooked
from discedit.recipes.operations import Operation

RIDGE = 1e-6  # of the mean of the diagonal of second moments: directions that nothing uses stay where they are
_MULTIHEAD = {"q": "query", "k": "key"}  # arguments


@dataclass
class Basis:
    """Other values for parameters of attention.

    Attributes:
        importances: name -> (dimensions,) float64: the share of the second moments of all heads' logits ("qk") or
            outputs ("vo") that is lost when a dimension and all behind it are gone.
        whole: tensor -> its values before.
        parts: name -> (tensor, axis, indices there, new values at these).
    """

    importances: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[tuple[str, int, Tensor, Tensor]]] = field(default_factory=dict)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """All tensors, with the new values of some names alone."""
        found = {name: tensor.clone() for name, tensor in self.whole.items()}
        for name in names:
            for tensor, dim, index, values in self.parts[name]:
                found[tensor].index_copy_(dim, index, values)
        return found

    def operations(self, names: Iterable[str]) -> tuple[list[Operation], dict[str, Tensor]]:
        """What gives a model the new values of some names, as recipes have it."""
        names = list(names)
        touched = dict.fromkeys(tensor for name in names for tensor, *_ in self.parts[name])
        values = self.tensors(names)
        tensors = {f"set.{i}": values[name].cpu() for i, name in enumerate(touched)}
        return [Operation("set", name) for name in touched], tensors


def balanced(op: str, graph: Graph, names: Iterable[str], inputs: Sequence[Any], *, around_mean: bool) -> Basis:
    """The basis for dimensions of heads.

    Args:
        names: of dimensions, in `graph.inner`.
        inputs: of the model, in parts.
        around_mean: whether the mean of values does not count, since something else makes up for it.
    """
    names = list(names)
    moments = _moments(graph, names, inputs, around_mean)
    basis = Basis()
    for name in names:
        projections, kind = graph.inner[name]
        if kind == "qk":
            first, second = moments[name, "q"], moments[name, "k"]
        else:
            [((tensor, _), rows)] = projections.places(graph.model, projections.rows["o"]).items()
            read = graph.model.get_parameter(tensor).detach().double().T[rows.to(moments[name, "o"].device)]
            first, second = read @ read.mT, moments[name, "o"]
        if not bool(first.isfinite().all() and second.isfinite().all()):
            raise ValueError(f"{op}: data must give finite queries, keys and values, {name} has NaN or Inf.")
        left, right, energy = balanced_pair(first, second)
        letters = {"q": left, "k": right} if kind == "qk" else {"o": left, "v": right}
        basis.parts[name] = []
        for letter, change in letters.items():
            _note(basis, name, graph.model, projections, letter, change)
        energy = energy.sum(0)
        basis.importances[name] = (energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp(min=1e-300)).cpu()
    return basis


def balanced_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For x'y the matrices A and B with A'B = I whose first rows give its best approximations by fewer products.

    Args:
        first, second: second moments of x and y, (heads, width, width), float64.

    Returns:
        A and B, (heads, width, width): E Ax x'A' = E By y'B' is diagonal, and falls; and what each product gives to the
        second moment of x'y, for x and y that are independent, (heads, width).
    """
    factors = [torch.linalg.cholesky(_ridged(moments)) for moments in (first, second)]
    u, s, v = torch.linalg.svd(factors[0].mT @ factors[1])
    root = s.sqrt()[..., None]
    # U' L^-1 is the transpose of L'^-1 U.
    left, right = (
        root * torch.linalg.solve_triangular(factor.mT, turn, upper=True).mT
        for factor, turn in zip(factors, (u, v.mT), strict=True)
    )
    return left, right, s.square()


def _ridged(moments: Tensor) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A head that gives nothing has any basis.
    ridge = torch.where(mean > 0, RIDGE * mean, 1.0)
    return moments + ridge[:, None, None] * torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)


def _note(basis: Basis, name: str, model: nn.Module, projections: Projections, letter: str, change: Tensor) -> None:
    """New values of what gives queries, keys or values, or reads these."""
    for (tensor, dim), rows in projections.places(model, projections.rows[letter]).items():
        whole = model.get_parameter(tensor).detach()
        basis.whole.setdefault(tensor, whole.clone())
        index = rows.flatten().to(whole.device)
        own = whole.double().index_select(dim, index).movedim(dim, 0)
        turned = (change.to(own.device) @ own.reshape(*rows.shape, -1)).view_as(own).movedim(0, dim)
        basis.parts[name].append((tensor, dim, index, turned.to(whole.dtype)))


def _moments(
    graph: Graph, names: Sequence[str], inputs: Sequence[Any], around_mean: bool
) -> dict[tuple[str, str], Tensor]:
    """Second moments of each head's queries ("q") and keys ("k"), or of what attention makes of its values ("o"), of
    dimensions by name: (heads, width, width), float64."""
    sums: dict[tuple[str, str], _Sums] = {}
    handles = []
    for name in names:
        projections, kind = graph.inner[name]
        for letter in "qk" if kind == "qk" else "o":
            own = sums[name, letter] = _Sums()
            rows = projections.rows[letter]
            layer, role = next(iter(rows))
            weights = projections.places(graph.model, rows)
            place = projections.place if isinstance(role, int) else layer
            read = _read_rows if letter == "o" else partial(_projected, graph.model, weights)
            hook = partial(_see, own, letter, partial(read, next(iter(rows.values()))))
            handles.append(graph.model.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True))
    with hooked(handles), frozen_eval(graph.model):
        for batch in inputs if names else ():
            call(graph.model, batch)
    return {key: own.moments(around_mean=around_mean and key[1] == "o") for key, own in sums.items()}


class _Sums:
    def __init__(self) -> None:
        self.number = 0
        self.total: Any = 0.0
        self.gram: Any = 0.0

    def add(self, x: Tensor) -> None:
        """(rows, heads, width)."""
        self.number += len(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.total = self.total + x.sum(0, dtype=torch.float64)
        x = x.transpose(0, 1)
        self.gram = self.gram + (x.mT @ x).double()

    def moments(self, *, around_mean: bool) -> Tensor:
        mean, gram = self.total / self.number, self.gram / self.number
        found: Tensor = gram - mean[:, :, None] * mean[:, None, :] if around_mean else gram
        return found


def _see(sums: _Sums, letter: str, read: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(module, nn.MultiheadAttention):
        given = dict(zip(("query", "key"), args, strict=False)) | kwargs
        x = given[_MULTIHEAD[letter]]
        x = x.transpose(0, 1) if x.ndim == 3 and not module.batch_first else x
    else:
        x = args[0] if args else kwargs["input"]
    found: Tensor = read(x.detach())  # (..., positions, heads, width)
    if letter == "k":  # what all keys of a sample share shifts all logits of a query: softmax is blind to it
        found = found - found.mean(-3, keepdim=True)
    sums.add(found.flatten(0, -3))


def _read_rows(rows: Tensor, x: Tensor) -> Tensor:
    return x[..., rows.to(x.device)]


def _projected(model: nn.Module, weights: Any, rows: Tensor, x: Tensor) -> Tensor:
    tensors = [model.get_parameter(name).detach()[rows.to(x.device).flatten()] for name, _ in weights]
    return torch.unflatten(functional.linear(x, *tensors), -1, tuple(rows.shape))
