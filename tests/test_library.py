"""The ops as nodes of what torch records: fake tensors, torch.compile, torch.export."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import mostly_slow
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from discedit import backends, ops
from discedit.backends import library

SEVERAL = ("mean", "max", "l2")


@dataclass
class Case:
    """A call of a public op: its inputs hold tensors and states, everything else is in `call`."""

    op: str
    name: str
    call: Callable[..., Any]
    inputs: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"

    def other_inputs(self) -> tuple[Any, ...]:
        """Other values of the same shapes, types and strides; indices stay what they are."""
        return tree_map(lambda part: part * 1.5 if part.is_floating_point() else part.clone(), self.inputs)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def labels(samples: int) -> Tensor:
    return torch.arange(samples) * 7 % 3


def laws(*batch: int, d: int = 2) -> tuple[Tensor, ...]:
    root = randn(*batch, d, d)
    cov = root @ root.mT
    return randn(*batch, d), cov, randn(*batch, d) + 1, cov + torch.eye(d)


def swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same with two axes of the batch in another order of memory."""
    return tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors)


def scalar_state(classes: int = 3, channels: int = 5) -> ops.ClassMoments:
    return ops.class_moments(randn(20, channels), torch.arange(20) % classes, classes)


def vector_state() -> ops.VectorMoments:
    x = randn(20, 4, 3, 3)
    return ops.class_moments(x, torch.arange(20) % 3, 3, statistic=("mean", "max"), witness="vector")


MAPS = {
    "plain": (randn(6, 3, 4, 5), "auto"),
    "one": (randn(1, 1, 1, 1), "auto"),
    "features": (randn(5, 7), "auto"),
    "odd, bfloat16": (randn(7, 13, 3, 11).bfloat16(), "auto"),
    "volume": (randn(2, 3, 2, 3, 2), "nchw"),
    "channels last": (randn(4, 6, 3, 3).to(memory_format=torch.channels_last), "auto"),
    "sliced": (randn(6, 9, 5, 7)[:, 1::2, :, ::3], "auto"),
    "tokens": (randn(4, 7, 5), "tokens"),
    "tokens of images": (randn(3, 4, 2, 9), "tokens"),
    "no samples": (randn(0, 3, 2, 2), "auto"),
    "no channels": (randn(4, 0, 2, 2), "auto"),
}


def cases() -> list[Case]:
    found = []

    def add(op: str, name: str, call: Callable[..., Any], *inputs: Any) -> None:
        found.append(Case(op, name, call, inputs))

    for name, (x, layout) in MAPS.items():
        for statistic in ("mean", SEVERAL, *([("mean", "cls", "max")] if name == "tokens" else [])):
            add(
                "pool",
                f"{name}, {statistic}",
                lambda x, s=statistic, o=layout, **given: ops.pool(x, statistic=s, layout=o, **given),
                x,
            )
        add(
            "class_moments",
            name,
            lambda x, y, o=layout, **given: ops.class_moments(x, y, 3, layout=o, **given),
            x,
            labels(len(x)),
        )
    x, y = randn(6, 3, 4, 5), labels(6)
    vector = {"statistic": SEVERAL, "witness": "vector"}
    add("class_moments", "vector", lambda x, y, **given: ops.class_moments(x, y, 3, **vector, **given), x, y)
    add(
        "class_moments",
        "vector of one",
        lambda x, y, **given: ops.class_moments(x, y, 4, statistic=["rms"], witness="vector", **given),
        x,
        y.int(),
    )
    add(
        "class_moments",
        "exp",
        lambda x, y, **given: ops.class_moments(x, y, 3, witness="exp", scale=0.5, **given),
        x,
        y.to(torch.uint8),
    )

    def into(x: Tensor, y: Tensor, state: Any, **given: Any) -> Any:
        out = ops.class_moments(x, y, 3, out=state, **given)
        assert out is state
        return out

    add("class_moments", "into a state", into, x, y, scalar_state(3, 3))
    add(
        "class_moments",
        "into a vector state",
        lambda x, y, state, **given: into(x, y, state, **vector, **given),
        x,
        y,
        ops.VectorMoments.empty(3, 3, 3),
    )
    add("merge_moments", "scalar", lambda a, b, **given: ops.merge_moments(a, b, **given), *(scalar_state(),) * 2)
    add("merge_moments", "vector", lambda a, b, **given: ops.merge_moments(a, b, **given), *(vector_state(),) * 2)
    add(
        "merge_moments",
        "transposed",
        lambda a, b, **given: ops.merge_moments(a, b, **given),
        ops.ClassMoments(torch.ones(3, dtype=torch.int64), *(randn(5, 3).double().T for _ in range(4))),
        scalar_state(),
    )
    add("patch_moments", "plain", lambda x, **given: ops.patch_moments(x, 2, **given), x)
    add("patch_moments", "one tap", lambda x, **given: ops.patch_moments(x, 1, stride=2, **given), x)
    add("patch_moments", "no samples", lambda x, **given: ops.patch_moments(x, (2, 1), **given), x[:0])
    add(
        "patch_moments",
        "positions",
        lambda x, p, **given: ops.patch_moments(
            x, (2, 3), stride=(1, 2), padding=(1, 0, 2, 1), dilation=(2, 1), positions=p, **given
        ),
        x,
        torch.tensor([0, 5, 5]),
    )
    bounds = {"fisher_bound": ops.fisher_bound, "minimax_bound": ops.minimax_bound}
    for op, function in {**bounds, "hellinger_bound": ops.hellinger_bound, "robust_bound": ops.robust_bound}.items():
        add(op, "plain", function, *laws(5, 3))
        add(op, "swapped", function, *swapped(*laws(5, 3)))
        add(op, "one law, float64", function, *(part.double() for part in laws(d=1)))
        add(op, "no laws", function, *laws(0))
    add("minimax_bound", "published", lambda *law, **given: ops.minimax_bound(*law, published=True, **given), *laws(4))
    add(
        "robust_bound",
        "radii",
        lambda m1, c1, m2, c2, radius, **given: ops.robust_bound(
            m1, c1, m2, c2, radius1=0.25, radius2=radius, rho=0.5, **given
        ),
        *laws(5, 3),
        torch.full((5, 3), 0.125),
    )
    first, second = randn(4, 6), randn(6, 4)
    moments = first, 2 * first**2 + 1, second.T, 2 * second.T**2 + 1
    add("witness_bound", "plain", ops.witness_bound, *moments)
    add("witness_bound", "swapped", ops.witness_bound, *swapped(*moments))
    add(
        "witness_bound",
        "published",
        lambda *m, **given: ops.witness_bound(*m, published=True, **given),
        *(moment.double() for moment in moments),
    )
    for op in ("one_vs_rest", "one_vs_one", "pairwise_min", "pairwise_mean"):
        function = getattr(ops, op)
        add(op, "scalar", function, scalar_state())
        add(op, "vector", lambda s, f=function, **given: f(s, bound="fisher", **given), vector_state())
        add(op, "robust", lambda s, f=function, **given: f(s, bound="robust", radius=1.5, **given), scalar_state())
        add(
            op,
            "certified",
            lambda s, f=function, **given: f(s, bound="certified", value_range=(-99, 99), **given),
            scalar_state(4, 3),
        )
        add(op, "one class, no channels", function, scalar_state(1, 0))
    return found


CASES = cases()


def recorded(case: Case) -> bool:
    """To compile takes longer than to run: not for what differs in nothing that is compiled."""
    first = case.name.split(",")[0]
    if case.op in ("pool", "class_moments") and first in MAPS:
        return first in ("plain", "tokens", "no samples")
    return case.op not in ("one_vs_one", "pairwise_min", "pairwise_mean") or first in ("scalar", "certified")


RECORDED = [case for case in CASES if recorded(case)]
ONE_OF_EACH = [next(case for case in CASES if case.op == op) for op in backends.OPS]


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the same strides: some ops write into a state."""
    return tree_map(lambda part: part.clone(), inputs)


def described(result: Any) -> list[Any]:
    return [
        (part.shape, part.dtype, part.device, part.stride()) if isinstance(part, Tensor) else part
        for part in tree_leaves(result)
    ]


def assert_same(ours: Any, expected: Any) -> None:
    """Types, strides and bits."""
    assert type(ours) is type(expected)
    assert described(ours) == described(expected)
    for mine, theirs in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor):
            assert torch.equal(torch.nan_to_num(mine, nan=-7), torch.nan_to_num(theirs, nan=-7))


@pytest.fixture
def no_kernels(monkeypatch):
    """What a fake tensor must not reach: its address is none, so C++ would end the process."""

    def select(op: str, *_: Any) -> Any:
        raise AssertionError(f"{op} of fake tensors reached its implementation")

    monkeypatch.setattr(library, "select", select)


def test_every_op_has_a_case_and_a_schema():
    assert {case.op for case in CASES} == set(backends.OPS)
    assert {"ClassMoments", "VectorMoments", *backends.OPS} == set(ops.__all__)
    for op in backends.OPS:
        (schema,) = torch._C._jit_get_schemas_for_operator(f"discedit::{op}")
        assert not schema.is_mutable
    (schema,) = torch._C._jit_get_schemas_for_operator("discedit::class_moments_")
    assert [argument.name for argument in schema.arguments if argument.is_write] == ["state"]


# ---- fake tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_are_described_as_the_real_ones(case, request):
    real = {backend: described(case.call(*copied(case.inputs), backend=backend)) for backend in ("cpp", "reference")}
    request.getfixturevalue("no_kernels")
    mode = FakeTensorMode()
    fake = tree_map(mode.from_tensor, case.inputs)
    with mode:
        inside = case.call(*fake)
    for result in (inside, case.call(*fake)):
        assert all(type(part).__name__ == "FakeTensor" for part in tree_leaves(result) if isinstance(part, Tensor))
        assert described(result) == real["cpp"]
        assert described(result) == real["reference"]


@pytest.mark.usefixtures("no_kernels")
def test_fake_results_are_where_the_fake_tensors_are():
    with FakeTensorMode():
        x = torch.empty(6, 3, 4, 5, device="cuda")
        y = torch.empty(6, dtype=torch.int64, device="cuda")
        state = ops.class_moments(x, y, 3)
        results = [ops.pool(x), state, ops.merge_moments(state, state), ops.patch_moments(x, 3)[1:]]
        results += [ops.one_vs_rest(state), ops.one_vs_one(state), ops.pairwise_min(state), ops.pairwise_mean(state)]
        laws = torch.empty(3, 2, device="cuda"), torch.empty(3, 2, 2, device="cuda")
        results += [ops.fisher_bound(*laws, *laws), ops.robust_bound(*laws, *laws, radius1=0.5)]
        results += [ops.witness_bound(laws[0], laws[0], laws[0], laws[0])]
    assert {str(part.device) for part in tree_leaves(results)} == {"cuda:0"}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"pool: statistic must be one of .* got 'median'", lambda x, y: ops.pool(x, statistic="median")),
        (r"pool: layout must be named for a map with 3 axes", lambda x, y: ops.pool(x[0])),
        (r"pool: backend must be one of 'auto', .* got 'cuad'", lambda x, y: ops.pool(x, backend="cuad")),
        (r"class_moments: labels must hold one class .* \(5,\)", lambda x, y: ops.class_moments(x, y[1:], 3)),
        (
            r"class_moments: backend must be one of",
            lambda x, y: ops.class_moments(x, y, 3, out=ops.ClassMoments.empty(3, 3), backend="cuad"),
        ),
        (r"patch_moments: kernel_size must fit into", lambda x, y: ops.patch_moments(x, 9)),
        (r"positions must have shape \(positions,\)", lambda x, y: ops.patch_moments(x, 1, positions=y[None])),
        (r"fisher_bound: means must have shape", lambda x, y: ops.fisher_bound(x, x, x, x)),
        (r"radius1 must be a finite .* got -1", lambda x, y: ops.robust_bound(*fake_laws(), radius1=-1)),
        (r"witness_bound: second1 must have the shape", lambda x, y: ops.witness_bound(x, x[1:], x, x)),
    ],
)
def test_rules_about_shapes_hold_for_fake_tensors(message, call):
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        call(torch.empty(6, 3, 4, 5), torch.empty(6, dtype=torch.int64))


def fake_laws() -> tuple[Tensor, ...]:
    return (torch.empty(3, 2), torch.empty(3, 2, 2)) * 2


# ---- what records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "case"),
    mostly_slow(
        [("eager", case) for case in ONE_OF_EACH] + [("aot_eager", case) for case in RECORDED], len(ONE_OF_EACH)
    ),
    ids=str,
)
def test_compiled_is_eager_to_the_bit(backend, case):
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    for inputs in (case.inputs, case.other_inputs()):  # what is recorded must not be the values
        ours, theirs = copied(inputs), copied(inputs)
        assert_same(compiled(*ours), case.call(*theirs))
        assert_same(ours, theirs)  # states are written to, and nothing else is


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_opcheck(case, monkeypatch):
    """On what the public function gives its op: schema, fake results, functionalization and sizes that stay open."""
    given = []

    real = library.record

    def record(op: str, backend: str, *arguments: Any) -> Any:
        plain = (
            part.tensors() if isinstance(part, (ops.ClassMoments, ops.VectorMoments)) else part for part in arguments
        )
        given.append((getattr(torch.ops.discedit, op).default, (*plain, backend)))
        return real(op, backend, *arguments)

    monkeypatch.setattr(library, "traced", lambda *_: True)
    monkeypatch.setattr(library, "record", record)
    case.call(*copied(case.inputs))
    ((op, arguments),) = given
    torch.library.opcheck(op, tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, arguments))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_calls_leave_the_dispatcher_out(case, monkeypatch):
    monkeypatch.setattr(library, "record", None)
    case.call(*copied(case.inputs))
    case.call(*(nn.Buffer(part) if isinstance(part, Tensor) else part for part in copied(case.inputs)))


def test_a_dispatch_mode_sees_the_op():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = randn(2, 3, 4, 4)
    with Mode():
        pooled = ops.pool(x)
    assert torch.equal(pooled, ops.pool(x))
    assert seen.count("discedit.pool.default") == 1


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_trace_holds_the_op_and_not_its_values(tracing_mode):
    graph = make_fx(lambda x: ops.pool(x, statistic=SEVERAL), tracing_mode=tracing_mode)(randn(4, 3, 5, 5))
    assert [node.target for node in graph.graph.nodes].count(torch.ops.discedit.pool.default) == 1
    x = randn(4, 3, 5, 5) + 1
    assert_same(graph(x), ops.pool(x, statistic=SEVERAL))


def test_sizes_of_a_batch_may_change():
    torch._dynamo.reset()
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    def both(x, y, classes):
        return ops.pool(x, statistic=SEVERAL), ops.class_moments(x, y, classes), ops.patch_moments(x, 2)

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    x, y = randn(9, 3, 4, 5), labels(9)
    for samples in (9, 5, 7, 2):
        assert_same(compiled(x[:samples], y[:samples], 3), both(x[:samples], y[:samples], 3))
    assert len(compilations) == 2  # for one size, and for any
    for classes in (4, 5, 6):
        assert_same(compiled(x, y, classes), both(x, y, classes))
    assert len(compilations) <= 4
    for samples in (1, 0):
        assert_same(compiled(x[:samples], y[:samples], 3), both(x[:samples], y[:samples], 3))


def test_numbers_may_change():
    torch._dynamo.reset()
    state, x, y, pair = scalar_state(), randn(6, 3), labels(6), laws(3)

    def all_of(number):
        return (
            ops.class_moments(x, y, 3, witness="exp", scale=number),
            ops.one_vs_rest(state, bound="robust", radius=number, rho=number),
            ops.one_vs_one(state, bound="certified", alpha=number, value_range=(-9 - number, 9 + number)),
            ops.robust_bound(*pair, radius1=number),
        )

    compiled = torch.compile(all_of, fullgraph=True, backend="eager")
    for number in (0.5, 0.25, 0.125):
        assert_same(compiled(number), all_of(number))


def test_gradients_go_around_the_ops():
    torch._dynamo.reset()

    def loss(x):
        cov = x[0] @ x[0].mT + torch.eye(4)
        return (ops.pool(x * 2) * x.mean()).sum() + (ops.fisher_bound(x[0, :, 0], cov, x[1, :, 0], cov) * x.sum()).sum()

    x = randn(2, 3, 4, 4)
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x.grad = None
        function(x.requires_grad_()).backward()
        gradients.append(x.grad)
    assert_same(*gradients)


def test_values_are_checked_when_the_program_runs():
    torch._dynamo.reset()
    state, x, y = scalar_state(), randn(6, 3, 4, 5), labels(6)

    def fails(message: str, call: Callable[..., Any], *inputs: Any) -> None:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for function in (call, compiled):
            with pytest.raises(ValueError, match=message):
                function(*copied(inputs))

    fails(r"labels must lie in 0\.\.1 .* found 2", lambda x, y: ops.class_moments(x, y, 2), x, y)
    fails(
        r"labels must lie in 0\.\.1 .* found 2",
        lambda x, y, state: ops.class_moments(x, y, 2, out=state),
        x,
        y,
        ops.ClassMoments.empty(2, 3),
    )
    fails(
        r"positions must lie in 0\.\.11 \(3 x 4 outputs\), found 12",
        lambda x, p: ops.patch_moments(x, 2, positions=p),
        x,
        torch.tensor([3, 12]),
    )
    fails(
        r"radius2 must be finite and at least 0 everywhere, got -1",
        lambda m1, c1, m2, c2, radius: ops.robust_bound(m1, c1, m2, c2, radius2=radius),
        *laws(4),
        torch.tensor([1.0, 0, -1, 0]),
    )
    values = (torch.tensor([value]) for value in (1.0, 2.0, 3.0, 4.0))
    fails(r"second2 must be at least the square", ops.witness_bound, *values)
    fails(
        r"one_vs_rest: value_range must hold every value",
        lambda state: ops.one_vs_rest(state, bound="certified", value_range=(5, 6)),
        state,
    )


def test_a_named_backend_runs_or_says_why_not():
    torch._dynamo.reset()
    x = randn(2, 3, 4, 4)
    compiled = torch.compile(lambda x, backend: ops.pool(x, backend=backend), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, "reference"), ops.pool(x, backend="reference"))
    with pytest.raises(RuntimeError, match="pool: backend 'cuda' cannot run: "):
        compiled(x, "cuda")


# ---- programs -------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Pools one layer, keeps the moments of another, and adds them up over calls."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        for name, tensor in zip(("n", "mean", "m2", "m3", "m4"), ops.ClassMoments.empty(3, 5).tensors(), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ops.ClassMoments]:
        maps = self.convolution(x)
        total = ops.ClassMoments(self.n, self.mean, self.m2, self.m3, self.m4)
        ops.class_moments(maps, y, 3, out=total)
        return ops.pool(maps, statistic=SEVERAL), ops.class_moments(maps.relu(), y, 3)


# What loading a program says of its own buffers in torch 2.9.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_is_eager_to_the_bit(strict):
    batch = torch.export.Dim("batch")
    model, x, y = Network(), randn(6, 3, 8, 8), labels(6)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    targets = [node.target for node in program.graph.nodes]
    for op in ("pool", "class_moments", "class_moments_"):
        assert targets.count(getattr(torch.ops.discedit, op).default) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for samples in (6, 4, 3):
        assert_same(loaded(x[:samples], y[:samples]), model(x[:samples], y[:samples]))
    assert_same(dict(loaded.named_buffers()), dict(model.named_buffers()))
    assert model.n.sum() == 13
