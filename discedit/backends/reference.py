"""Every op in plain torch, in float64: the oracle that the kernels are tested against, and the fallback.

Runs on any device. Written to be read beside the formulas; inputs are already checked (`discedit.ops` does that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from discedit.backends import arguments
from discedit.backends.arguments import Rule
from discedit.common.state import ClassMoments, State, VectorMoments, triangle
from discedit.common.window import Window

EPSILON = torch.finfo(torch.float64).eps
PATCH_BYTES = 16 << 20  # of unfolded patches at a time; about four times that with what is made of them
# Relative rounding that a mean, a covariance entry, or a term of a merged moment sum must be taken to carry.
ROUNDING_OF_MOMENTS = 16 * EPSILON

Kind = TypeVar("Kind", ClassMoments, VectorMoments)
# Of a witness under two laws: delta, noise, cov1, cov2, and where the laws are constant and equal.
Features = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# ---- moments --------------------------------------------------------------------------------------------------------

# From maps (samples, channels, elements) in float64.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(-1),
    "sum": lambda maps: maps.sum(-1),
    "l2": lambda maps: maps.square().sum(-1).sqrt(),
    "rms": lambda maps: maps.square().mean(-1).sqrt(),
    "absmax": lambda maps: maps.abs().amax(-1),
    "max": lambda maps: maps.amax(-1),
    # NaN is not above 0 and would be lost in the comparison: it is to be found and refused.
    "positive_fraction": lambda maps: torch.where(maps.isnan(), maps, (maps > 0).double()).mean(-1),
    "cls": lambda maps: maps[..., 0],  # tokens are the one pooled axis
}


def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor | None = None) -> Tensor:
    """Statistics over all axes but samples and channels: (statistics, samples, channels), float64, contiguous."""
    maps = x.double().movedim(channel_axis, 1)
    maps = maps.flatten(2) if maps.ndim > 2 else maps[..., None]
    if maps.numel() == 0:  # no samples or no channels
        return maps.new_empty(len(statistics), *maps.shape[:2])
    return torch.stack([STATISTICS[name](maps) for name in statistics], out=out)


def class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    """Merge the per-class moments of one batch into `state`. `scale` above 0: those of exp(-scale t)."""
    fold_moments(pool(x, channel_axis, statistics), scale, labels, state)


def fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    """The same from pooled features (statistics, samples, channels)."""
    arguments.label_range("class_moments", labels, state.num_classes)
    if pooled.shape[1] == 0:
        return
    if isinstance(state, ClassMoments):
        pooled = torch.exp(-scale * pooled[0]) if scale else pooled[0]
    count = torch.bincount(labels, minlength=state.num_classes)
    per_class = count.clamp(min=1).double()[:, None]

    def class_sum(values: Tensor) -> Tensor:
        shape = (*values.shape[:-2], state.num_classes, state.channels)
        return values.new_zeros(shape).index_add_(-2, labels, values)

    # Deviations from each class's first sample: a constant channel gets its exact mean and exact zeros.
    position = torch.arange(len(labels), device=labels.device)
    first = torch.zeros_like(count).scatter_reduce_(0, labels, position, "amin", include_self=False)
    anchor = torch.where((count > 0)[:, None], pooled[..., first, :], 0.0)
    mean = anchor + class_sum(pooled - anchor[..., labels, :]) / per_class
    deviation = pooled - mean[..., labels, :]
    # `mean` is rounded; taking the residual out leaves central sums about the exact mean, to first order.
    residual = class_sum(deviation) / per_class
    if isinstance(state, VectorMoments):
        rows, columns = triangle(state.dimension)
        scatter = class_sum(deviation[rows] * deviation[columns]) - residual[rows] * residual[columns] * per_class
        scatter[rows == columns] = scatter[rows == columns].clamp(min=0)
        merge_moments(state, VectorMoments(count, mean, scatter))
        return
    m2 = class_sum(deviation**2)
    m3 = class_sum(deviation**3)
    m4 = class_sum(deviation**4)
    m4 = m4 - 4 * residual * m3
    m3 = m3 - 3 * residual * m2
    m2 = (m2 - residual**2 * per_class).clamp(min=0)
    merge_moments(state, ClassMoments(count, mean, m2, m3, m4))


def merge_moments(into: Kind, other: Kind) -> None:
    """Exact merge of `other` into `into` (Chan, Golub and LeVeque 1979; Pebay 2008)."""
    into.copy_(_merge(into, other))


def _merge(a: Kind, b: Kind) -> Kind:
    na, nb = a.count.double()[:, None], b.count.double()[:, None]
    n = (na + nb).clamp(min=1)
    wa, wb = na / n, nb / n
    delta = b.mean - a.mean
    pair = na * wb
    mean = a.mean + delta * wb
    sums: tuple[Tensor, ...]
    if isinstance(a, VectorMoments):
        rows, columns = triangle(a.dimension)
        sums = (a.scatter + b.scatter + delta[rows] * delta[columns] * pair,)
    else:
        m2 = a.m2 + b.m2 + delta**2 * pair
        m3 = a.m3 + b.m3 + delta**3 * pair * (wa - wb) + 3 * delta * (wa * b.m2 - wb * a.m2)
        m4 = (
            a.m4
            + b.m4
            + delta**4 * pair * (wa**2 - wa * wb + wb**2)
            + 6 * delta**2 * (wa**2 * b.m2 + wb**2 * a.m2)
            + 4 * delta * (wa * b.m3 - wb * a.m3)
        )
        sums = (m2, m3, m4)
    # An empty side leaves the other's bits, whatever its own sums hold.
    merged = (
        torch.where(nb == 0, mine, torch.where(na == 0, theirs, both))
        for mine, theirs, both in zip(a.tensors()[1:], b.tensors()[1:], (mean, *sums), strict=True)
    )
    return type(a)(a.count + b.count, *merged)


def patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (channels, taps) and scatter (channels, taps, taps) of each channel's patches."""
    samples, channels = x.shape[:2]
    outputs, taps = window.outputs(x), window.taps
    size = outputs[0] * outputs[1] if positions is None else len(positions)
    count = max(1, samples * size)
    mean = x.new_zeros(channels, taps, dtype=torch.float64)
    scatter = x.new_zeros(channels, taps, taps, dtype=torch.float64)
    top, bottom, left, right = window.padding

    def patches(channel: slice) -> Iterator[Tensor]:
        """(channels, taps, samples x positions), a few samples at a time."""
        step = max(1, maps // (channel.stop - channel.start))
        for first in range(0, samples, step):
            part = x[first : first + step, channel]
            padded = torch.nn.functional.pad(part.double(), (left, right, top, bottom))
            # Channels stand in for samples: each is unfolded by itself.
            columns = torch.nn.functional.unfold(
                padded.flatten(0, 1)[:, None], window.kernel, window.dilation, 0, window.stride
            )
            chosen = columns if positions is None else columns[:, :, positions]
            yield chosen.view(len(part), -1, taps, size).permute(1, 2, 0, 3).flatten(2)

    maps = max(1, PATCH_BYTES // (8 * taps * outputs[0] * outputs[1]))  # of one sample and channel each
    for start in range(0, channels if samples * size else 0, maps):
        channel = slice(start, min(start + maps, channels))
        for part in patches(channel):
            mean[channel] += part.sum(2) / count
        residual = torch.zeros_like(mean[channel])
        for part in patches(channel):
            deviation = part - mean[channel, :, None]
            residual += deviation.sum(2)
            scatter[channel] += deviation @ deviation.mT
        # `mean` is rounded: what that leaves in the deviations is taken out again.
        scatter[channel] -= residual[:, :, None] * residual[:, None, :] / count
    return mean, (scatter + scatter.mT) / 2


# ---- bounds ---------------------------------------------------------------------------------------------------------
# The same construction as csrc/common/bounds.hpp: find a good direction u, then evaluate the bound at u with rounding
# charged against it. Any u is valid, so the solver's accuracy costs tightness only.
# Results are contiguous, as the kernels' are.


def fisher_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _fisher(*_difference(mean1, mean2), cov1.double(), cov2.double()).contiguous()


def minimax_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _minimax(*_difference(mean1, mean2), cov1.double(), cov2.double()).contiguous()


def minimax_published_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return published(minimax_bound(mean1, cov1, mean2, cov2))


def published(minimax: Tensor) -> Tensor:
    """(k / (sqrt 2 + k))^2 from k^2 / (1 + k^2)."""
    k = (minimax / (1 - minimax)).sqrt()
    return torch.where(minimax < 1, (k / (2**0.5 + k)) ** 2, minimax)


def hellinger_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _hellinger(*_difference(mean1, mean2), cov1.double(), cov2.double()).contiguous()


def robust_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, radius: Tensor, rho: float) -> Tensor:
    """`radius`: of both balls together."""
    return _robust(*_difference(mean1, mean2), cov1.double(), cov2.double(), radius, rho).contiguous()


def witness_bound(mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor, published: bool) -> Tensor:
    """From raw second moments."""
    mean1, second1, mean2, second2 = (moment.double() for moment in (mean1, second1, mean2, second2))
    finite = mean1.isfinite() & mean2.isfinite() & second1.isfinite() & second2.isfinite()
    unit = torch.maximum(second1, second2).sqrt()
    # In units of the larger moment, so that squares stay within the range of float64.
    inverse = torch.where(unit > torch.finfo(torch.float64).tiny, 1 / unit, 0.0)
    mean1, mean2 = mean1 * inverse, mean2 * inverse
    second1, second2 = second1 * inverse * inverse, second2 * inverse * inverse
    rounding = ROUNDING_OF_MOMENTS * (mean1.abs() + mean2.abs())
    gap = ((mean1 - mean2).abs() - rounding).clamp(min=0)
    below = 2 * (second1 + second2) if published else (second1.sqrt() + second2.sqrt()) ** 2
    value = torch.where(gap > 0, gap**2 / (below * (1 + 4 * EPSILON + ROUNDING_OF_MOMENTS)), 0.0).clamp(max=1)
    return torch.where(finite, value, torch.nan).contiguous()


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


def _hellinger(delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor) -> Tensor:
    """1 - BC of Gaussians, on the eigenvectors of cov1 + cov2 along which there is any variance."""
    delta, noise, s1, s2, verdict = _scale(delta, noise, cov1, cov2)
    d = delta.shape[-1]
    least = 32 * d * EPSILON
    values, vectors = torch.linalg.eigh(s1 + s2)
    kept = values > least
    along = (vectors.mT @ delta[..., None])[..., 0]
    charge = (vectors.abs().mT @ (noise + 64 * d * EPSILON)[..., None])[..., 0]
    along = torch.where(kept, along, (along.abs() - charge).clamp(min=0))
    distance = (along**2 / values.clamp(min=least)).sum(-1)
    # In units in which s1 + s2 is the identity, s1 has eigenvalues p and s2 has 1 - p; p (1 - p) is at most 1 / 4.
    whiten = vectors * torch.where(kept, values.clamp(min=least).rsqrt(), 0.0)[..., None, :]
    left = torch.diag_embed(torch.where(kept, 0.0, 0.5))
    ratio = torch.ones_like(distance)
    for cov in (s1, s2):
        own = whiten.mT @ cov @ whiten
        size = torch.diagonal(own, dim1=-2, dim2=-1).sum(-1)  # so that rounding is judged by the law's own variance
        size = torch.where(size > 0, size, 1.0)
        shares = torch.linalg.eigvalsh(own / size[..., None, None] + left)
        ratio = ratio * (2 * torch.where(shares > least, shares, 0.0)).prod(-1) * size ** kept.sum(-1)
    affinity = ratio.clamp(max=1) ** 0.25 * torch.exp(-distance / 4)
    return torch.where(verdict == 0, (1 - affinity).clamp(min=0), verdict)


def _robust(
    delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor, radius: Tensor | float, rho: Tensor | float
) -> Tensor:
    """F / (2 + F) at the worst means within `radius` of each other's, variances raised by rho, by the secular equation
    mu |u| = radius, u = (cov1 + cov2 + (rho + mu) I)^-1 delta, in the eigenvectors of cov1 + cov2."""
    raised = cov1 + rho * torch.eye(delta.shape[-1], dtype=delta.dtype, device=delta.device)
    without_ball = _fisher(delta, noise, raised, cov2)  # then each coordinate may have its own unit
    total = raised + cov2
    radius = torch.as_tensor(radius, dtype=delta.dtype, device=delta.device).expand(delta.shape[:-1])
    variances = torch.diagonal(total, dim1=-2, dim2=-1)
    defined = delta.isfinite().all(-1) & total.isfinite().all(-1).all(-1) & radius.isfinite()
    unit = torch.maximum(variances.clamp(min=0).sqrt().amax(-1), torch.maximum(delta.abs().amax(-1), radius))
    inverse = torch.where(defined & (unit > 0), 1 / unit, 0.0)[..., None]
    delta, noise, radius = (
        torch.where(defined[..., None], x, 0.0) * inverse for x in (delta, noise, radius[..., None])
    )
    total = torch.where(defined[..., None, None], total, 0.0) * inverse[..., None] * inverse[..., None]
    variances = torch.diagonal(total, dim1=-2, dim2=-1).clamp(min=0)
    alone = (delta.abs() - noise - radius).clamp(min=0)
    separated = (alone > 1e9 * variances.sqrt()).any(-1)
    ratio = torch.where(alone > 0, alone**2 / (variances * (1 + 2 * ROUNDING_OF_MOMENTS)), 0.0).amax(-1)
    values, vectors = torch.linalg.eigh(total)
    values = values.clamp(min=0) + 2 * delta.shape[-1] * EPSILON * variances.amax(-1, keepdim=True)
    along = (vectors.mT @ delta[..., None])[..., 0]
    size = delta.norm(dim=-1, keepdim=True)
    apart = (size > radius)[..., 0]
    share = torch.where(apart[..., None], radius / (size - radius), 0.0)
    low, high = torch.zeros_like(size), values.amax(-1, keepdim=True) * share * (1 + 1e-9)
    for _ in range(200):  # bisection; the bound is stationary in mu
        mu = (low + high) / 2
        short = mu * (along / (values + mu)).norm(dim=-1, keepdim=True) < radius
        low, high = torch.where(short, mu, low), torch.where(short, high, mu)
    u = (vectors @ torch.where(values + high > 0, along / (values + high), 0.0)[..., None])[..., 0]
    u = u / u.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    gap = (_gap(u, delta, noise) - radius[..., 0] * (1 + 4 * EPSILON)).clamp(min=0)
    ratio = torch.maximum(ratio, torch.where(gap > 0, gap**2 / _variance(u, total), 0.0))
    verdict = torch.where(defined, torch.where(separated & apart, 1.0, 0.0), torch.nan).to(delta.dtype)
    value = torch.where(apart | ~defined, _finish(ratio / 2, verdict), 0.0)
    return torch.where(radius[..., 0] == 0, without_ball, value)


def _scale(delta: Tensor, noise: Tensor, cov1: Tensor, cov2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Units in which cov1 + cov2 has unit diagonal, and a verdict: NaN undefined, 1 separated, 0 go on."""
    total = torch.diagonal(cov1 + cov2, dim1=-2, dim2=-1)
    deviation = total.clamp(min=0).sqrt()
    # From so many deviations on the bounds are 1 in float64, and no direction need be looked for.
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


# ---- one against the rest, and every pair ---------------------------------------------------------------------------


def one_vs_rest(moments: Kind, rule: Rule, witness: str) -> Tensor:
    """Bound between each class and the union of the others: (channels, classes), float64."""
    columns = [_between(one, rest, rule, witness)[0] for one, rest in classes_and_rest(moments)]
    return torch.stack(columns, dim=-1)


def classes_and_rest(moments: Kind) -> Iterator[tuple[Kind, Kind]]:
    """Each class, and the merge of all others, as states of one class."""
    classes = [_classes(moments, slice(k, k + 1)) for k in range(moments.num_classes)]
    nothing = type(moments)(*(torch.zeros_like(tensor) for tensor in classes[0].tensors()))
    after = [nothing]
    for one in reversed(classes):
        after.append(_merge(after[-1], one))
    after.reverse()
    before = nothing
    for k, one in enumerate(classes):
        yield one, _merge(before, after[k + 1])
        before = _merge(before, one)


def one_vs_one(moments: Kind, rule: Rule, witness: str) -> Tensor:
    """Bound between each two classes: (channels, classes, classes), float64, 0 on the diagonal."""
    classes = moments.num_classes
    out = moments.mean.new_full((moments.channels, classes, classes), torch.nan)
    for one in moments.count.nonzero()[:, 0].tolist():
        row = _between(_classes(moments, slice(one, one + 1)), moments, rule, witness).T
        out[:, one, one + 1 :] = out[:, one + 1 :, one] = row[:, one + 1 :]
        out[:, one, one] = 0
    return out


def pairwise_min(moments: Kind, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    """Smallest bound over all pairs of classes with samples, (channels,), and a pair that attains it, (channels, 2)."""
    seen = moments.count.nonzero()[:, 0]
    values = moments.mean.new_full((moments.channels,), torch.inf)
    pairs = torch.full((moments.channels, 2), -1, device=moments.device)
    undefined = torch.full_like(values, len(seen) < 2, dtype=torch.bool)
    for one, others, bounds in _pairs(moments, seen, rule, witness):
        undefined |= bounds.isnan().any(0)
        smallest, index = bounds.min(0)
        better = smallest < values
        values = torch.where(better, smallest, values)
        pairs = torch.where(better[:, None], torch.stack([one.expand_as(index), others[index]], -1), pairs)
    return values.masked_fill(undefined, torch.nan), pairs.masked_fill(undefined[:, None], -1)


def pairwise_mean(moments: Kind, rule: Rule, witness: str) -> Tensor:
    """Mean bound over all pairs of classes with samples, (channels,)."""
    seen = moments.count.nonzero()[:, 0]
    total = torch.zeros_like(moments.mean.flatten(0, -2)[0])
    for _, _, bounds in _pairs(moments, seen, rule, witness):
        total = total + bounds.sum(0)
    return total / (len(seen) * (len(seen) - 1) / 2) if len(seen) > 1 else torch.full_like(total, torch.nan)


def _pairs(moments: Kind, seen: Tensor, rule: Rule, witness: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One class and all later ones at a time, with their bounds (later classes, channels): memory grows with classes x
    channels, not with pairs."""
    for position in range(1, len(seen)):
        one, others = seen[position - 1 : position], seen[position:]
        yield one, others, _between(_classes(moments, one), _classes(moments, others), rule, witness)


def _classes(moments: Kind, index: slice | Tensor) -> Kind:
    """The state of some classes alone."""
    return type(moments)(moments.count[index], *(tensor[..., index, :] for tensor in moments.tensors()[1:]))


def _between(one: Kind, two: Kind, rule: Rule, witness: str) -> Tensor:
    """Bound between the classes of two states, one of which may be a single class: (classes, channels)."""
    value = (
        _of_one_number(one, two, rule) if rule.name in arguments.OF_ONE_NUMBER else _of_laws(one, two, rule, witness)
    )
    return torch.where(((one.count > 0) & (two.count > 0))[:, None], value, torch.nan)


def _of_laws(one: Kind, two: Kind, rule: Rule, witness: str) -> Tensor:
    features = _vector_witness if isinstance(one, VectorMoments) else SCALAR_WITNESSES[witness]
    delta, noise, cov1, cov2, equal = features(one, two)
    if rule.name == "robust":
        # Coordinates in units of their summed variance, the radius of a ball in standard errors of its mean.
        delta, noise, cov1, cov2, verdict = _scale(delta, noise, cov1, cov2)
        radius = torch.zeros_like(verdict)
        for cov, law in ((cov1, one), (cov2, two)):
            trace = torch.diagonal(cov, dim1=-2, dim2=-1).sum(-1)
            radius = radius + rule.radius * (trace / law.count.clamp(min=1).double()[:, None]).sqrt()
        value = torch.where(verdict == 0, _robust(delta, noise, cov1, cov2, radius, rule.rho), verdict)
    else:
        value = BOUNDS[rule.name](delta, noise, cov1, cov2)
    return torch.where(equal, 0.0, value)


def _of_one_number(one: Kind, two: Kind, rule: Rule) -> Tensor:
    assert isinstance(one, ClassMoments)
    assert isinstance(two, ClassMoments)
    n = [law.count.clamp(min=1).double()[:, None] for law in (one, two)]
    variances = [law.m2 / size for law, size in zip((one, two), n, strict=True)]
    if rule.name == "certified":
        return _certified(one, two, n, rule)
    unit = torch.maximum(torch.maximum(one.mean.abs(), two.mean.abs()), torch.maximum(*variances).sqrt())
    inverse = torch.where(unit > 0, 1 / unit, 0.0)
    means = [law.mean * inverse for law in (one, two)]
    seconds = [var * inverse * inverse + mean**2 for var, mean in zip(variances, means, strict=True)]
    return witness_bound(means[0], seconds[0], means[1], seconds[1], rule.name == "witness_published")


def _certified(one: ClassMoments, two: ClassMoments, n: list[Tensor], rule: Rule) -> Tensor:
    """Minimax in one dimension at the worst moments outside six events of probability exp(-log_term): for each law, its
    deviation above `most` (Maurer and Pontil 2009, Theorem 10), its mean to either side beyond `error` (Bernstein). A
    law on [0, 1] with mean m has variance m (1 - m) at most."""
    width, log_term = rule.high - rule.low, rule.log_term
    gap = (one.mean - two.mean).abs() / width
    gap = gap - ROUNDING_OF_MOMENTS * (one.mean.abs() + two.mean.abs()) / width
    total = torch.zeros_like(gap)
    for law, size in zip((one, two), n, strict=True):
        free = (size - 1).clamp(min=1)
        from_middle = ((law.mean - rule.low) / width - 0.5).abs() * (1 - 4 * EPSILON)
        from_middle = from_middle - ROUNDING_OF_MOMENTS * (law.mean.abs() + abs(rule.low)) / width
        most = ((law.m2 / free).sqrt() / width + (2 * log_term / free).sqrt()).clamp(max=0.5)
        for _ in range(3):
            error = most * (2 * log_term / size).sqrt() + log_term / (3 * size)
            nearest = (from_middle - error).clamp(min=0)
            most = torch.minimum(most, (0.25 - nearest**2).clamp(min=0).sqrt())
        gap = gap - error
        total = total + most
    square = (gap.clamp(min=0) / total) ** 2
    enough = ((one.count > 1) & (two.count > 1))[:, None]
    finite = (one.mean + two.mean + one.m2 + two.m2).isfinite()
    value = torch.where(enough & (gap > 0), square / (1 + square) * (1 - 16 * EPSILON), 0.0)
    return torch.where(finite, value, torch.nan)


def _standardise(one: ClassMoments, two: ClassMoments) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Central moments of z = (t - midpoint of the means) / scale under both laws, each (classes, channels)."""
    gap = two.mean - one.mean
    laws = []
    for law in (one, two):
        n = law.count.clamp(min=1).double()[:, None]
        laws.append({"mean": law.mean, "m2": law.m2 / n, "m3": law.m3 / n, "m4": law.m4 / n})
    scale = (laws[0]["m2"] + laws[1]["m2"] + gap**2).sqrt()
    unit = torch.where(scale > 0, scale, 1.0)
    for z, shift in zip(laws, (-gap / 2, gap / 2), strict=True):
        z["noise"] = ROUNDING_OF_MOMENTS * (z["mean"].abs() / unit)
        z["shift"] = shift / unit
        z["m2"] = z["m2"] / unit / unit
        z["m3"] = z["m3"] / unit / unit / unit
        z["m4"] = z["m4"] / unit / unit / unit / unit
    return laws, scale == 0


def _linear_witness(one: ClassMoments, two: ClassMoments) -> Features:
    (a, b), equal = _standardise(one, two)
    delta = (a["shift"] - b["shift"])[..., None]
    noise = (a["noise"] + b["noise"])[..., None]
    return delta, noise, a["m2"][..., None, None], b["m2"][..., None, None], equal


def _quadratic_witness(one: ClassMoments, two: ClassMoments) -> Features:
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
    both = keep[..., :, None] & keep[..., None, :]
    cov1, cov2 = (torch.where(both, cov, 0.0) for cov in covariances)
    return torch.where(keep, delta, 0.0), torch.where(keep, noise, 0.0), cov1, cov2, equal


def _vector_witness(one: VectorMoments, two: VectorMoments) -> Features:
    delta, noise = _difference(one.mean.movedim(0, -1), two.mean.movedim(0, -1))
    return delta, noise, one.covariance(), two.covariance(), torch.zeros_like(delta[..., 0], dtype=torch.bool)


BOUNDS: dict[str, Callable[..., Tensor]] = {
    "fisher": _fisher,
    "minimax": _minimax,
    "minimax_published": lambda *law: published(_minimax(*law)),
    "hellinger": _hellinger,
}
SCALAR_WITNESSES = {"linear": _linear_witness, "quadratic": _quadratic_witness}
