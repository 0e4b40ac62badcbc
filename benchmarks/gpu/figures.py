"""The steps that measure: each is a row of cases, a case one row of the report.

A case says what it is of before it runs, so that one that never comes back has a name. Its answer is checked against
the float64 reference before it is timed: a wrong answer is a failed row, and has no time. Times are the device's own;
the host's stand beside them. Bytes are those that must move: each element of a map once, in its own type.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import discedit
from benchmarks.gpu.device import Clock, Gpu, Host
from benchmarks.idioms import CLASSES, PATCHES, STATISTICS, feature_map, pooling, sums_per_class
from benchmarks.idioms import patch_moments as patch_idioms
from benchmarks.networks import ResNet, VisionTransformer, build
from discedit import backends, ops, reference
from discedit.backends.arguments import Rule
from discedit.common.state import ClassMoments, VectorMoments
from discedit.model.forward import call, frozen_eval
from discedit.moments.second_moments import collect_second_moments

KERNELS = ("cuda", "triton")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row: what it is of, and what measures it and gives the rest of the row."""

    facts: Row
    run: Callable[[], Row]


@dataclass(frozen=True)
class Sizes:
    """How large everything is: on a GPU, or where the gate is rehearsed."""

    smoke: tuple[int, ...]  # a map
    state: tuple[int, int]  # classes and channels of a small one
    maps: dict[str, tuple[int, ...]]
    tokens: tuple[int, ...]
    small: tuple[int, ...]
    patches: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]  # as `benchmarks.idioms.PATCHES`
    samples_of_patches: int
    plain: int  # elements of 4 bytes that a plain read reads
    conversions: int  # of each of 2^20 numbers; of 2^10 in a rehearsal
    lanes: int
    means: tuple[str, ...]  # of classes: as real channels have them, or all the same: the worst case
    classes: int
    channels: tuple[int, ...]
    networks: tuple[str, ...]
    image: int
    batches: tuple[int, ...]
    rounds: int
    repeats: int
    turns: int  # inputs that take turns, so that none is in a cache
    ahead: int
    compiled: tuple[str, ...]


FULL = Sizes(
    smoke=(50, 6, 9, 11),
    state=(7, 33),
    maps={
        "56x56x256": (256, 256, 56, 56),
        "28x28x512": (256, 512, 28, 28),
        "14x14x1024": (256, 1024, 14, 14),
        "7x7x2048": (256, 2048, 7, 7),
    },
    tokens=(256, 768, 197),
    small=(32, 2048, 7, 7),
    patches=PATCHES,
    samples_of_patches=32,
    plain=1 << 29,
    conversions=2048,
    lanes=1 << 20,
    means=("spread", "one mean"),
    classes=1000,
    channels=(2048, 26560),
    networks=("ResNet-50", "ViT-B/16"),
    image=224,
    batches=(256, 64),
    rounds=5,
    repeats=30,
    turns=3,
    ahead=40_000_000,
    compiled=("56x56x256", "197x768"),
)
TINY = Sizes(
    smoke=(9, 3, 3, 4),
    state=(3, 2),
    maps={"3x3x4": (2, 4, 3, 3)},
    tokens=(2, 4, 5),
    small=(4, 4, 3, 3),
    patches={"5x4x2, 3x3": ((2, 5, 4), (3, 1, 1))},
    samples_of_patches=1,
    plain=1 << 13,
    conversions=3,
    lanes=1 << 10,
    means=("one mean",),
    classes=4,
    channels=(2,),
    networks=("ResNet-50", "ViT-B/16"),
    image=32,
    batches=(4,),
    rounds=1,
    repeats=1,
    turns=1,
    ahead=1000,
    compiled=("3x3x4",),
)


class Bench:
    """What the steps share: the device, its clock, the sizes, and the inputs of the case before."""

    def __init__(self, gpu: Gpu | Host, sizes: Sizes) -> None:
        self.gpu, self.sizes = gpu, sizes
        self.device = gpu.device
        self.clock = Clock(gpu, sizes.repeats, sizes.ahead)
        self._kept: tuple[Any, Any] = (None, None)

    def forget(self) -> None:
        """Lets go of what is kept, and of the memory behind it."""
        self._kept = (None, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key; what was kept for another is let go."""
        if self._kept[0] != key:
            self._kept = (None, None)
            self._kept = (key, make())
        return self._kept[1]

    def backends(self, op: str) -> list[str]:
        return [name for name in KERNELS if not backends.why_not(name, op, self.device)]


def close(ours: Any, theirs: Any, rtol: float, of_largest: float = 0.0) -> None:
    """Tensors, or tuples of them; the absolute tolerance is a share of the largest value."""
    if isinstance(ours, Tensor):
        ours, theirs = (ours,), (theirs,)
    for mine, exact in zip(ours, theirs, strict=True):
        largest = float(exact.double().abs().nan_to_num().max()) if exact.numel() else 0.0
        torch.testing.assert_close(mine, exact, rtol=rtol, atol=of_largest * largest, equal_nan=True)


# ---- smoke ----------------------------------------------------------------------------------------------------------


def smoke(bench: Bench) -> Iterator[Case]:
    """That all kernels run here; one check of every op on every backend that has it, and of a whole pass."""
    yield Case({"op": "backends"}, partial(_all_there, bench))
    for op in backends.OPS:
        for backend in bench.backends(op):
            yield Case({"op": op, "backend": backend}, partial(_checked, bench, op, backend))
    yield Case({"op": "collect_moments, score"}, partial(_checked_pass, bench))


def _all_there(bench: Bench) -> Row:
    """A backend that cannot run would be missing from every table without a word."""
    reasons = {name: backends.why_not(name, "pool", bench.device) for name in KERNELS}
    assert not any(reasons.values()), f"a backend cannot run: {reasons}"
    return {}


def _checked(bench: Bench, op: str, backend: str) -> Row:
    """Runs `op` on small inputs and compares with the reference on the same device."""
    start = time.perf_counter()
    arguments, options, rtol = inputs_of(op, bench)
    results = [getattr(ops, op)(*arguments, **options, backend=name) for name in (backend, "reference")]
    ours, exact = (r.tensors() if isinstance(r, (ClassMoments, VectorMoments)) else r for r in results)
    if op == "patch_moments":
        assert ours[0] == exact[0]
        ours, exact = ours[1:], exact[1:]
    close(ours, exact, rtol, rtol)
    return {"host, seconds": time.perf_counter() - start}


def inputs_of(op: str, bench: Bench) -> tuple[tuple[Any, ...], dict[str, Any], float]:
    """Arguments of an op, options, and the relative error that its rounding allows."""
    device, shape = bench.device, bench.sizes.smoke
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    x, labels = randn(*shape), torch.arange(shape[0], device=device) % 3
    if op == "pool":
        return (x.bfloat16(),), {"statistic": ("mean", "rms", "absmax")}, 2.0**-20
    if op == "class_moments":
        return (x, labels, 3), {}, 1e-10
    if op == "patch_moments":
        return (x, 3), {"padding": 1}, 1e-10
    if op.endswith("_bound"):
        mean1, mean2, factors = randn(40, 2), randn(40, 2), randn(2, 40, 2, 2)
        laws = (mean1, factors[0] @ factors[0].mT, mean2, factors[1] @ factors[1].mT)
        return laws, {}, 1e-9
    states = [random_moments(*bench.sizes.state, device, seed) for seed in range(2)]
    return tuple(states if op == "merge_moments" else states[:1]), {}, 1e-9


def random_moments(classes: int, channels: int, device: torch.device, seed: int = 0) -> ClassMoments:
    """A state as a layer would leave it after 50 samples per class."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        draw = torch.rand((classes, channels), generator=generator, device=device, dtype=torch.float64)
        return low + (high - low) * draw

    count, deviation = torch.full((classes,), 50, device=device), uniform(0.2, 0.6)
    skewness = uniform(0.5, 1.5)
    kurtosis = 3 + uniform(0.5, 3.0) + skewness**2  # any law has at least 1 + skewness^2
    sums = (50 * deviation**2, 50 * skewness * deviation**3, 50 * kurtosis * deviation**4)
    return ClassMoments(count, uniform(1.0, 2.0), *sums)


def _checked_pass(bench: Bench) -> Row:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 7))
    model = model.to(bench.device).double().eval()
    data = [(torch.randn(20, 3, 8, 8, device=bench.device).double(), torch.arange(20) % 7) for _ in range(2)]
    scores = {}
    for backend in ("auto", "reference"):
        moments = discedit.collect_moments(model, data, 7, backend=backend, progress=False)
        scores[backend] = discedit.score(moments)
    for layer in scores["reference"]:
        close(scores["auto"][layer], scores["reference"][layer], 1e-8, 1e-8)
    return {}


# ---- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> Iterator[Case]:
    """Plain reads, a copy, conversions to float64, and the clock itself."""
    size = 4 * bench.sizes.plain
    yield Case({"op": "torch.sum", "bytes": size}, partial(_sum, bench))
    yield Case({"op": "16-byte loads", "bytes": size}, partial(_loads, bench))
    yield Case({"op": "copy", "bytes": 2 * size}, partial(_copy, bench))
    yield Case({"op": "cycles"}, lambda: {"cycles/s": bench.clock.cycles_per_second()})
    yield Case({"op": "float32 to float64"}, partial(_conversions, bench))
    yield Case({"op": "launch"}, partial(_launch, bench))


def _plain(bench: Bench) -> Tensor:
    drawn: Tensor = bench.kept("plain", lambda: torch.randn(bench.sizes.plain, device=bench.device))
    return drawn


def _sum(bench: Bench) -> Row:
    return {"seconds": bench.clock([_plain(bench).sum])}


def _loads(bench: Bench) -> Row:
    from benchmarks.gpu.ceilings import READ_BLOCK, READ_BLOCKS, read

    x = _plain(bench).view(torch.int32)
    out = torch.empty(x.numel() // (READ_BLOCK * READ_BLOCKS), dtype=torch.int32, device=bench.device)
    read(x, out)
    exact = x.view(-1, READ_BLOCK * READ_BLOCKS)
    while exact.shape[1] > 1:
        exact = exact[:, ::2] ^ exact[:, 1::2]
    assert torch.equal(out, exact[:, 0]), "16-byte loads: the bits are wrong"
    return {"seconds": bench.clock([lambda: read(x, out)])}


def _copy(bench: Bench) -> Row:
    x = _plain(bench)
    target = torch.empty_like(x)
    return {"seconds": bench.clock([lambda: target.copy_(x)])}


def _conversions(bench: Bench) -> Row:
    from benchmarks.gpu.ceilings import convert

    turns = bench.sizes.conversions
    x = torch.arange(bench.sizes.lanes, device=bench.device).remainder(100).float()
    out = torch.empty_like(x, dtype=torch.float64)
    convert(x, out, turns)
    assert torch.equal(out, x.double() * turns + turns * (turns - 1) // 2), "conversions: the sums are wrong"
    seconds = bench.clock([lambda: convert(x, out, turns)])
    per_clock = x.numel() * turns / seconds / bench.clock.cycles_per_second() / bench.gpu.multiprocessors
    return {"seconds": seconds, "conversions per clock and multiprocessor": per_clock}


def _launch(bench: Bench) -> Row:
    x = torch.zeros(1, device=bench.device)
    return {"seconds": bench.clock([x.zero_]), "host, seconds": bench.clock.host(x.zero_)}


# ---- scoring --------------------------------------------------------------------------------------------------------


class InTurns:
    """A loader that runs batches through a twin of the model before it hands them out, and times both.

    Batches come in groups, within which nobody waits for the device. The first group is one batch: it also finds out
    what reads which layer, and what it takes stands by itself.

    Attributes:
        rows: of each group: seconds until the twin has been asked for everything, until it is done, and the same of
            whoever takes the batches; and how many batches these are.
    """

    def __init__(self, bench: Bench, twin: nn.Module, batches: list[tuple[Tensor, Tensor]], rounds: int) -> None:
        self.bench, self.twin, self.batches, self.rounds = bench, twin, batches, rounds
        self.rows: list[tuple[float, float, float, float, int]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        wait = self.bench.gpu.wait
        for group in (self.batches[:1], *[self.batches] * self.rounds):
            wait()
            start = time.perf_counter()
            with frozen_eval(self.twin):
                for inputs, _ in group:
                    call(self.twin, inputs)
            asked = time.perf_counter() - start
            wait()
            done = time.perf_counter() - start
            start = time.perf_counter()
            yield from group
            asked_ours = time.perf_counter() - start
            wait()
            self.rows.append((asked, done, asked_ours, time.perf_counter() - start, len(group)))

    def times(self) -> Row:
        """Seconds per batch, and ratios of ours to the twin's, medians over the groups."""
        first, *later = self.rows

        def per_batch(index: int) -> float:
            return statistics.median(row[index] / row[4] for row in later)

        return {
            "seconds": per_batch(1),
            "x bare": statistics.median(row[3] / row[1] for row in later),
            "host, seconds": per_batch(0),
            "host, seconds, ours": per_batch(2),
            "first batch, seconds": first[1],
            "first batch, seconds, ours": first[3],
        }


def network(bench: Bench, name: str) -> nn.Module:
    """In bfloat16 on the device; in a rehearsal a small one of the same kind."""

    def make() -> nn.Module:
        if bench.sizes is not TINY:
            model = build(name)
        else:
            torch.manual_seed(0)
            small = ResNet((1, 1), 8, 10) if name == "ResNet-50" else VisionTransformer(32, 16, 24, 2, 3)
            model = small.eval()
        model = model.to(bench.device, torch.bfloat16)
        return model.to(memory_format=torch.channels_last) if name == "ResNet-50" else model

    made: nn.Module = bench.kept(("network", name), make)
    return made


def images(bench: Bench, samples: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    shape = (samples, 3, bench.sizes.image, bench.sizes.image)
    labels = torch.arange(samples) % CLASSES
    return [(torch.randn(shape, device=bench.device).bfloat16(), labels) for _ in range(count)]


def scoring(bench: Bench) -> Iterator[Case]:
    """collect_moments over the bare pass of the same batches."""
    for name in bench.sizes.networks:
        for samples in bench.sizes.batches:
            facts = {"op": "scoring pass", "model": name, "dtype": "bfloat16", "batch": samples}
            yield Case(facts, partial(_scored, bench, name, samples))


def _scored(bench: Bench, name: str, samples: int) -> Row:
    model, data = network(bench, name), images(bench, samples)
    loader = InTurns(bench, copy.deepcopy(model), data, bench.sizes.rounds)
    moments = discedit.collect_moments(model, loader, CLASSES, progress=False)
    assert moments.samples == samples * (1 + len(data) * bench.sizes.rounds)
    ours, exact = (
        discedit.collect_moments(model, data[:1], CLASSES, backend=backend, progress=False)
        for backend in ("auto", "reference")
    )
    for layer in exact:
        # A network need not give the same last bits twice; that kernels are exact is seen in the other steps.
        close(ours[layer].mean, exact[layer].mean, 1e-3, 1e-3)
    return {"layers": len(exact), **loader.times()}


# ---- pairwise_min ---------------------------------------------------------------------------------------------------


def pairwise_min(bench: Bench) -> Iterator[Case]:
    """The least bound over all pairs of classes; on the CPU's cores as well, which search where these compare all."""
    classes = bench.sizes.classes
    for channels in bench.sizes.channels:
        for data in bench.sizes.means:
            for backend in (*bench.backends("pairwise_min"), "cpp"):
                for bound in ("fisher", "minimax"):
                    facts = {"op": "pairwise_min", "bound": bound, "backend": backend, "data": data}
                    run = partial(_pairs, bench, channels, data, backend, bound)
                    yield Case(facts | {"channels": channels, "classes": classes}, run)


def _pairs(bench: Bench, channels: int, data: str, backend: str, bound: str) -> Row:
    classes = bench.sizes.classes

    def draw() -> tuple[ClassMoments, ClassMoments]:
        state = random_moments(classes, channels, bench.device)
        if data == "one mean":
            state.mean.fill_(1.0)
        return state, state.to("cpu")

    state, on_cpu = bench.kept(("moments", channels, data), draw)
    where = on_cpu if backend == "cpp" else state

    def run() -> tuple[Tensor, Tensor]:
        return ops.pairwise_min(where, bound=bound, backend=backend)

    if backend != "cpp":
        close(run()[0].cpu(), ops.pairwise_min(on_cpu, bound=bound, backend="cpp")[0], 1e-8, 1e-10)
        taken = bench.clock([run], repeats=min(3, bench.sizes.repeats))
    else:
        few = ClassMoments(on_cpu.count[:40], *(t[:40, :3].contiguous() for t in on_cpu.tensors()[1:]))
        exact = reference.pairwise_min(few, Rule(bound), "quadratic")[0]
        close(ops.pairwise_min(few, bound=bound, backend="cpp")[0], exact, 1e-8, 1e-10)
        taken = bench.clock.host(run, repeats=min(3, bench.sizes.repeats))
    return {"seconds": taken, "pairs/s": channels * classes * (classes - 1) // 2 / taken}


# ---- class_moments --------------------------------------------------------------------------------------------------


def class_moments(bench: Bench) -> Iterator[Case]:
    """Maps of all sizes: bfloat16 before float32, channels side by side before rows, CUDA before Triton."""
    sizes = bench.sizes
    tokens = {"x".join(map(str, (sizes.tokens[2], sizes.tokens[1]))): sizes.tokens}
    by_layout = {"channels_last": sizes.maps, "tokens": tokens, "NCHW": sizes.maps}
    for dtype in DTYPES:
        for backend in bench.backends("class_moments"):
            for layout, maps in by_layout.items():
                for name, shape in maps.items():
                    for statistics_ in ("mean", "mean+rms+absmax"):
                        facts = _facts_of_map(name, shape, dtype, layout) | {"statistics": statistics_}
                        run = partial(_cell, bench, shape, dtype, layout, statistics_, backend)
                        yield Case(facts | {"backend": backend}, run)
        if dtype == "bfloat16":
            for layout, maps in by_layout.items():
                for name in [name for name in maps if name in sizes.compiled and layout != "NCHW"]:
                    facts = _facts_of_map(name, maps[name], dtype, layout) | {"statistics": "mean"}
                    run = partial(_compiled, bench, maps[name], dtype, layout)
                    yield Case(facts | {"way": "torch.compile"}, run)


def _facts_of_map(name: str, shape: tuple[int, ...], dtype: str, layout: str) -> Row:
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return {
        "op": "class_moments",
        "map": name,
        "shape": list(shape),
        "dtype": dtype,
        "layout": layout,
        "bytes": size,
    }


def _maps(bench: Bench, shape: tuple[int, ...], dtype: str, layout: str) -> list[tuple[Tensor, str]]:
    """Those that take turns."""

    def draw() -> list[tuple[Tensor, str]]:
        return [feature_map(shape, DTYPES[dtype], layout, seed, bench.device) for seed in range(bench.sizes.turns)]

    drawn: list[tuple[Tensor, str]] = bench.kept(("maps", shape, dtype, layout), draw)
    return drawn


def _cell(bench: Bench, shape: tuple[int, ...], dtype: str, layout: str, statistics_: str, backend: str) -> Row:
    inputs, names = _maps(bench, shape, dtype, layout), STATISTICS[statistics_]
    x, named = inputs[0]
    labels = torch.arange(len(x), device=x.device) % CLASSES
    options: dict[str, Any] = {"layout": named}
    options |= {"statistic": names[0]} if len(names) == 1 else {"statistic": names, "witness": "vector"}
    state = ops.class_moments(x, labels, CLASSES, backend=backend, **options)
    exact = ops.class_moments(x, labels, CLASSES, backend="reference", **options)
    close(state.tensors(), exact.tensors(), 1e-6, 1e-9)

    def ours(x: Tensor) -> object:
        return ops.class_moments(x, labels, CLASSES, out=state, backend=backend, **options)

    taken = bench.clock([partial(ours, x) for x, _ in inputs])
    row = {"seconds": taken, "host, seconds": bench.clock.host(lambda: ours(x))}
    idioms = {}
    for way in pooling(x, named, names):
        runs = [lambda x=x, way=way: sums_per_class(pooling(x, named, names)[way](), labels) for x, _ in inputs]
        idioms[way] = bench.clock(runs, repeats=min(10, bench.sizes.repeats))
    best = min(idioms, key=lambda way: idioms[way])
    return row | {"torch": best, "torch, seconds": idioms[best], "x torch": idioms[best] / taken}


def _compiled(bench: Bench, shape: tuple[int, ...], dtype: str, layout: str) -> Row:
    """The idiom in float32 under torch.compile; an error where it was not compiled into one graph."""
    inputs = _maps(bench, shape, dtype, layout)
    x, named = inputs[0]
    labels = torch.arange(len(x), device=x.device) % CLASSES
    graphs = []

    def compiler(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, examples)

    def idiom(x: Tensor) -> list[Tensor]:
        return sums_per_class(pooling(x, named, ("mean",))["float(), reduce"](), labels)

    torch.compiler.reset()
    step = torch.compile(idiom, backend=compiler, fullgraph=True, dynamic=False)
    close(step(x), idiom(x), 1e-4, 1e-5)
    taken = bench.clock([partial(step, x) for x, _ in inputs])
    if len(graphs) != 1:
        raise AssertionError(
            f"torch.compile: the idiom must be compiled once, into one graph, it was {len(graphs)} times."
        )
    return {"seconds": taken}


# ---- small maps, patches, second moments ----------------------------------------------------------------------------


def patches(bench: Bench) -> Iterator[Case]:
    """One small layer; moments of patches; the pass for second moments."""
    shape = bench.sizes.small
    for backend in bench.backends("class_moments"):
        facts = {"op": "small map", "shape": list(shape), "dtype": "bfloat16", "backend": backend}
        yield Case(facts, partial(_small, bench, backend))
    for (channels, height, width), (kernel, stride, padding) in bench.sizes.patches.values():
        shape = (bench.sizes.samples_of_patches, channels, height, width)
        for layout in ("channels_last", "NCHW"):
            for backend in bench.backends("patch_moments"):
                facts = {"op": "patch_moments", "shape": list(shape), "window": f"{kernel}x{kernel}"}
                facts |= {"dtype": "bfloat16", "layout": layout, "backend": backend}
                facts |= {"bytes": 2 * torch.Size(shape).numel()}
                yield Case(facts, partial(_patches, bench, shape, kernel, stride, padding, layout, backend))
    for kind in ("singleton", "full"):
        samples = bench.sizes.batches[-1]
        facts = {"op": f"second moments, {kind}", "model": "ResNet-50", "dtype": "bfloat16", "batch": samples}
        yield Case(facts, partial(_second_moments, bench, kind, samples))


def _small(bench: Bench, backend: str) -> Row:
    shape = bench.sizes.small
    inputs = [torch.randn(shape, device=bench.device).bfloat16() for _ in range(bench.sizes.turns)]
    labels = torch.arange(shape[0], device=bench.device) % CLASSES
    state = ops.class_moments(inputs[0], labels, CLASSES, backend=backend)
    exact = ops.class_moments(inputs[0], labels, CLASSES, backend="reference")
    close(state.tensors(), exact.tensors(), 1e-6, 1e-9)
    means = [partial(torch.mean, x, (2, 3)) for x in inputs]
    runs = [partial(ops.class_moments, x, labels, CLASSES, out=state, backend=backend) for x in inputs]
    taken, on_host = bench.clock(runs), bench.clock.host(runs[0])
    row = {"seconds": taken, "x torch.mean": taken / bench.clock(means)}
    return row | {"host, seconds": on_host, "host, x torch.mean": on_host / bench.clock.host(means[0])}


def _patches(
    bench: Bench, shape: tuple[int, ...], kernel: int, stride: int, padding: int, layout: str, backend: str
) -> Row:
    def draw() -> list[Tensor]:
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        drawn = [torch.randn(shape, device=bench.device).relu().bfloat16() for _ in range(bench.sizes.turns)]
        return [x.contiguous(memory_format=memory) for x in drawn]

    inputs: list[Tensor] = bench.kept(("patches", shape, layout), draw)
    options = {"stride": stride, "padding": padding}
    ours, exact = (ops.patch_moments(inputs[0], kernel, backend=name, **options)[1:] for name in (backend, "reference"))
    close(ours, exact, 1e-7, 1e-7)
    runs = [partial(ops.patch_moments, x, kernel, backend=backend, **options) for x in inputs]
    taken = bench.clock(runs)
    ways = patch_idioms(inputs[0], kernel, stride, padding)
    idioms = {way: bench.clock([run], repeats=min(5, bench.sizes.repeats)) for way, run in ways.items()}
    best = min(idioms, key=lambda way: idioms[way])
    return {"seconds": taken, "torch": best, "torch, seconds": idioms[best], "x torch": idioms[best] / taken}


def _second_moments(bench: Bench, kind: str, samples: int) -> Row:
    model = network(bench, "ResNet-50")
    loader = InTurns(bench, copy.deepcopy(model), images(bench, samples, 2), min(2, bench.sizes.rounds))
    moments = collect_second_moments(model, _inputs_of(loader), kind=kind, progress=False)
    assert moments.samples == samples * (1 + 2 * loader.rounds)
    assert all(bool(tensor.isfinite().all()) for state in moments.values() for tensor in state.named().values())
    return {"layers": len(moments), **loader.times()}


def _inputs_of(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for inputs, _ in loader:
        yield inputs


STEPS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "smoke": smoke,
    "ceilings": ceilings,
    "scoring": scoring,
    "pairwise_min": pairwise_min,
    "class_moments": class_moments,
    "patches": patches,
}
