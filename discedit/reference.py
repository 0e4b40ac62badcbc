"""Every op in plain torch, in float64: the oracle that the kernels are tested against, and the fallback.

Runs on any device. Written to be read beside the formulas; inputs are already checked (`discedit.ops` does that).
"""

from __future__ import annotations

import torch
from torch import Tensor

from discedit._state import ClassMoments

EPSILON = torch.finfo(torch.float64).eps
# Relative rounding that a mean, a covariance entry, or a term of a merged moment sum must be taken to carry.
ROUNDING_OF_MOMENTS = 16 * EPSILON


def pool(x: Tensor, channel_axis: int) -> Tensor:
    """Mean over all axes but samples and channels: (samples, channels), float64."""
    spatial = [axis for axis in range(1, x.ndim) if axis != channel_axis]
    return x.double().mean(spatial) if spatial else x.double()


def class_moments(x: Tensor, channel_axis: int, labels: Tensor, state: ClassMoments) -> None:
    """Merge the per-class moments of one batch into `state`."""
    pooled = pool(x, channel_axis)
    if pooled.shape[0] == 0:
        return
    count = torch.bincount(labels, minlength=state.num_classes)
    per_class = count.clamp(min=1).double()[:, None]

    def class_sum(values: Tensor) -> Tensor:
        return torch.zeros_like(state.mean).index_add_(0, labels, values)

    # Deviations from each class's first sample: a constant channel gets its exact mean and exact zeros.
    position = torch.arange(len(labels), device=labels.device)
    first = torch.zeros_like(count).scatter_reduce_(0, labels, position, "amin", include_self=False)
    anchor = torch.where((count > 0)[:, None], pooled[first], 0.0)
    mean = anchor + class_sum(pooled - anchor[labels]) / per_class
    deviation = pooled - mean[labels]
    # `mean` is rounded; taking the residual out leaves central sums about the exact mean, to first order.
    residual = class_sum(deviation) / per_class
    m2 = class_sum(deviation**2)
    m3 = class_sum(deviation**3)
    m4 = class_sum(deviation**4)
    m4 = m4 - 4 * residual * m3
    m3 = m3 - 3 * residual * m2
    m2 = (m2 - residual**2 * per_class).clamp(min=0)
    merge_moments(state, ClassMoments(count, mean, m2, m3, m4))


def merge_moments(into: ClassMoments, other: ClassMoments) -> None:
    """Exact merge of `other` into `into` (Chan, Golub and LeVeque 1979; Pebay 2008)."""
    merged = _merge(into, other)
    into.copy_(merged)


def _merge(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    na, nb = a.count.double()[:, None], b.count.double()[:, None]
    n = (na + nb).clamp(min=1)
    wa, wb = na / n, nb / n
    delta = b.mean - a.mean
    pair = na * wb
    mean = a.mean + delta * wb
    m2 = a.m2 + b.m2 + delta**2 * pair
    m3 = a.m3 + b.m3 + delta**3 * pair * (wa - wb) + 3 * delta * (wa * b.m2 - wb * a.m2)
    m4 = (
        a.m4
        + b.m4
        + delta**4 * pair * (wa**2 - wa * wb + wb**2)
        + 6 * delta**2 * (wa**2 * b.m2 + wb**2 * a.m2)
        + 4 * delta * (wa * b.m3 - wb * a.m3)
    )

    def keep(mine: Tensor, theirs: Tensor, both: Tensor) -> Tensor:
        return torch.where(nb == 0, mine, torch.where(na == 0, theirs, both))

    return ClassMoments(
        a.count + b.count,
        keep(a.mean, b.mean, mean),
        keep(a.m2, b.m2, m2),
        keep(a.m3, b.m3, m3),
        keep(a.m4, b.m4, m4),
    )


# ---- bounds ---------------------------------------------------------------------------------------------------------
# The same construction as csrc/common/bounds.hpp: find a good direction u, then evaluate the bound at u with rounding
# charged against it. Any u is valid, so the solver's accuracy costs tightness only.


def fisher_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _fisher(*_difference(mean1, mean2), cov1.double(), cov2.double())


def minimax_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _minimax(*_difference(mean1, mean2), cov1.double(), cov2.double())


def _difference(mean1: Tensor, mean2: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the means, and the rounding that it must be taken to carry."""
    mean1, mean2 = mean1.double(), mean2.double()
    return mean1 - mean2, ROUNDING_OF_MOMENTS * (mean1.abs() + mean2.abs())


def _fisher(delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor) -> Tensor:
    total = cov1 + cov2
    delta, noise, total, _, verdict = _scale(delta, noise, total, torch.zeros_like(total))
    u = _direction(delta, noise, total)
    ratio = _gap(u, delta, noise) ** 2 / _variance(u, total)
    return _finish(ratio / 2, verdict)


def _minimax(delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor) -> Tensor:
    scaled, scaled_noise, s1, s2, verdict = _scale(delta, noise, cov1, cov2)
    low = torch.zeros_like(scaled[..., 0])
    high = torch.ones_like(low)
    best = torch.zeros_like(low)
    for _ in range(45):  # bisection on Anderson and Bahadur's curve, down to 2^-45
        weight = (low + high) / 2
        mixed = (1 - weight)[..., None, None] * s1 + weight[..., None, None] * s2
        u = _direction(scaled, scaled_noise, mixed)
        first, second = _variance(u, s1).sqrt(), _variance(u, s2).sqrt()
        ratio = (_gap(u, scaled, scaled_noise) / (first + second)) ** 2
        best = torch.where(ratio > best, ratio, best)
        go_up = first / (first + second) > weight
        low, high = torch.where(go_up, weight, low), torch.where(go_up, high, weight)
    return torch.maximum(_finish(best, verdict), _fisher(delta, noise, cov1, cov2))


def _scale(delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Units in which cov1 + cov2 has unit diagonal, and a verdict: NaN undefined, 1 separated, 0 go on."""
    total = torch.diagonal(cov1 + cov2, dim1=-2, dim2=-1)
    deviation = total.clamp(min=0).sqrt()
    separated = (delta.abs() - noise > 1e9 * deviation).any(-1)
    defined = delta.isfinite().all(-1) & total.isfinite().all(-1)
    inverse = torch.where(deviation > 0, 1 / deviation, 0.0)
    # Row, then column: the product of two inverses may overflow where the scaled entry does not.
    cov1 = cov1 * inverse[..., :, None] * inverse[..., None, :]
    cov2 = cov2 * inverse[..., :, None] * inverse[..., None, :]
    defined = defined & (separated | (cov1 + cov2).isfinite().all(-1).all(-1))
    verdict = torch.where(defined, torch.where(separated, 1.0, 0.0), float("nan")).to(delta.dtype)
    settled = (verdict != 0)[..., None]
    return (
        torch.where(settled, 0.0, delta * inverse),
        torch.where(settled, 0.0, noise * inverse),
        torch.where(settled[..., None], 0.0, cov1),
        torch.where(settled[..., None], 0.0, cov2),
        verdict,
    )


def _direction(delta: Tensor, noise: Tensor, cov: Tensor) -> Tensor:
    ridge = torch.diag_embed(2 * delta.shape[-1] * EPSILON + noise**2)
    # Symmetric positive definite up to rounding: LU copes where a Cholesky pivot would fall below zero.
    u = torch.linalg.solve_ex(cov + ridge, delta).result
    largest = u.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, u / largest, u)


def _gap(u: Tensor, delta: Tensor, noise: Tensor) -> Tensor:
    terms = u * delta
    rounding = (u.shape[-1] + 1) * EPSILON * terms.abs() + u.abs() * noise
    return (terms.sum(-1).abs() - rounding.sum(-1)).clamp(min=0)


def _variance(u: Tensor, cov: Tensor) -> Tensor:
    terms = u[..., :, None] * cov * u[..., None, :]
    rounding = (2 * u.shape[-1] + 2) * EPSILON + ROUNDING_OF_MOMENTS
    return terms.sum((-2, -1)).clamp(min=0) + rounding * terms.abs().sum((-2, -1))


def _finish(ratio: Tensor, verdict: Tensor) -> Tensor:
    """x / (1 + x), with 0/0 (no gap at all) read as 0 and the verdict put through."""
    ratio = torch.where(ratio.isnan(), 0.0, ratio)
    bound = torch.where(ratio > 1e300, 1.0, ratio / (1 + ratio))
    return torch.where(verdict == 0, bound, verdict)


# ---- one against the rest -------------------------------------------------------------------------------------------


def one_vs_rest(moments: ClassMoments, bound: str, witness: str) -> Tensor:
    """Bound between each class and the union of the others: (channels, classes), float64."""
    law = {"fisher": _fisher, "minimax": _minimax}[bound]
    features = {"linear": _linear_witness, "quadratic": _quadratic_witness}[witness]
    classes = [ClassMoments(*(tensor[k : k + 1] for tensor in moments.tensors())) for k in range(moments.num_classes)]
    nothing = ClassMoments.empty(1, moments.channels, moments.device)
    after = [nothing]
    for one in reversed(classes):
        after.append(_merge(after[-1], one))
    after.reverse()
    before = nothing
    columns = []
    for k, one in enumerate(classes):
        rest = _merge(before, after[k + 1])
        before = _merge(before, one)
        delta, noise, cov1, cov2, equal = features(one, rest)
        column = torch.where(equal, 0.0, law(delta, noise, cov1, cov2))
        both = (one.count > 0) & (rest.count > 0)
        columns.append(torch.where(both, column, float("nan")))
    return torch.stack(columns, dim=-1)


def _standardise(one: ClassMoments, two: ClassMoments) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Central moments of z = (t - midpoint of the means) / scale under both laws, each (channels,)."""
    gap = (two.mean - one.mean)[0]
    laws = []
    for law in (one, two):
        n = law.count.clamp(min=1).double()
        laws.append({"mean": law.mean[0], "m2": law.m2[0] / n, "m3": law.m3[0] / n, "m4": law.m4[0] / n})
    scale = (laws[0]["m2"] + laws[1]["m2"] + gap**2).sqrt()
    unit = torch.where(scale > 0, scale, 1.0)
    for z, shift in zip(laws, (-gap / 2, gap / 2), strict=True):
        z["noise"] = ROUNDING_OF_MOMENTS * (z["mean"].abs() / unit)
        z["shift"] = shift / unit
        z["m2"] = z["m2"] / unit / unit
        z["m3"] = z["m3"] / unit / unit / unit
        z["m4"] = z["m4"] / unit / unit / unit / unit
    return laws, scale == 0


def _linear_witness(one: ClassMoments, two: ClassMoments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (a, b), equal = _standardise(one, two)
    delta = (a["shift"] - b["shift"])[:, None]
    noise = (a["noise"] + b["noise"])[:, None]
    return delta, noise, a["m2"][:, None, None], b["m2"][:, None, None], equal


def _quadratic_witness(one: ClassMoments, two: ClassMoments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Moments of (z, z^2). The span of (1, t, t^2) does not depend on shift and scale of t."""
    (a, b), equal = _standardise(one, two)
    delta = torch.stack([a["shift"] - b["shift"], a["m2"] - b["m2"]], dim=-1)
    noise = torch.stack([a["noise"] + b["noise"], ROUNDING_OF_MOMENTS * (a["m2"] + b["m2"])], dim=-1)
    covariances = []
    for law in (a, b):
        d = law["shift"]
        gross = law["m4"] + law["m2"] ** 2 + 4 * (d * law["m3"]).abs() + 4 * d**2 * law["m2"]
        square = law["m4"] - law["m2"] ** 2 + 4 * d * law["m3"] + 4 * d**2 * law["m2"]
        cross = law["m3"] + 2 * d * law["m2"]
        first = torch.stack([law["m2"], cross], dim=-1)
        second = torch.stack([cross, square.clamp(min=0) + ROUNDING_OF_MOMENTS * gross], dim=-1)
        covariances.append(torch.stack([first, second], dim=-2))
    # E z^4 >= (E z^2)^2 for every law. Where the sums say otherwise, or are not finite, t^4 left the range of float64:
    # z^2 then drops out as a coordinate without variance and without difference.
    sound = torch.ones_like(equal)
    for law in (a, b):
        sound = sound & (law["m4"] >= law["m2"] ** 2 * (1 - 1e-9)) & law["m4"].isfinite() & law["m3"].isfinite()
    keep = torch.stack([torch.ones_like(sound), sound], dim=-1)
    both = keep[:, :, None] & keep[:, None, :]
    cov1, cov2 = (torch.where(both, cov, 0.0) for cov in covariances)
    return torch.where(keep, delta, 0.0), torch.where(keep, noise, 0.0), cov1, cov2, equal
