"""The ops as torch knows them, ``torch.ops.discedit``: one schema each, over tensors and plain values.

What records a program (`torch.compile`, `torch.export`) or works on tensors without memory (`FakeTensorMode`) must see
an op as one node whose results it can describe, and must not look inside, where addresses go to C++. `call` is what
`discedit.ops` runs an op by. Each op is registered with a function that runs it and one, its fake, that makes results
of the same shapes, types, strides and device from tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from discedit.backends import COMPARISONS, NAMES, arguments, select
from discedit.backends.arguments import Asked, Rule
from discedit.common import validation
from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.common.window import Window

Function = Callable[..., Any]
Tensors = State | Sequence[Tensor]  # a state, or its tensors
_FUNCTIONS: dict[str, Function] = {}

# So that a module that gives or takes a state can be exported; torch.compile and torch.func look inside as well.
for _kind in (ClassMoments, VectorMoments):
    torch.export.register_dataclass(_kind, serialized_type_name=f"discedit.{_kind.__name__}")


def call(op: str, backend: str, *given: Any) -> Any:
    """Runs an op: as a node where torch records, directly elsewhere, which spares a call of it the dispatcher."""
    return record(op, backend, *given) if traced(*given) else _FUNCTIONS[op](*given, backend)


_PLAIN = frozenset({Tensor, int, float, bool, str, tuple, type(None)})


def traced(*given: Any) -> bool:
    """Whether torch records this call, or a tensor of it is more than memory: fake, functional, distributed."""
    # A mode on that stack (fake tensors, a recorder) sees only what goes through the dispatcher.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for value in given:  # in the time of an eager call, so nothing shorter
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is ClassMoments or kind is VectorMoments:
            if traced(*value.tensors()):
                return True
        elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


def record(op: str, backend: str, *given: Any) -> Any:
    """The registered op, to which a state is a list of tensors. Whether a backend that is asked for by name can run
    shows when the program does."""
    validation.choice(op.removesuffix("_"), "backend", backend, ("auto", *NAMES))
    plain = (value.tensors() if isinstance(value, (ClassMoments, VectorMoments)) else value for value in given)
    found = getattr(torch.ops.discedit, op)(*plain, backend)
    return _state(found) if isinstance(found, list) else found


def _register(op: str, schema: str, results: str, fake: Function) -> Callable[[Function], Function]:
    """For tensors of any device: `select` tells devices apart."""

    def register(function: Function) -> Function:
        name = f"discedit::{op}"
        torch.library.define(name, f"({schema}, str backend) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default")(lambda *given: _listed(function(*given)))
        torch.library.register_fake(name)(lambda *given: _listed(fake(*given)))
        _FUNCTIONS[op] = function
        return function

    return register


def _listed(found: Any) -> Any:
    return list(found.tensors()) if isinstance(found, (ClassMoments, VectorMoments)) else found


def _state(given: Tensors) -> State:
    if isinstance(given, (ClassMoments, VectorMoments)):
        return given
    kind: type[State] = ClassMoments if given[1].ndim == ClassMoments.axes else VectorMoments
    return kind(*given)


# ---- moments --------------------------------------------------------------------------------------------------------

_POOLED = "Tensor x, int channel_axis, str[] statistics"


def _planes(x: Tensor, channel_axis: int, statistics: Sequence[str], backend: str) -> Tensor:
    return x.new_empty((len(statistics), x.shape[0], x.shape[channel_axis]), dtype=torch.float64)


@_register("pool", _POOLED, "Tensor", _planes)
def _pool(x: Tensor, channel_axis: int, statistics: Sequence[str], backend: str) -> Any:
    return select("pool", backend, x.device)(x, channel_axis, tuple(statistics))


_BATCH = f"{_POOLED}, float scale, Tensor labels"


@_register("class_moments_", f"Tensor(a!)[] state, {_BATCH}", "()", lambda *given: None)
def _update(state: Tensors, *batch: Any) -> None:
    x, channel_axis, statistics, scale, labels, backend = batch
    run = select("class_moments", backend, x.device)
    run(x, channel_axis, tuple(statistics), scale, labels, _state(state))


def _empty(x: Tensor, channel_axis: int, statistics: Sequence[str], *others: Any) -> State:
    _scale, _labels, num_classes, vector, _backend = others
    mean = num_classes, x.shape[channel_axis]
    return VectorMoments.empty(len(statistics), *mean, x.device) if vector else ClassMoments.empty(*mean, x.device)


@_register("class_moments", f"{_BATCH}, SymInt num_classes, bool vector", "Tensor[]", _empty)
def _class_moments(*given: Any) -> State:
    *batch, _num_classes, _vector, backend = given
    state = _empty(*given)
    _update(state, *batch, backend)
    return state


@_register("merge_moments", "Tensor[] a, Tensor[] b", "Tensor[]", lambda a, *others: _state(a).clone())
def _merge_moments(a: Tensors, b: Tensors, backend: str) -> State:
    merged = _state(a).clone()
    select("merge_moments", backend, merged.device)(merged, _state(b))
    return merged


def _patch_outputs(x: Tensor, kernel: Sequence[int], *others: Any) -> tuple[Tensor, Tensor]:
    shape = x.shape[1], kernel[0] * kernel[1]
    return x.new_empty(shape, dtype=torch.float64), x.new_empty((*shape, shape[1]), dtype=torch.float64)


@_register(
    "patch_moments",
    "Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor? positions",
    "(Tensor, Tensor)",
    _patch_outputs,
)
def _patch_moments(x: Tensor, *others: Any) -> Any:
    *sizes, positions, backend = others
    window = Window(*sizes)
    if positions is not None:
        rows, columns = window.outputs(x)
        arguments.index_range("patch_moments", "positions", positions, rows * columns, f"{rows} x {columns} outputs")
    return select("patch_moments", backend, x.device)(x, window, positions)


# ---- bounds ---------------------------------------------------------------------------------------------------------

_LAWS = "Tensor mean1, Tensor cov1, Tensor mean2, Tensor cov2"


def _pairs(mean1: Tensor, *others: Any) -> Tensor:
    return mean1.new_empty(mean1.shape[:-1], dtype=torch.float64)


def _bound(op: str, *given: Any) -> Any:
    *laws, backend = given
    return select(op, backend, laws[0].device, laws[0].shape[-1])(*laws)


for _op in ("fisher_bound", "minimax_bound", "minimax_published_bound", "hellinger_bound"):
    _register(_op, _LAWS, "Tensor", _pairs)(partial(_bound, _op))


@_register("robust_bound", f"{_LAWS}, Tensor radius1, Tensor radius2, float rho", "Tensor", _pairs)
def _robust_bound(*given: Any) -> Any:
    *laws, radius1, radius2, rho, backend = given
    arguments.radius_range("robust_bound", radius1, radius2)
    return select("robust_bound", backend, radius1.device)(*laws, radius1 + radius2, rho)


@_register(
    "witness_bound",
    "Tensor mean1, Tensor second1, Tensor mean2, Tensor second2, bool published",
    "Tensor",
    lambda mean1, *others: mean1.new_empty(mean1.shape, dtype=torch.float64),
)
def _witness_bound(*given: Any) -> Any:
    *moments, published, backend = given
    arguments.second_moments("witness_bound", *moments)
    return select("witness_bound", backend, moments[0].device)(*moments, published)


# ---- one against the rest, and every pair ---------------------------------------------------------------------------

# Options as they are asked for: those of "certified" become a rule with the counts, known only when a program runs.
_ASKED = (
    "Tensor[] moments, str witness, str bound, float radius, float rho, float log_term, float low, float high, "
    "float alpha, int? comparisons"
)


def _compare(op: str, given: Tensors, witness: str, *others: Any) -> Any:
    """Bounds between the classes of a state, of whatever the op reduces them to."""
    *rule, alpha, comparisons, backend = others
    moments, asked = _state(given), Asked(Rule(*rule), alpha, comparisons)
    classes = int((moments.count > 0).sum()) if asked.rule.name == "certified" else 0
    values = moments.channels * (classes if op == "one_vs_rest" else classes * (classes - 1) // 2)
    settled = arguments.settled(op, asked, moments, values)
    dimension = moments.dimension if isinstance(moments, VectorMoments) else 1
    return select(op, backend, moments.device, dimension, settled.name)(moments, settled, witness)


def _compared(op: str, tensors: Sequence[Tensor], *others: Any) -> Any:
    classes, channels = tensors[1].shape[-2:]
    shape = {"one_vs_rest": (channels, classes), "one_vs_one": (channels, classes, classes)}.get(op, (channels,))
    values = tensors[1].new_empty(shape)
    return (values, tensors[0].new_empty((channels, 2))) if op == "pairwise_min" else values


for _op in COMPARISONS:
    _results = "(Tensor, Tensor)" if _op == "pairwise_min" else "Tensor"
    _register(_op, _ASKED, _results, partial(_compared, _op))(partial(_compare, _op))
