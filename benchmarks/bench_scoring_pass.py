"""What scoring costs beside running the model: time of collect_moments over the bare forward pass, and peak memory.

python -m pytest benchmarks/bench_scoring_pass.py --benchmark-only -s
"""

from __future__ import annotations

import copy
import statistics as stats
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discedit
from benchmarks._common import Table, in_a_fresh_process, seconds
from benchmarks.networks import build
from discedit.model.forward import call, frozen_eval

TIME = Table(
    "scoring_pass",
    "collect_moments over the bare forward pass",
    "Time that `collect_moments` takes for a batch over that of the bare model (eval mode, no gradients) for the same "
    "batch just before; random weights, 10 classes. Median and quartile spread over all batches but the first of each "
    "pass, which also finds out what reads which layer, and reads all of it: its ratio stands by itself. Read: share "
    "of the bare pass that a plain read of all maps that are pooled would take.",
    ("model", "input", "type", "batches", "bare, s per batch", "ratio", "spread", "first batch", "read"),
)
MEMORY = Table(
    "scoring_memory",
    "Peak memory of scoring",
    "ResNet-50, 1,000 classes, all seen. Peak resident memory of a process that collects moments, beyond that of "
    "one that "
    "runs the same batches through the bare model; then what `score` adds to it at most, its result included.",
    ("step", "state, MB", "result, MB", "extra, MB", "of state"),
)


CASES = {"ResNet-50": (224, 8, 16), "ViT-B/16": (224, 8, 8), "ResNet56": (32, 128, 24)}
PASSES = 3


def batches(size: int, samples: int, count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(samples, 3, size, size, generator=generator).to(dtype), torch.arange(samples) % 10)
        for _ in range(count)
    ]


def bare(model: nn.Module, data: Iterable[Any]) -> None:
    with frozen_eval(model):
        for inputs, _ in data:
            call(model, inputs)


def bytes_pooled(model: nn.Module, data: list[tuple[Tensor, Tensor]], layers: Iterable[str]) -> int:
    """Bytes of the maps that the pass reads."""
    total = 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * output.element_size()

    handles = [model.get_submodule(layer).register_forward_hook(count) for layer in layers]
    bare(model, data)
    for handle in handles:
        handle.remove()
    return total


class InTurns:
    """A loader that runs each batch through a twin of the model before it hands it out, and times both."""

    def __init__(self, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
        self.twin, self.data = copy.deepcopy(model), data
        self.pairs: list[list[tuple[float, float]]] = []  # of each pass: seconds of the bare batch, and of ours

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.pairs.append([])
        for batch in self.data:
            theirs = seconds(lambda batch=batch: bare(self.twin, [batch]))
            start = time.perf_counter()
            yield batch
            self.pairs[-1].append((theirs, time.perf_counter() - start))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_time(benchmark: Any, table: Callable[[Table], Table], read: Any, name: str, dtype: str) -> None:
    size, samples, count = CASES[name]
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = build(name).to(kind)
    data = batches(size, samples, count, kind)
    moments = discedit.collect_moments(model, data[:2], 10)
    assert moments.samples == samples * 2
    check(model, data[:2], moments)
    loader = InTurns(model, data)

    benchmark.pedantic(lambda: discedit.collect_moments(model, loader, 10), rounds=PASSES, warmup_rounds=0)

    later = [pair for times in loader.pairs for pair in times[1:]]
    assert len(later) == PASSES * (count - 1)
    quartiles = stats.quantiles([ours / theirs for theirs, ours in later], n=4)
    first = stats.median(ours / theirs for (theirs, ours), *_ in loader.pairs)
    alone = stats.median(theirs for theirs, _ in later)
    places = [place_of(model, moments, layer) for layer in moments]
    table(TIME).add(
        name,
        f"{size} x {size}",
        dtype,
        f"{PASSES} x {count} of {samples}",
        f"{alone:.2f}",
        f"{quartiles[1]:.3f}",
        f"{quartiles[2] - quartiles[0]:.3f}",
        f"{first:.2f}",
        f"{bytes_pooled(model, data[:1], places) / read.rate() / alone:.1%}",
    )


def place_of(model: nn.Module, moments: discedit.Moments, layer: str) -> str:
    """Behind its batch norm, if it has one. What the next layer gets, and what is read, has the same size."""
    norm = moments.norms.get(layer)
    return norm if norm and isinstance(model.get_submodule(norm), nn.BatchNorm2d) else layer


def check(model: nn.Module, data: list[tuple[Tensor, Tensor]], moments: discedit.Moments) -> None:
    """The last layer's means against torch in float64, from the maps of a bare pass."""
    layer = list(moments)[-1]
    maps: list[Tensor] = []
    module = model.get_submodule(place_of(model, moments, layer))
    axis = -1 if isinstance(module, nn.Linear) else 1
    handle = module.register_forward_hook(lambda _, __, output: maps.append(output.double()))
    bare(model, data)
    handle.remove()
    pooled = torch.cat([m.movedim(axis, 1).flatten(2).mean(2) for m in maps])
    labels = torch.cat([classes for _, classes in data])
    for k in range(10):
        exact = pooled[labels == k].mean(0) if bool((labels == k).any()) else torch.zeros(pooled.shape[1]).double()
        error = 1e-6 if data[0][0].element_size() == 2 else 1e-9  # 16-bit elements are added in fours in float32
        torch.testing.assert_close(moments[layer].mean[k], exact, rtol=error, atol=error)


PEAK = """
    import torch
    import discedit
    from benchmarks._common import peak_of, resident
    from benchmarks.bench_scoring_pass import bare
    from benchmarks.networks import build
    model = build("ResNet-50")
    data = [(torch.randn(50, 3, 64, 64), torch.arange(50 * i, 50 * i + 50)) for i in range(20)]
    bare(model, data[:2])
    if {collect}:
        peak, moments = peak_of(lambda: discedit.collect_moments(model, data, 1000))
        state = sum(t.numel() * t.element_size() for s in moments.values() for t in s.tensors())
        start = resident()
        after, scores = peak_of(lambda: discedit.score(moments))
        result = sum(t.numel() * t.element_size() for k in scores for t in (scores[k], scores.direction[k]))
        print(peak, state, after - start, result)
    else:
        print(peak_of(lambda: bare(model, data))[0])
"""


def test_memory(benchmark: Any, table: Callable[[Table], Table]) -> None:
    (without,) = benchmark.pedantic(lambda: in_a_fresh_process(PEAK.format(collect=False)), rounds=1)
    peak, state, scoring, result = in_a_fresh_process(PEAK.format(collect=True))
    rows = table(MEMORY)
    rows.add(
        "collect_moments", f"{state / 1e6:.0f}", "", f"{(peak - without) / 1e6:.0f}", f"{(peak - without) / state:.2f}"
    )
    rows.add("score", f"{state / 1e6:.0f}", f"{result / 1e6:.0f}", f"{scoring / 1e6:.0f}", f"{scoring / state:.2f}")
