"""Tensor-level functions, the ones other toolkits embed. Torch tensors in, torch tensors out.

Every function takes ``backend="auto" | "cpp" | "cuda" | "triton" | "reference"``. "auto" takes the fastest that can
run; a backend asked for by name runs or raises RuntimeError with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discedit import _checks
from discedit._backends import select
from discedit._state import ClassMoments

__all__ = [
    "ClassMoments",
    "class_moments",
    "fisher_bound",
    "merge_moments",
    "minimax_bound",
    "one_vs_rest",
    "pool",
]


def pool(x: Tensor, *, statistic: str = "mean", layout: str = "auto", backend: str = "auto") -> Tensor:
    """Reduce each channel's feature map to one number per sample.

    Args:
        x: feature map, float16, bfloat16, float32 or float64, any strides. Axis 0 is samples.
        statistic: "mean", over all axes but samples and channels.
        layout: "nchw" (channels are axis 1, whatever the memory order), "tokens" (channels are the last axis), or
            "auto": axis 1, refused for three axes, where it would be a guess.

    Returns:
        Shape (samples, channels), float64. Accumulated in float64; the same bits for every number of threads. NaN and
        Inf in a map give a non-finite number for that map alone.

    Raises:
        ValueError: fewer than two axes, an unsupported type, an empty map, an unknown statistic or layout.
        RuntimeError: `backend` names a backend that cannot run here.

    Equivalent to ``x.double().mean((2, 3))`` for a map of shape (N, C, H, W).

    >>> pool(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([[1.5000, 5.5000]], dtype=torch.float64)
    """
    _checks.choice("pool", "statistic", statistic, _checks.STATISTICS)
    x, axis = _checks.feature_map("pool", x, layout)
    out: Tensor = select("pool", backend, x.device)(x, axis)
    return out


def class_moments(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    statistic: str = "mean",
    layout: str = "auto",
    out: ClassMoments | None = None,
    backend: str = "auto",
) -> ClassMoments:
    """Pool a feature map and accumulate its moments per class and channel, in one read of the map.

    Args:
        x: feature map, as for `pool`.
        labels: class index of each sample, shape (samples,), any integer type, in 0..num_classes-1.
        num_classes: number of classes; classes without samples are fine.
        statistic, layout: as for `pool`.
        out: a state of the same classes and channels to merge this batch into; it is changed in place and returned.
            By default a new one.

    Returns:
        `ClassMoments`: count, mean and central moment sums up to order 4, float64. On the CPU deterministic: the same
        batches in the same order give the same bits, for every number of threads and every instruction set.

    Raises:
        ValueError: labels of the wrong length or type or outside the range (`out` is then unchanged), a state of
            another shape, and whatever `pool` refuses.
        RuntimeError: `backend` names a backend that cannot run here.

    Source: merging after Chan, Golub and LeVeque 1979 and Pebay 2008.

    >>> state = class_moments(torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1]), 2)
    >>> state.mean
    tensor([[ 2.],
            [10.]], dtype=torch.float64)
    >>> state.m2 / state.count[:, None]
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """
    op = "class_moments"
    num_classes = _checks.positive_integer(op, "num_classes", num_classes)
    _checks.choice(op, "statistic", statistic, _checks.STATISTICS)
    x, axis = _checks.feature_map(op, x, layout)
    labels = _checks.labels(op, labels, x, num_classes)
    channels = x.shape[axis]
    if out is None:
        out = ClassMoments.empty(num_classes, channels, x.device)
    elif (_checks.state(op, "out", out).num_classes, out.channels) != (num_classes, channels) or out.device != x.device:
        raise ValueError(
            f"{op}: out must hold {num_classes} classes and {channels} channels on {x.device}, it holds "
            f"{out.num_classes} and {out.channels} on {out.device}."
        )
    select(op, backend, x.device)(x, axis, labels, out)
    return out


def merge_moments(a: ClassMoments, b: ClassMoments, *, backend: str = "auto") -> ClassMoments:
    """The state of both sets of samples together; neither argument changes.

    Exact up to rounding, associative and commutative up to rounding, and the empty state is neutral to the bit.

    Raises:
        ValueError: the states differ in classes, channels or device.

    >>> left = class_moments(torch.tensor([[1.0]]), torch.tensor([0]), 1)
    >>> right = class_moments(torch.tensor([[3.0]]), torch.tensor([0]), 1)
    >>> merge_moments(left, right).m2
    tensor([[2.]], dtype=torch.float64)
    """
    _checks.state("merge_moments", "a", a)
    _checks.state("merge_moments", "b", b)
    if a.mean.shape != b.mean.shape or a.device != b.device:
        raise ValueError(
            f"merge_moments: a and b must have the same classes, channels and device: a is {_checks.shape_of(a.mean)} "
            f"on {a.device}, b is {_checks.shape_of(b.mean)} on {b.device}."
        )
    merged = a.clone()
    select("merge_moments", backend, a.device)(merged, b)
    return merged


def fisher_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, backend: str = "auto") -> Tensor:
    """Lower bound on the total variation between two laws from their first two moments.

    F / (2 + F), with F the Fisher discriminant ratio of the two laws.

    Args:
        mean1, mean2: mean vectors of the witness, shape (..., d), 1 <= d <= 32, float32 or float64.
        cov1, cov2: population covariances, shape (..., d, d), symmetric positive semi-definite, same type and device.

    Returns:
        Shape (...), in [0, 1], the type of the inputs. Computed in float64; rounding, that of the given moments
        included (16 ulps of each), is charged against the bound. Deterministic. A direction without variance counts as
        perfectly separating when the means differ along it (1) and as useless when they do not (0). NaN for non-finite
        moments.

    Raises:
        ValueError: shapes, types or devices do not match, or d is outside 1..32.
        RuntimeError: `backend` names a backend that cannot run here; the message says why.

    Equivalent to ``F / (2 + F)`` with ``F = (mean1 - mean2) @ inv(cov1 + cov2) @ (mean1 - mean2)``.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024.

    >>> one = torch.ones(1, 1)
    >>> fisher_bound(torch.tensor([2.0]), one, torch.tensor([0.0]), one)
    tensor(0.5000)
    """
    return _bound("fisher_bound", mean1, cov1, mean2, cov2, backend)


def minimax_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, backend: str = "auto") -> Tensor:
    """The best lower bound on the total variation that a linear function of the witness can give from two moments.

    k^2 / (1 + k^2), k = max over u of u'(mean1 - mean2) / (sqrt(u'cov1 u) + sqrt(u'cov2 u)). Sharp in one dimension:
    some pair of laws with these moments attains it. Never below `fisher_bound`.

    Args, Returns, Raises: as `fisher_bound`.

    Equivalent to a second-order cone program (maximise k); solved by a one-dimensional root find on the curve
    u(l) = ((1 - l) cov1 + l cov2)^-1 (mean1 - mean2).

    Source: Lanckriet, El Ghaoui, Bhattacharyya and Jordan 2002 (k); Anderson and Bahadur 1962 (the curve).

    >>> minimax_bound(torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([0.0]), torch.tensor([[0.0]]))
    tensor(0.8000)
    """
    return _bound("minimax_bound", mean1, cov1, mean2, cov2, backend)


def _bound(op: str, mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, backend: str) -> Tensor:
    _checks.law_pairs(op, mean1, cov1, mean2, cov2)
    with torch.no_grad():
        bound: Tensor = select(op, backend, mean1.device)(mean1, cov1, mean2, cov2)
    return bound.to(mean1.dtype)


def one_vs_rest(
    moments: ClassMoments, *, bound: str = "minimax", witness: str = "quadratic", backend: str = "auto"
) -> Tensor:
    """Bound on the total variation between each class and the union of all others, per channel.

    Args:
        moments: state of one layer.
        bound: "fisher" or "minimax".
        witness: "linear" (t) or "quadratic" (t, t^2). Under both, the result does not depend on shift and scale of t.

    Returns:
        Shape (channels, classes), float64, in [0, 1]. NaN in the column of a class without samples, and everywhere
        when fewer than two classes have any. A channel that is constant and equal in a class and the rest scores 0,
        constant and different 1. "The rest" weighs each class by its sample count. Where t^4 leaves the range of
        float64 (spreads below 1e-80 or above 1e76), the quadratic witness falls back to the linear one.

    Raises:
        ValueError: unknown bound or witness. RuntimeError: as everywhere.

    >>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    >>> one_vs_rest(class_moments(x, torch.tensor([0, 0, 1, 1]), 2))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    _checks.state("one_vs_rest", "moments", moments)
    _checks.choice("one_vs_rest", "bound", bound, _checks.BOUNDS)
    _checks.choice("one_vs_rest", "witness", witness, _checks.WITNESSES)
    out: Tensor = select("one_vs_rest", backend, moments.device)(moments, bound, witness)
    return out
