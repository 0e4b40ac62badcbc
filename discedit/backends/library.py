"""The ops as torch knows them, ``torch.ops.discedit``: one schema each, over tensors and plain values.

What records a program (`torch.compile`, `torch.export`) or works on tensors without memory (`FakeTensorMode`) must see
an op as one node whose results it can describe, and must not look inside, where addresses go to C++. `discedit.ops`
calls these where `traced` says so, and the implementation itself elsewhere, which spares a call of it the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from discedit.backends import NAMES, select
from discedit.common import validation
from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.common.validation import Asked, Window

Function = TypeVar("Function", bound=Callable[..., Any])

# So that a module that gives or takes a state can be exported; torch.compile and torch.func look inside as well.
for _kind in (ClassMoments, VectorMoments):
    torch.export.register_dataclass(_kind, serialized_type_name=f"discedit.{_kind.__name__}")


def traced(*tensors: Tensor) -> bool:
    """Whether torch records this call, or one of the tensors is more than memory: fake, functional, distributed."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:  # in the time of an eager call, so nothing shorter
        kind = type(tensor)
        if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


def record(op: str, backend: str, *arguments: Any) -> Any:
    """The registered op. Whether a backend that is asked for by name can run shows when the program does."""
    validation.choice(op.removesuffix("_"), "backend", backend, ("auto", *NAMES))
    return getattr(torch.ops.discedit, op)(*arguments, backend)


def _registered(arguments: str, results: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function under its own name, for tensors of any device: `select` tells devices apart. `fake` makes
    results of the same shapes, types, strides and device from tensors without memory."""

    def register(function: Function) -> Function:
        name = f"discedit::{function.__name__}"
        torch.library.define(name, f"({arguments}, str backend) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default")(function)
        torch.library.register_fake(name)(fake)
        return function

    return register


def _state(tensors: Sequence[Tensor]) -> State:
    kind: type[State] = ClassMoments if tensors[1].ndim == ClassMoments.axes else VectorMoments
    return kind(*tensors)


# ---- moments --------------------------------------------------------------------------------------------------------


def _fake_pool(x: Tensor, channel_axis: int, statistics: Sequence[str], backend: str) -> Tensor:
    return x.new_empty((len(statistics), x.shape[0], x.shape[channel_axis]), dtype=torch.float64)


@_registered("Tensor x, int channel_axis, str[] statistics", "Tensor", _fake_pool)
def pool(x: Tensor, channel_axis: int, statistics: Sequence[str], backend: str) -> Tensor:
    """Planes, one per statistic, contiguous: (statistics, samples, channels)."""
    planes: Tensor = select("pool", backend, x.device)(x, channel_axis, tuple(statistics))
    return planes


def _empty(x: Tensor, channel_axis: int, statistics: Sequence[str], num_classes: int, vector: bool) -> State:
    mean = num_classes, x.shape[channel_axis]
    return VectorMoments.empty(len(statistics), *mean, x.device) if vector else ClassMoments.empty(*mean, x.device)


def _fake_class_moments(
    x: Tensor,
    channel_axis: int,
    statistics: Sequence[str],
    scale: float,
    labels: Tensor,
    num_classes: int,
    vector: bool,
    backend: str,
) -> list[Tensor]:
    return list(_empty(x, channel_axis, statistics, num_classes, vector).tensors())


@_registered(
    "Tensor x, int channel_axis, str[] statistics, float scale, Tensor labels, SymInt num_classes, bool vector",
    "Tensor[]",
    _fake_class_moments,
)
def class_moments(
    x: Tensor,
    channel_axis: int,
    statistics: Sequence[str],
    scale: float,
    labels: Tensor,
    num_classes: int,
    vector: bool,
    backend: str,
) -> list[Tensor]:
    """The tensors of a new state."""
    state = _empty(x, channel_axis, statistics, num_classes, vector)
    select("class_moments", backend, x.device)(x, channel_axis, tuple(statistics), scale, labels, state)
    return list(state.tensors())


def _fake_class_moments_(*arguments: Any) -> None:
    """Makes no tensors; the schema says which ones change."""


@_registered(
    "Tensor(a!)[] state, Tensor x, int channel_axis, str[] statistics, float scale, Tensor labels",
    "()",
    _fake_class_moments_,
)
def class_moments_(
    state: Sequence[Tensor],
    x: Tensor,
    channel_axis: int,
    statistics: Sequence[str],
    scale: float,
    labels: Tensor,
    backend: str,
) -> None:
    """The same, merged into a state."""
    run = select("class_moments", backend, x.device)
    run(x, channel_axis, tuple(statistics), scale, labels, _state(state))


def _fake_merge_moments(a: Sequence[Tensor], b: Sequence[Tensor], backend: str) -> list[Tensor]:
    return [tensor.clone() for tensor in a]


@_registered("Tensor[] a, Tensor[] b", "Tensor[]", _fake_merge_moments)
def merge_moments(a: Sequence[Tensor], b: Sequence[Tensor], backend: str) -> list[Tensor]:
    merged = _state(a).clone()
    select("merge_moments", backend, merged.device)(merged, _state(b))
    return list(merged.tensors())


def _fake_patch_moments(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = x.shape[1], kernel[0] * kernel[1]
    mean = x.new_empty(shape, dtype=torch.float64)
    return mean, x.new_empty((*shape, shape[1]), dtype=torch.float64)


@_registered(
    "Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor? positions",
    "(Tensor, Tensor)",
    _fake_patch_moments,
)
def patch_moments(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mean and scatter, without the number of patches, which follows from the sizes."""
    window = Window(kernel, stride, padding, dilation)
    if positions is not None:
        validation.position_range("patch_moments", positions, window.outputs(x))
    mean, scatter = select("patch_moments", backend, x.device)(x, window, positions)
    return mean, scatter


# ---- bounds ---------------------------------------------------------------------------------------------------------

_LAWS = "Tensor mean1, Tensor cov1, Tensor mean2, Tensor cov2"


def _fake_bound(mean1: Tensor, *others: Any) -> Tensor:
    return mean1.new_empty(mean1.shape[:-1], dtype=torch.float64)


def _bound(op: str, backend: str, *laws: Tensor) -> Tensor:
    bound: Tensor = select(op, backend, laws[0].device, laws[0].shape[-1])(*laws)
    return bound


@_registered(_LAWS, "Tensor", _fake_bound)
def fisher_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, backend: str) -> Tensor:
    return _bound("fisher_bound", backend, mean1, cov1, mean2, cov2)


@_registered(_LAWS, "Tensor", _fake_bound)
def minimax_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, backend: str) -> Tensor:
    return _bound("minimax_bound", backend, mean1, cov1, mean2, cov2)


@_registered(_LAWS, "Tensor", _fake_bound)
def minimax_published_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, backend: str) -> Tensor:
    return _bound("minimax_published_bound", backend, mean1, cov1, mean2, cov2)


@_registered(_LAWS, "Tensor", _fake_bound)
def hellinger_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, backend: str) -> Tensor:
    return _bound("hellinger_bound", backend, mean1, cov1, mean2, cov2)


@_registered(f"{_LAWS}, Tensor radius1, Tensor radius2, float rho", "Tensor", _fake_bound)
def robust_bound(
    mean1: Tensor,
    cov1: Tensor,
    mean2: Tensor,
    cov2: Tensor,
    radius1: Tensor,
    radius2: Tensor,
    rho: float,
    backend: str,
) -> Tensor:
    op = "robust_bound"
    for argument, radius in (("radius1", radius1), ("radius2", radius2)):
        validation.radius_range(op, argument, radius)
    bound: Tensor = select(op, backend, mean1.device)(mean1, cov1, mean2, cov2, radius1 + radius2, rho)
    return bound


def _fake_witness_bound(mean1: Tensor, *others: Any) -> Tensor:
    return mean1.new_empty(mean1.shape, dtype=torch.float64)


@_registered(
    "Tensor mean1, Tensor second1, Tensor mean2, Tensor second2, bool published", "Tensor", _fake_witness_bound
)
def witness_bound(
    mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor, published: bool, backend: str
) -> Tensor:
    op = "witness_bound"
    validation.second_moments(op, mean1, second1, mean2, second2)
    bound: Tensor = select(op, backend, mean1.device)(mean1, second1, mean2, second2, published)
    return bound


# ---- one against the rest, and every pair ---------------------------------------------------------------------------

# Options as they are asked for: those of "certified" become a rule with the counts, known only when a program runs.
_MOMENTS = (
    "Tensor[] moments, str witness, str bound, float radius, float rho, float alpha, float low, float high, "
    "int? comparisons"
)


def compared(op: str, moments: State, witness: str, asked: Asked, backend: str) -> Any:
    """Bounds between the classes of a state, of whatever the op reduces them to."""
    classes = int((moments.count > 0).sum()) if asked.bound == "certified" else 0
    values = moments.channels * (classes if op == "one_vs_rest" else classes * (classes - 1) // 2)
    rule = validation.settled(op, asked, moments, values)
    dimension = moments.dimension if isinstance(moments, VectorMoments) else 1
    return select(op, backend, moments.device, dimension, rule.name)(moments, rule, witness)


def _fake_one_vs_rest(moments: Sequence[Tensor], *others: Any) -> Tensor:
    state = _state(moments)
    return state.mean.new_empty((state.channels, state.num_classes))


@_registered(_MOMENTS, "Tensor", _fake_one_vs_rest)
def one_vs_rest(moments: Sequence[Tensor], witness: str, *others: Any) -> Tensor:
    *asked, backend = others
    bounds: Tensor = compared("one_vs_rest", _state(moments), witness, Asked(*asked), backend)
    return bounds


def _fake_one_vs_one(moments: Sequence[Tensor], *others: Any) -> Tensor:
    state = _state(moments)
    return state.mean.new_empty((state.channels, state.num_classes, state.num_classes))


@_registered(_MOMENTS, "Tensor", _fake_one_vs_one)
def one_vs_one(moments: Sequence[Tensor], witness: str, *others: Any) -> Tensor:
    *asked, backend = others
    bounds: Tensor = compared("one_vs_one", _state(moments), witness, Asked(*asked), backend)
    return bounds


def _fake_pairwise_min(moments: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    state = _state(moments)
    return state.mean.new_empty((state.channels,)), state.count.new_empty((state.channels, 2))


@_registered(_MOMENTS, "(Tensor, Tensor)", _fake_pairwise_min)
def pairwise_min(moments: Sequence[Tensor], witness: str, *others: Any) -> tuple[Tensor, Tensor]:
    *asked, backend = others
    values, pairs = compared("pairwise_min", _state(moments), witness, Asked(*asked), backend)
    return values, pairs


def _fake_pairwise_mean(moments: Sequence[Tensor], *others: Any) -> Tensor:
    state = _state(moments)
    return state.mean.new_empty((state.channels,))


@_registered(_MOMENTS, "Tensor", _fake_pairwise_mean)
def pairwise_mean(moments: Sequence[Tensor], witness: str, *others: Any) -> Tensor:
    *asked, backend = others
    bounds: Tensor = compared("pairwise_mean", _state(moments), witness, Asked(*asked), backend)
    return bounds
