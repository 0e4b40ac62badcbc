"""Tensor-level functions, the ones other toolkits embed. Torch tensors in, torch tensors out.

What holds for all of them:

- ``backend="auto" | "cpp" | "cuda" | "triton" | "reference"``. "auto" takes the fastest that can run; a backend asked
  for by name runs or raises RuntimeError with the reason.
- Numbers are accumulated in float64 and deterministic: the same batches in the same order give the same bits, on the
  CPU for every number of threads and every instruction set, on a GPU for the same backend. No gradients go through.
- Every function is an op of ``torch.ops.discedit``, so `torch.compile`, `torch.export` and `FakeTensorMode` take it as
  one step; rules about values, and whether a backend can run, are then checked when the program runs.
- TypeError: an argument is of another type. ValueError: shapes, types or devices do not fit, a name is unknown, or a
  value is outside its range.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch  # noqa: F401  # in the examples
from torch import Tensor

from discedit.backends import arguments
from discedit.backends.library import call
from discedit.common import validation
from discedit.common.state import ClassMoments, State, VectorMoments

__all__ = [
    "ClassMoments",
    "VectorMoments",
    "class_moments",
    "fisher_bound",
    "hellinger_bound",
    "merge_moments",
    "minimax_bound",
    "one_vs_one",
    "one_vs_rest",
    "pairwise_mean",
    "pairwise_min",
    "patch_moments",
    "pool",
    "robust_bound",
    "witness_bound",
]

Names = tuple[str, ...] | list[str]
Size = int | tuple[int, int]
Kind = TypeVar("Kind", ClassMoments, VectorMoments, State)


def pool(x: Tensor, *, statistic: str | Names = "mean", layout: str = "auto", backend: str = "auto") -> Tensor:
    """Reduce each channel's feature map to one number per sample, or to several in one read of the map.

    Args:
        x: feature map, float16, bfloat16, float32 or float64, any strides. Axis 0 is samples.
        statistic: of the elements v of a map, over all axes but samples and channels: "mean", "sum", "l2"
            (sqrt(sum v^2)), "rms" (sqrt(mean v^2)), "absmax" (max |v|), "max", "positive_fraction" (share of v > 0), or
            "cls": the token at position 0 of a map (samples, tokens, channels). A name, or a tuple or list of names.
        layout: "nchw" (channels are axis 1, whatever the memory order), "tokens" (channels are the last axis), or
            "auto": axis 1, refused for three axes, where it would be a guess.

    Returns:
        Float64, (samples, channels) for a name and (samples, channels, statistics) for several, then a view of
        contiguous planes, one per statistic. Backend "cpp" first adds fours of 16-bit elements in float32: within 2^-22
        of the sum of the absolute terms. NaN in a map makes every statistic of that map NaN ("cls": NaN in its own
        token); Inf counts as a value.

    Raises:
        TypeError, ValueError: as above; also for an empty map, or a statistic named twice.

    Equivalent to ``x.double().mean((2, 3))`` for the mean of a map of shape (N, C, H, W).

    >>> x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]], [[-4.0, -5.0], [6.0, 7.0]]]])
    >>> pool(x)
    tensor([[1.5000, 1.0000]], dtype=torch.float64)
    >>> pool(x, statistic=("mean", "absmax", "positive_fraction"))
    tensor([[[1.5000, 3.0000, 0.7500],
             [1.0000, 7.0000, 0.5000]]], dtype=torch.float64)
    """
    names = arguments.statistics("pool", statistic)
    x, axis = arguments.feature_map("pool", x, layout, names)
    planes: Tensor = call("pool", backend, x, axis, names)
    # Not planes[0], for which torch wants the driver of a device that a fake tensor only pretends to be on.
    return planes.select(0, 0) if isinstance(statistic, str) else planes.permute(1, 2, 0)


@overload
def class_moments(
    x: Tensor, labels: Tensor, num_classes: int, *, statistic: str = ..., out: ClassMoments | None = ..., **options: Any
) -> ClassMoments: ...
@overload
def class_moments(
    x: Tensor, labels: Tensor, num_classes: int, *, statistic: Names, out: VectorMoments | None = ..., **options: Any
) -> VectorMoments: ...
def class_moments(  # type: ignore[misc]  # above stands what tells the two apart, and not all the rest again
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    statistic: str | Names = "mean",
    witness: str = "quadratic",
    scale: float | None = None,
    layout: str = "auto",
    out: Any = None,
    backend: str = "auto",
) -> State:
    """Pool a feature map and accumulate its moments per class and channel, in one read of the map.

    Args:
        x, statistic, layout: as for `pool`; several statistics for the witness "vector".
        labels: class index of each sample, shape (samples,), any integer type, in 0..num_classes-1, on the device of x.
        num_classes: number of classes; classes without samples are fine.
        witness: what the moments are of. "quadratic" and "linear": the statistic t itself, which serves both. "exp":
            exp(-scale t), which lies in [0, 1] for t >= 0. "vector": the vector of several statistics.
        scale: for "exp" alone, a finite number above 0.
        out: a state of the same kind, classes and channels to merge this batch into; it is changed in place and
            returned. By default a new one.

    Returns:
        `ClassMoments`; `VectorMoments` for the witness "vector". NaN, Inf or an overflow of exp(-scale t) makes the
        moments of that class and channel non-finite.

    Raises:
        TypeError, ValueError: as above; `out` is then unchanged. On a GPU a label outside the range is a device-side
            assertion, as in torch's own indexing.

    Equivalent to ``t = pool(x)``, then for class k ``own = t[labels == k]``, ``own.mean(0)`` and
    ``((own - own.mean(0)) ** p).sum(0)`` for p = 2, 3, 4. Source: merging after Chan, Golub and LeVeque 1979 and Pebay
    2008.

    >>> state = class_moments(torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1]), 2)
    >>> state.mean
    tensor([[ 2.],
            [10.]], dtype=torch.float64)
    >>> state.m2 / state.count[:, None]
    tensor([[1.],
            [0.]], dtype=torch.float64)
    >>> x = torch.tensor([[[[1.0, 3.0]]], [[[-1.0, 5.0]]]])
    >>> class_moments(x, torch.tensor([0, 0]), 1, statistic=("mean", "max"), witness="vector").covariance()
    tensor([[[[0., 0.],
              [0., 1.]]]], dtype=torch.float64)
    """
    op = "class_moments"
    num_classes = validation.positive_integer(op, "num_classes", num_classes)
    names = arguments.statistics(op, statistic)
    arguments.witness(op, witness, statistic, scale)
    scale = arguments.scale(op, scale) if witness == "exp" else 0.0
    x, axis = arguments.feature_map(op, x, layout, names)
    batch = x, axis, names, scale, arguments.labels(op, labels, x)
    kind: type[State] = VectorMoments if witness == "vector" else ClassMoments
    if out is None:
        new: State = call(op, backend, *batch, num_classes, witness == "vector")
        return new
    mean = (num_classes, x.shape[axis]) if witness != "vector" else (len(names), num_classes, x.shape[axis])
    state = arguments.state(op, "out", out)
    if type(state) is not kind or state.mean.shape != mean or state.device != x.device:
        wanted = arguments.description(kind, mean, x.device)
        found = arguments.description(type(state), state.mean.shape, state.device)
        raise ValueError(f"{op}: out must be {wanted}, it is {found}.")
    call("class_moments_", backend, state, *batch)
    return state


def merge_moments(a: Kind, b: Kind, *, backend: str = "auto") -> Kind:
    """The state of both sets of samples together, a new one: as `class_moments` of the samples of both.

    Exact, associative and commutative up to rounding, and the empty state is neutral to the bit.

    Args:
        a, b: two `ClassMoments` or two `VectorMoments` of the same shape on the same device.

    Raises:
        TypeError, ValueError: as above.

    Source: Chan, Golub and LeVeque 1979; Pebay 2008.

    >>> left = class_moments(torch.tensor([[1.0]]), torch.tensor([0]), 1)
    >>> right = class_moments(torch.tensor([[3.0]]), torch.tensor([0]), 1)
    >>> merge_moments(left, right).m2
    tensor([[2.]], dtype=torch.float64)
    """
    arguments.state("merge_moments", "a", a)
    arguments.state("merge_moments", "b", b)
    if type(a) is not type(b) or a.mean.shape != b.mean.shape or a.device != b.device:
        one, other = (arguments.description(type(x), x.mean.shape, x.device) for x in (a, b))
        raise ValueError(f"merge_moments: a and b must have the same kind, shape and device: a is {one}, b is {other}.")
    merged: Kind = call("merge_moments", backend, a, b)
    return merged


def patch_moments(
    x: Tensor,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | tuple[int, int, int, int] = 0,
    dilation: Size = 1,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> tuple[int, Tensor, Tensor]:
    """Mean and scatter of the patches of each channel that a convolution reads, over samples and output positions.

    Args:
        x: feature map (samples, channels, height, width), float16, bfloat16, float32 or float64, any strides. Taps
            outside the map count as 0.
        kernel_size, stride, dilation: of the convolution: an integer of at least 1 or a pair (rows, columns).
        padding: zeros around the map: an integer, a pair (rows, columns) or four (top, bottom, left, right).
        positions: flat output positions (row * output width + column), the same for every sample: shape (positions,),
            int64, on the device of x; one that is named twice counts twice. By default all.

    Returns:
        The number of patches of a channel; their mean, shape (channels, K), and the scatter matrix
        about it, shape (channels, K, K), both float64, taps in the order of ``weight[output, channel].flatten()``.
        Zeros without patches. The scatter is symmetric to the bit; backend "cpp" rounds differences from the channel's
        middle to float32 unless x is float64. NaN or Inf makes the moments of the taps that see it non-finite.

    Raises:
        TypeError, ValueError: as above; also for an empty map, or a kernel that is larger than the padded map.

    Equivalent to ``p = unfold(x[:, i : i + 1].double(), kernel_size, dilation, padding, stride)`` for each channel i,
    then ``p.mean((0, 2))`` and the sum over samples and positions of the outer products of ``p - mean``. Source: needed
    by ModHiFi (Kashyap, Murti, Nayak, Narshana and Bhattacharyya, NeurIPS 2025).

    >>> count, mean, scatter = patch_moments(torch.tensor([[[[0.0, 1.0, 3.0]]]]), (1, 2))
    >>> count, mean
    (2, tensor([[0.5000, 2.0000]], dtype=torch.float64))
    >>> scatter
    tensor([[[0.5000, 1.0000],
             [1.0000, 2.0000]]], dtype=torch.float64)
    """
    op = "patch_moments"
    x = arguments.image_map(op, x)
    window = arguments.window(op, x, kernel_size, stride, padding, dilation)
    rows, columns = window.outputs(x)
    places = rows * columns
    if positions is not None:
        positions = arguments.positions(op, positions, x)
        places = positions.shape[0]
    mean, scatter = call(op, backend, x, *window, positions)
    return x.shape[0] * places, mean, scatter


def fisher_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, backend: str = "auto") -> Tensor:
    """Lower bound on the total variation between two laws from their first two moments.

    Args:
        mean1, mean2: mean vectors of the witness, shape (..., d), 1 <= d <= 32, float32 or float64.
        cov1, cov2: population covariances, shape (..., d, d), symmetric positive semi-definite, same type and device.

    Returns:
        Shape (...), in [0, 1], the type of the inputs. Rounding, that of the given moments included (16 ulps of each),
        is charged against the bound. A direction without variance counts as perfectly separating when the means differ
        along it (1) and as useless when they do not (0). NaN for non-finite moments.

    Raises:
        TypeError, ValueError: as above.

    Equivalent to ``F / (2 + F)`` with ``F = (mean1 - mean2) @ inv(cov1 + cov2) @ (mean1 - mean2)``, the Fisher
    discriminant ratio. Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024.

    >>> one = torch.ones(1, 1)
    >>> fisher_bound(torch.tensor([2.0]), one, torch.tensor([0.0]), one)
    tensor(0.5000)
    """
    return _bound("fisher_bound", (mean1, cov1, mean2, cov2), backend)


def minimax_bound(
    mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, published: bool = False, backend: str = "auto"
) -> Tensor:
    """The best lower bound on the total variation that a linear function of the witness can give from two moments.

    k^2 / (1 + k^2), k = max over u of u'(mean1 - mean2) / (sqrt(u'cov1 u) + sqrt(u'cov2 u)). Sharp in one dimension:
    some pair of laws with these moments attains it. Never below `fisher_bound`.

    Args:
        published: (k / (sqrt 2 + k))^2 instead, the far looser form of the published code; for comparison only.

    Other arguments, Returns, Raises: as `fisher_bound`. Equivalent to a second-order cone program (maximise k); solved
    by a one-dimensional root find on the curve u(l) = ((1 - l) cov1 + l cov2)^-1 (mean1 - mean2). Source: Lanckriet, El
    Ghaoui, Bhattacharyya and Jordan 2002 (k); Anderson and Bahadur 1962 (the curve).

    >>> minimax_bound(torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([0.0]), torch.tensor([[0.0]]))
    tensor(0.8000)
    """
    return _bound("minimax_published_bound" if published else "minimax_bound", (mean1, cov1, mean2, cov2), backend)


def robust_bound(
    mean1: Tensor,
    cov1: Tensor,
    mean2: Tensor,
    cov2: Tensor,
    *,
    radius1: float | Tensor = 0.0,
    radius2: float | Tensor = 0.0,
    rho: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`fisher_bound` at the worst moments within reach of the given ones: for moments that are estimates.

    The least F / (2 + F) over all means within radius1 of mean1 and radius2 of mean2, with rho added to every variance
    of cov1 + cov2. Never above `fisher_bound`, and equal to it at radius 0 and rho 0.

    Args:
        radius1, radius2: of the balls around the means in the Euclidean norm, in the units of the means, at least 0: a
            number, or a tensor of shape (...).
        rho: in the units of the covariances, at least 0.

    Other arguments, Returns, Raises: as `fisher_bound`; 0 where the balls touch. Equivalent to
    ``min F(mean1 + a, mean2 + b)`` over ``||a|| <= radius1, ||b|| <= radius2``; solved by the secular equation
    mu ||u|| = radius1 + radius2, u = (cov1 + cov2 + (rho + mu) I)^-1 (mean1 - mean2). Source: Kim, Magnani and Boyd
    2006; the equation as in More and Sorensen 1983.

    >>> one = torch.ones(1, 1)
    >>> robust_bound(torch.tensor([3.0]), one, torch.tensor([0.0]), one, radius1=0.5, radius2=0.5)
    tensor(0.5000)
    """
    op = "robust_bound"
    arguments.law_pairs(op, mean1, cov1, mean2, cov2)
    rho = validation.at_least_zero(op, "rho", rho)
    radii = arguments.radius(op, "radius1", radius1, mean1), arguments.radius(op, "radius2", radius2, mean1)
    bound: Tensor = call(op, backend, *(law.detach() for law in (mean1, cov1, mean2, cov2)), *radii, rho)
    return bound.to(mean1.dtype)


def hellinger_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, *, backend: str = "auto") -> Tensor:
    """1 - BC, the squared Hellinger distance, of the Gaussians with these moments: TVSPrune's score.

    A lower bound on the total variation of Gaussians. Of other laws with these moments it is **none**: a baseline. A
    direction in which neither law varies drops out where the means agree along it, and gives 1 where they do not; one
    in which a single law varies gives 1: such Gaussians have no mass in common.

    Arguments, Returns, Raises: as `fisher_bound`. Equivalent to
    ``1 - (det(cov1) det(cov2)) ** 0.25 / det((cov1 + cov2) / 2) ** 0.5 * exp(-F / 4)`` with F as there. Source: Murti,
    Narshana and Bhattacharyya, TVSPrune, ICLR 2023.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> hellinger_bound(torch.tensor([2.0]).double(), one, torch.tensor([0.0]).double(), one)
    tensor(0.3935, dtype=torch.float64)
    """
    return _bound("hellinger_bound", (mean1, cov1, mean2, cov2), backend)


def witness_bound(
    mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor, *, published: bool = False, backend: str = "auto"
) -> Tensor:
    """Lower bound on the total variation from the mean and the raw second moment of one function f under two laws.

    Not the same for f + b: the best b gives `minimax_bound` of one dimension, so this is never above that.

    Args:
        mean1, mean2: E f under each law, shape (...), float32 or float64.
        second1, second2: E f^2, same shape, type and device, at least mean^2.
        published: (E1 f - E2 f)^2 / (2 (E1 f^2 + E2 f^2)) instead, the looser published form.

    Returns, Raises: as `fisher_bound`. Equivalent to
    ``(mean1 - mean2) ** 2 / (second1.sqrt() + second2.sqrt()) ** 2``. Source: Murti and Bhattacharyya, DISCEDIT,
    NeurIPS 2024 (the published form); the tighter one by Cauchy-Schwarz on the parts of p - q of either sign.

    >>> witness_bound(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
    tensor(0.2500)
    """
    moments = {"mean1": mean1, "second1": second1, "mean2": mean2, "second2": second2}
    arguments.alike("witness_bound", moments)
    bound: Tensor = call("witness_bound", backend, *(moment.detach() for moment in moments.values()), published)
    return bound.to(mean1.dtype)


def _bound(op: str, laws: tuple[Tensor, Tensor, Tensor, Tensor], backend: str) -> Tensor:
    arguments.law_pairs(op.replace("_published", ""), *laws)
    bound: Tensor = call(op, backend, *(law.detach() for law in laws))
    return bound.to(laws[0].dtype)


def one_vs_rest(
    moments: State, *, bound: str = "minimax", witness: str | None = None, backend: str = "auto", **options: Any
) -> Tensor:
    """Bound on the total variation between each class and the union of all others, per channel.

    Args:
        moments: state of one layer.
        bound: one of docs/bounds.md: "fisher" or "minimax"; "minimax_published" and "witness_published", the looser
            published forms; "robust"; "witness"; "hellinger", a baseline and no bound; or "certified", which holds with
            probability 1 - alpha over the sample for all values returned together.
        witness: for `ClassMoments` "linear" (t), "quadratic" (t, t^2; the default), or "exp", which names "linear"
            where the state is of exp(-scale t). For `VectorMoments` "vector", the default. "witness",
            "witness_published" and "certified" compare one number: "linear" (their default) or "exp" alone.
        options: for "robust", ``radius`` of the ball around each mean, in its standard errors (2 by default), and
            ``rho``, added to the variances (0). For "certified", ``alpha`` (0.05); ``value_range``, the least and the
            greatest value that the witness can ever take ((0, 1) for "exp"); ``comparisons``, over how many values
            alpha is shared (all that are returned).

    Returns:
        Shape (channels, classes), float64, in [0, 1]. NaN for a class without samples, and everywhere when fewer than
        two classes have any. A channel that is constant and equal in a class and the rest scores 0, constant and
        different 1. "The rest" weighs each class by its sample count.

    Raises:
        TypeError, ValueError: as above; also for a witness that the state or the bound does not serve, and, by
            "certified", for moments that no law on value_range has.

    Equivalent to `minimax_bound` or another of the witness's moments under each class and all others. Source: Murti and
    Bhattacharyya, DISCEDIT, NeurIPS 2024; "certified": Maurer and Pontil 2009.

    >>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    >>> one_vs_rest(class_moments(x, torch.tensor([0, 0, 1, 1]), 2))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    out: Tensor = _compared("one_vs_rest", moments, bound, witness, backend, options)
    return out


def one_vs_one(
    moments: State, *, bound: str = "minimax", witness: str | None = None, backend: str = "auto", **options: Any
) -> Tensor:
    """Bound on the total variation between each two classes, per channel.

    Returns shape (channels, classes, classes), float64, in [0, 1], symmetric, 0 on the diagonal; NaN in the rows and
    columns of classes without samples. That is channels x classes^2 numbers: for many classes `pairwise_min` and
    `pairwise_mean` stream the pairs instead. Arguments, Raises: as `one_vs_rest`.

    >>> x = torch.tensor([[0.0], [0.0], [1.0]])
    >>> one_vs_one(class_moments(x, torch.tensor([0, 1, 2]), 3))[0]
    tensor([[0., 0., 1.],
            [0., 0., 1.],
            [1., 1., 0.]], dtype=torch.float64)
    """
    out: Tensor = _compared("one_vs_one", moments, bound, witness, backend, options)
    return out


def pairwise_min(
    moments: State, *, bound: str = "minimax", witness: str | None = None, backend: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """The pair of classes that a channel tells apart least: the minimum of `one_vs_one` over pairs with samples.

    A channel that scores low here fails for some pair, however well it tells others. All pairs are streamed: memory is
    that of the state, never classes x classes x channels. For "certified", alpha is shared over all pairs.

    Returns:
        The bound, shape (channels,), float64, in [0, 1], and the pair that attains it, shape (channels, 2), int64,
        first class index < second; where several pairs attain it, any one of them. NaN and (-1, -1) where fewer than
        two classes have samples, or where the bound of some pair is NaN, because its moments are not finite.

    Arguments, Raises: as `one_vs_rest`. Source: the reduction of TVSPrune (Murti, Narshana and Bhattacharyya, ICLR
    2023) and WitnessPrune, over this bound.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 3.0]])
    >>> values, pairs = pairwise_min(class_moments(x, torch.tensor([0, 1, 2]), 3))
    >>> values
    tensor([0., 1.], dtype=torch.float64)
    >>> pairs[0]
    tensor([0, 1])
    """
    values, pairs = _compared("pairwise_min", moments, bound, witness, backend, options)
    return values, pairs


def pairwise_mean(
    moments: State, *, bound: str = "minimax", witness: str | None = None, backend: str = "auto", **options: Any
) -> Tensor:
    """The mean of `one_vs_one` over all pairs of classes with samples, per channel, streamed as in `pairwise_min`.

    Returns shape (channels,), float64, in [0, 1]. NaN where fewer than two classes have samples, or where the bound of
    some pair is NaN. Arguments, Raises: as `one_vs_rest`.

    >>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    >>> pairwise_mean(class_moments(x, torch.tensor([0, 1, 2, 3]), 4))
    tensor([0.6667], dtype=torch.float64)
    """
    out: Tensor = _compared("pairwise_mean", moments, bound, witness, backend, options)
    return out


def _compared(op: str, moments: State, bound: str, witness: str | None, backend: str, options: dict[str, Any]) -> Any:
    state = arguments.state(op, "moments", moments)
    validation.choice(op, "bound", bound, arguments.BOUNDS)
    features = arguments.witness_of(op, state, witness, bound)
    rule, *others = arguments.asked(op, bound, options, witness)
    return call(op, backend, state, features, *rule, *others)
