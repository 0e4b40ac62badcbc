"""How sure a score is: standard errors, and covariances from few samples.

Errors are on the scale of the separation r = sqrt(b / (1 - b)) of a bound b, which is k for `minimax` and sqrt(F / 2)
for `fisher`: estimates of r are all but normal where those of b, squeezed between 0 and 1, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from discedit import ops
from discedit.backends import arguments, reference
from discedit.common import validation
from discedit.common.state import ClassMoments, State, VectorMoments, triangle

Kind = TypeVar("Kind", ClassMoments, VectorMoments, State)


def separation(bound: Tensor) -> Tensor:
    """r = sqrt(b / (1 - b)) of a bound b in [0, 1]; infinite at 1.

    >>> separation(torch.tensor([0.0, 0.5, 0.8]))
    tensor([0., 1., 2.])
    """
    return (bound / (1 - bound)).sqrt()


def standard_error(moments: ClassMoments, *, bound: str = "minimax", witness: str = "linear") -> Tensor:
    """Standard error of the separation of each class from the rest, by the delta method from moments up to order 4.

    First order in 1 / n, with n - 1 for n, for samples that are independent within a class.

    Args:
        moments: state of one layer.
        bound: "minimax" or "fisher".
        witness: "linear", or "exp" for the state of exp(-scale t); for others see `jackknife`.

    Returns:
        Shape (channels, classes), float64, at least 0. NaN where a class or its rest has fewer than two samples.

    Raises:
        TypeError: moments is no `ClassMoments`.
        ValueError: another bound or witness.

    Equivalent to the standard deviation of ``(mean1 - mean2) / (std1 + std2)`` over repeated samples, to first order.

    Source: the delta method, e.g. van der Vaart 1998, chapter 3.

    >>> x = torch.tensor([[0.0], [2.0], [0.0], [2.0], [3.0], [5.0], [3.0], [5.0]])
    >>> standard_error(ops.class_moments(x, torch.arange(8) // 4, 2))
    tensor([[0.4082, 0.4082]], dtype=torch.float64)
    """
    op = "standard_error"
    if not isinstance(moments, ClassMoments):
        raise TypeError(f"{op}: moments must be a ClassMoments, got {type(moments).__name__}.")
    arguments.state(op, "moments", moments)
    validation.choice(op, "bound", bound, ("minimax", "fisher"))
    validation.choice(op, "witness", witness, ("linear", "exp"))
    columns = [_delta_method(own, rest, bound)[0] for own, rest in reference.classes_and_rest(moments)]
    return torch.stack(columns, dim=-1)


def _delta_method(own: ClassMoments, rest: ClassMoments, bound: str) -> Tensor:
    laws = []
    for law in (own, rest):
        n = law.count.clamp(min=1).double()[:, None]
        laws.append((law.m2 / n, law.m3 / n, law.m4 / n, n))
    var1, var2 = laws[0][0], laws[1][0]
    total = var1.sqrt() + var2.sqrt() if bound == "minimax" else (2 * (var1 + var2)).sqrt()
    scale = torch.where(total > 0, 1 / total, 0.0)
    r = (own.mean - rest.mean) * scale
    error = torch.zeros_like(r)
    for sign, (var, third, fourth, n) in zip((1.0, -1.0), laws, strict=True):
        # Influence of one sample t of this law on r: scale (t - mean) + slope ((t - mean)^2 - var), up to sign.
        half = var.sqrt() * total if bound == "minimax" else (var1 + var2)
        slope = torch.where(half > 0, -r / (2 * half), 0.0)
        spread = scale**2 * var + 2 * sign * scale * slope * third + slope**2 * (fourth - var**2)
        # A variance, which rounding may leave below 0.
        error = error + spread.clamp(min=0) / (n - 1).clamp(min=1)
    enough = ((own.count > 1) & (rest.count > 1))[:, None]
    return torch.where(enough, error.sqrt(), torch.nan)


def jackknife(
    blocks: Sequence[Kind],
    *,
    bound: str = "minimax",
    witness: str | None = None,
    shrinkage: str | float | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Standard error of the separation of each class from the rest, by leaving out one block of the samples at a time.

    Take at least 10 blocks with each class spread evenly over them, as `discedit.collect_blocks` does.

    Args:
        blocks: at least two states of one layer, of disjoint parts of the samples.
        bound, witness, backend, options: as for `ops.one_vs_rest`; any bound but "certified".
        shrinkage: for `VectorMoments`, that of each state that lacks a block, as in `shrink`; None: none.

    Returns:
        Shape (channels, classes), float64, at least 0. NaN for a class with fewer samples than there are blocks, and
        where a bound is 1 or NaN.

    Raises:
        TypeError: blocks is no sequence of states.
        ValueError: fewer than two blocks, blocks of different kinds or shapes, and whatever `one_vs_rest` refuses.

    Equivalent to ``((g - 1) / g * ((r - r.mean(0)) ** 2).sum(0)).sqrt()`` over the r of the g states that lack a block.

    Source: Quenouille 1956, Tukey 1958; delete-a-group as in Shao and Tu 1995, section 2.3.

    >>> x = torch.tensor([[0.0], [2.0], [0.0], [2.0], [3.0], [5.0], [3.0], [5.0]])
    >>> part = torch.arange(8) % 4 // 2
    >>> blocks = [ops.class_moments(x[part == b], torch.arange(8)[part == b] // 4, 2) for b in range(2)]
    >>> jackknife(blocks, witness="linear")
    tensor([[0., 0.]], dtype=torch.float64)
    """
    op = "jackknife"
    if isinstance(blocks, State) or not isinstance(blocks, Sequence):
        raise TypeError(f"{op}: blocks must be a sequence of states, got {type(blocks).__name__}.")
    if len(blocks) < 2:
        raise ValueError(f"{op}: blocks must be at least two states, got {len(blocks)}.")
    if bound == "certified":
        raise ValueError(f"{op}: bound must not be 'certified', which accounts for the size of the sample itself.")
    for block in blocks:
        arguments.state(op, "blocks", block)
    # Merged from both ends: some merges for each block, in place of one for every pair of them.
    after: list[Kind] = [blocks[-1]]  # in the end after[i]: blocks i + 1 and later
    for block in reversed(blocks[1:-1]):
        after.insert(0, ops.merge_moments(after[0], block))
    separations, before = [], None
    for index, block in enumerate(blocks):
        others = after[0] if before is None else before
        if before is not None and index < len(after):
            others = ops.merge_moments(before, after[index])
        seen = shrink(others, shrinkage) if isinstance(others, VectorMoments) and shrinkage is not None else others
        bounds = ops.one_vs_rest(seen, bound=bound, witness=witness, backend=backend, **options)
        separations.append(separation(bounds))
        before = block if before is None else ops.merge_moments(before, block)
    r = torch.stack(separations)
    error = ((len(blocks) - 1) / len(blocks) * ((r - r.mean(0)) ** 2).sum(0)).sqrt()
    # Some blocks then lack the class, and leaving those out shows nothing of it.
    thin = torch.stack([block.count for block in blocks]).sum(0) < len(blocks)
    return torch.where(thin, torch.nan, error)


def shrink(moments: VectorMoments, intensity: str | float = "auto") -> VectorMoments:
    """The state with each class's covariance drawn towards a multiple of the identity.

    With no more samples than dimensions a covariance is singular, and a bound computed from it says that the classes
    are apart whatever they are. In units of the deviations within classes, S becomes (1 - rho) S + rho m I, m the mean
    of S's diagonal; docs/bounds.md has the formula. A coordinate that is constant within all classes stays as it is.

    Args:
        moments: state of one layer.
        intensity: rho in 0..1 for every class; or "auto": none for d <= 2 and for classes with more than d samples, and
            for the others the oracle approximating estimate.

    Returns:
        A new state with the same counts and means.

    Raises:
        TypeError: moments is no `VectorMoments`.
        ValueError: intensity is neither "auto" nor a number in 0..1.

    Source: Ledoit and Wolf 2004 (the estimator); Chen, Wiesel, Eldar and Hero 2010 (the intensity).

    >>> x = torch.tensor([[[0.0, 0.0, 1.0]], [[2.0, 2.0, 3.0]]])
    >>> state = ops.class_moments(x.mT, torch.tensor([0, 0]), 1, layout="nchw", statistic=("max", "mean", "l2"),
    ...                           witness="vector")
    >>> shrink(state, 0.0).scatter.equal(state.scatter)
    True
    """
    op = "shrink"
    if not isinstance(moments, VectorMoments):
        raise TypeError(f"{op}: moments must be a VectorMoments, got {type(moments).__name__}.")
    arguments.state(op, "moments", moments)
    fixed = validation.is_number(intensity)
    if not (fixed and 0 <= float(intensity) <= 1) and intensity != "auto":
        raise ValueError(f"{op}: intensity must be 'auto' or a number in 0..1, got {intensity!r}.")
    d = moments.dimension
    n = moments.count.double()[:, None]
    rows, columns = triangle(d)
    covariance = moments.covariance()
    within = torch.diagonal(covariance, dim1=-2, dim2=-1)  # (classes, channels, d)
    pooled = (within * n[..., None]).sum(0) / moments.count.sum().clamp(min=1)
    unit = pooled.sqrt()
    inverse = torch.where(unit > 0, 1 / unit, 0.0)
    scaled = covariance * inverse[..., :, None] * inverse[..., None, :]
    alive = (unit > 0).double()
    dimensions = alive.sum(-1).clamp(min=1)  # (channels,)
    trace = torch.diagonal(scaled, dim1=-2, dim2=-1).sum(-1)
    square = (scaled**2).sum((-2, -1))
    if fixed:
        rho = torch.full_like(trace, float(intensity))
    else:
        above = (1 - 2 / dimensions) * square + trace**2
        below = (n - 2 / dimensions) * (square - trace**2 / dimensions)
        rho = torch.where(below > 0, above / below, 1.0).clamp(0, 1)
        rho = torch.where((n <= d) & (d > 2), rho, 0.0)
    target = torch.diag_embed((trace / dimensions)[..., None] * alive * unit**2)
    mixed = covariance + rho[..., None, None] * (target - covariance)
    scatter = mixed.permute(2, 3, 0, 1)[rows, columns] * n
    # What is not shrunk keeps its very bits: the way to correlations and back rounds.
    kept = rho == 0
    return VectorMoments(moments.count.clone(), moments.mean.clone(), torch.where(kept, moments.scatter, scatter))
