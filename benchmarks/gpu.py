"""The gate for a machine with a GPU: builds, tests, measures, and keeps what came out.

    python -m benchmarks.gpu

Needs a CUDA build of torch, Triton, pytest, transformers and what discedit itself needs. In order: an editable install
(`--no-build` leaves it out), the tests marked `gpu`, compute-sanitizer over those of the CUDA kernels where both are
there, then the figures. Everything goes to benchmarks/results/<device>-<date>.json; a short table ends the run. The
exit status is 0 only where the tests passed; figures of a run whose tests failed are not written.

Times are medians of CUDA events, of the device alone: it is kept busy until the host has asked for everything. Before
each, a buffer larger than the L2 cache is overwritten, and inputs are random and take turns. Rates are in bytes that
must move, each element of the map once in its own type, and are compared with what a plain read (`torch.sum` of 2 GB of
float32) reaches in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import discedit
from benchmarks._common import machine, seconds
from benchmarks.bench_class_moments import CLASSES, feature_map, rivals, torch_state
from benchmarks.bench_patch_moments import MAPS as PATCHES
from benchmarks.bench_patch_moments import rivals as patch_rivals
from discedit import _backends, ops, reference
from discedit._batches import call, undisturbed
from discedit._checks import Rule
from discedit._state import ClassMoments
from discedit.fidelity import collect_second_moments

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results")
STATISTICS: dict[str, tuple[str, ...]] = {"mean": ("mean",), "mean+rms+absmax": ("mean", "rms", "absmax")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("NCHW", "channels_last", "tokens")
MAPS = {
    "56x56x256": (256, 256, 56, 56),
    "28x28x512": (256, 512, 28, 28),
    "14x14x1024": (256, 1024, 14, 14),
    "7x7x2048": (256, 2048, 7, 7),
    "197x768": (256, 768, 197),
}
KERNELS = ("cuda", "triton")
AHEAD = 40_000_000  # cycles that the host gets ahead of the device: some 20 ms
Row = dict[str, Any]


class Clock:
    """Median seconds of a run on a device."""

    def __init__(self, device: str, repeats: int = 30, flush: int = 1 << 28) -> None:
        self.device, self.repeats = torch.device(device), repeats
        self._flush = torch.empty(flush, dtype=torch.int8, device=device)

    def __call__(self, runs: list[Callable[[], object]]) -> float:
        """`runs` take turns: the same work on different inputs."""
        for run in runs:
            run()
        if self.device.type != "cuda":
            return statistics.median(seconds(runs[i % len(runs)]) for i in range(self.repeats))
        events = []
        torch.cuda._sleep(AHEAD)
        for i in range(self.repeats):
            self._flush.fill_(i % 100)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runs[i % len(runs)]()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def host(self, run: Callable[[], object], calls: int = 50) -> float:
        """Median seconds until `run` has returned, whatever the device has done by then."""
        run()
        _wait(self.device)
        times = [seconds(run) for _ in range(calls)]
        _wait(self.device)
        return statistics.median(times)


def backends_of(op: str, device: torch.device) -> list[str]:
    return [name for name in KERNELS if not _backends.why_not(name, op, device)]


def ceilings(clock: Clock, size: int = 1 << 29) -> Row:
    """Bytes per second of a plain read, and of a copy (read and written)."""
    source = torch.randn(size, device=clock.device)
    target = torch.empty_like(source)
    size *= source.element_size()
    return {
        "read, bytes/s": size / clock([source.sum]),
        "copy, bytes/s": 2 * size / clock([lambda: target.copy_(source)]),
    }


def class_moments(clock: Clock, maps: dict[str, tuple[int, ...]], read: float, *, compiled: bool) -> Iterator[Row]:
    """Share of the read bandwidth, and times over torch's ways, for each map, type and layout."""
    for shape in maps.values():
        for dtype in DTYPES.values():
            for layout in LAYOUTS:
                inputs = [
                    (x.to(clock.device), named)
                    for x, named in (feature_map(shape, dtype, layout, seed) for seed in range(3))
                ]
                for name, names in STATISTICS.items():
                    yield from _cell(clock, inputs, name, names, read, compiled)
                    print(".", end="", flush=True)


def _cell(
    clock: Clock, inputs: list[tuple[Tensor, str]], name: str, names: tuple[str, ...], read: float, compiled: bool
) -> Iterator[Row]:
    x, layout = inputs[0]
    labels = torch.arange(len(x), device=x.device) % CLASSES
    options: dict[str, Any] = {"layout": layout}
    options |= {"statistic": names[0]} if len(names) == 1 else {"statistic": names, "witness": "vector"}
    size = x.numel() * x.element_size()
    case = {"op": "class_moments", "shape": list(x.shape), "dtype": str(x.dtype), "layout": layout, "statistics": name}
    case |= {"strides": list(x.stride()), "bytes": size}
    torch_times = {}
    for way in rivals(x, layout, names):
        runs = [lambda x=x, way=way: torch_state(rivals(x, layout, names)[way](), labels) for x, _ in inputs]
        torch_times[way] = clock(runs)
        if compiled:
            step = torch.compile(lambda x, way=way: torch_state(rivals(x, layout, names)[way](), labels))
            torch_times[f"{way}, compiled"] = clock([lambda x=x, step=step: step(x) for x, _ in inputs])
    best = min(torch_times, key=lambda way: torch_times[way])
    exact = ops.class_moments(x, labels, CLASSES, backend="reference", **options)
    for backend in backends_of("class_moments", x.device):
        state = ops.class_moments(x, labels, CLASSES, backend=backend, **options)
        for ours, theirs in zip(state.tensors(), exact.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        taken = clock(
            [
                lambda x=x, b=backend, s=state: ops.class_moments(x, labels, CLASSES, out=s, backend=b, **options)
                for x, _ in inputs
            ]
        )
        yield case | {
            "backend": backend,
            "seconds": taken,
            "of read": size / taken / read,
            "torch": best,
            "x torch": torch_times[best] / taken,
        }


def small_maps(clock: Clock, shape: tuple[int, ...] = (32, 2048, 7, 7)) -> Iterator[Row]:
    """One small layer, against one launch of torch.mean over its axes."""
    inputs = [torch.randn(shape, device=clock.device).bfloat16() for _ in range(3)]
    labels = torch.arange(shape[0], device=clock.device) % CLASSES
    mean = clock([lambda x=x: x.mean((2, 3)) for x in inputs])
    mean_on_host = clock.host(lambda: inputs[0].mean((2, 3)))
    for backend in backends_of("class_moments", clock.device):
        state = ClassMoments.empty(CLASSES, shape[1], clock.device)
        runs = [lambda x=x, b=backend, s=state: ops.class_moments(x, labels, CLASSES, out=s, backend=b) for x in inputs]
        taken, on_host = clock(runs), clock.host(runs[0])
        yield {
            "op": "small map",
            "shape": list(shape),
            "backend": backend,
            "seconds": taken,
            "x mean": taken / mean,
            "host, seconds": on_host,
            "x mean, host": on_host / mean_on_host,
        }


def pairs(clock: Clock, classes: int = 1000, channels: tuple[int, ...] = (2048, 26560)) -> Iterator[Row]:
    """All pairs of classes of `channels` channels, and the rate in pairs."""
    for width in channels:
        state = random_moments(classes, width, clock.device)
        number = width * classes * (classes - 1) // 2
        for backend in backends_of("pairwise_min", clock.device):
            for bound in ("fisher", "minimax"):
                sample = ClassMoments(state.count, *(t[:, :4].contiguous() for t in state.tensors()[1:]))
                ours = ops.pairwise_min(sample, bound=bound, backend=backend)[0]
                theirs = reference.pairwise_min(sample, Rule(bound), "quadratic")[0]
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
                taken = clock([lambda b=backend, n=bound: ops.pairwise_min(state, bound=n, backend=b)])  # noqa: B023
                yield {
                    "op": "pairwise_min",
                    "bound": bound,
                    "backend": backend,
                    "classes": classes,
                    "channels": width,
                    "seconds": taken,
                    "pairs/s": number / taken,
                }


def patches(clock: Clock, maps: Iterable[str], read: float, samples: int = 32) -> Iterator[Row]:
    """Share of the read bandwidth, and times over torch's ways, of each channel's moments of patches."""
    for name in maps:
        shape, (kernel, stride, padding) = PATCHES[name]
        for memory_format in (torch.contiguous_format, torch.channels_last):
            inputs = [
                torch.randn(samples, *shape, device=clock.device)
                .relu()
                .bfloat16()
                .contiguous(memory_format=memory_format)
                for _ in range(3)
            ]
            size = inputs[0].numel() * inputs[0].element_size()
            options: dict[str, Any] = {"stride": stride, "padding": padding}
            ways = patch_rivals(inputs[0], kernel, stride, padding)
            times = {
                way: clock([lambda x=x, w=way: patch_rivals(x, kernel, stride, padding)[w]() for x in inputs])  # noqa: B023
                for way in ways
            }
            best = min(times, key=lambda way: times[way])
            exact = ops.patch_moments(inputs[0], kernel, backend="reference", **options)
            for backend in backends_of("patch_moments", clock.device):
                ours = ops.patch_moments(inputs[0], kernel, backend=backend, **options)
                for mine, theirs in zip(ours[1:], exact[1:], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()))
                taken = clock(
                    [lambda x=x, b=backend: ops.patch_moments(x, kernel, backend=b, **options) for x in inputs]  # noqa: B023
                )
                yield {
                    "op": "patch_moments",
                    "shape": list(inputs[0].shape),
                    "kernel": kernel,
                    "dtype": str(inputs[0].dtype),
                    "strides": list(inputs[0].stride()),
                    "backend": backend,
                    "seconds": taken,
                    "of read": size / taken / read,
                    "torch": best,
                    "x torch": times[best] / taken,
                }
                print(".", end="", flush=True)


def random_moments(classes: int, channels: int, device: torch.device) -> ClassMoments:
    generator = torch.Generator(device).manual_seed(0)
    shape = (classes, channels)
    draw = lambda: torch.rand(shape, generator=generator, device=device, dtype=torch.float64)  # noqa: E731
    n, var = 50, draw() + 0.5
    count = torch.full((classes,), n, device=device)
    return ClassMoments(count, 4 * draw(), n * var, n * (draw() - 0.5), n * var**2 * (2.5 + draw()))


def scoring(clock: Clock, samples: int = 256, rounds: int = 12) -> Iterator[Row]:
    """collect_moments over the bare pass of the same batches on the device, wall time, passes in turns."""
    from benchmarks.bench_scoring_pass import build

    for name in ("ResNet-50", "ViT-B/16"):
        model = build(name).to(clock.device, torch.bfloat16)
        if name == "ResNet-50":
            model = model.to(memory_format=torch.channels_last)
        data = [
            (torch.randn(samples, 3, 224, 224, device=clock.device).bfloat16(), torch.arange(samples) % CLASSES)
            for _ in range(3)
        ]
        passes = 4 * data

        def bare(model: Any = model, passes: Any = passes) -> None:
            with undisturbed(model):
                for inputs, _ in passes:
                    call(model, inputs)
            _wait(clock.device)

        def ours(model: Any = model, passes: Any = passes) -> None:
            discedit.collect_moments(model, passes, CLASSES, progress=False)
            _wait(clock.device)

        facts = {"op": "scoring pass", "model": name, "dtype": "torch.bfloat16", "batch": samples}
        yield facts | {"batches": len(passes)} | _over(bare, ours, rounds)


def second_moments(clock: Clock, samples: int = 128, rounds: int = 10) -> Iterator[Row]:
    """collect_second_moments over the bare pass of the same batches on the device, wall time, passes in turns."""
    from benchmarks.bench_scoring_pass import build

    model = build("ResNet-50").to(clock.device, torch.bfloat16).to(memory_format=torch.channels_last)
    data = [torch.randn(samples, 3, 224, 224, device=clock.device).bfloat16() for _ in range(3)] * 2

    def bare() -> None:
        with undisturbed(model):
            for inputs in data:
                call(model, inputs)
        _wait(clock.device)

    for kind in ("singleton", "full"):

        def ours(kind: str = kind) -> None:
            collect_second_moments(model, data, kind=kind, progress=False)
            _wait(clock.device)

        facts = {"op": f"second moments, {kind}", "model": "ResNet-50", "dtype": "torch.bfloat16", "batch": samples}
        yield facts | {"batches": len(data)} | _over(bare, ours, rounds)


def _over(bare: Callable[[], None], ours: Callable[[], None], rounds: int) -> Row:
    """Wall time of both, in turns."""
    bare()
    ours()
    ratios, base = [], []
    for _ in range(rounds):
        base.append(seconds(bare))
        ratios.append(seconds(ours) / base[-1])
    return {"seconds": statistics.median(base), "x bare": statistics.median(ratios)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(*command: str) -> tuple[int, str]:
    """Exit status and the end of what was printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr)[-4000:]


def sanitized() -> Row:
    """compute-sanitizer over the tests of the CUDA kernels."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    if not backends_of("class_moments", torch.device("cuda")).count("cuda"):
        return {"ran": False, "why": "discedit._cuda is not built"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    status, text = run(*command, "-k", "cuda and small", "tests/test_gpu.py")
    return {"ran": True, "passed": status == 0, "output": text[-600:]}


def device_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def facts() -> Row:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = run(*query)[1].split("\n")[0] if shutil.which("nvidia-smi") else "unknown"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "L2, bytes": properties.L2_cache_size,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "code": machine(),
        "date": datetime.date.today().isoformat(),
    }


def table(figures: list[Row]) -> str:
    """One line per figure."""
    lines = []
    for row in figures:
        what = " ".join(str(row[key]) for key in ("op", "model", "bound", "backend") if key in row)
        where = " ".join(
            str(row[key]) for key in ("shape", "kernel", "dtype", "layout", "statistics", "channels") if key in row
        )
        shown = [f"{row['seconds'] * 1e3:9.3f} ms"]
        shown += [
            f"{key} {row[key]:.3g}"
            for key in ("of read", "x torch", "x mean", "x mean, host", "pairs/s", "x bare")
            if key in row
        ]
        lines.append(f"{what:34} {where:70} {'  '.join(shown)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="measure what is installed")
    parser.add_argument("--quick", action="store_true", help="fewer maps, no torch.compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device here; nothing was measured.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    if not arguments.no_build:
        status, text = run(
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", ".")
        )
        if status:
            print(text)
            return 1
        # What was just built is not what this process has imported.
        again = [sys.executable, "-m", "benchmarks.gpu", "--no-build", *(["--quick"] if arguments.quick else [])]
        return subprocess.run(again, cwd=ROOT, check=False).returncode
    status, text = run(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests")
    print(text)
    if status:
        print("benchmarks.gpu: the tests marked gpu failed; no figure is written.", file=sys.stderr)
        return 1
    report: Row = {**facts(), "tests": text.strip().splitlines()[-1], "sanitizer": sanitized()}
    clock = Clock("cuda")
    report["ceilings"] = ceilings(clock)
    read = report["ceilings"]["read, bytes/s"]
    maps = dict(list(MAPS.items())[::2]) if arguments.quick else MAPS
    figures = [
        *class_moments(clock, maps, read, compiled=not arguments.quick),
        *small_maps(clock),
        *pairs(Clock("cuda", repeats=5)),
        *patches(clock, list(PATCHES)[:: 2 if arguments.quick else 1], read),
        *scoring(clock),
        *second_moments(clock),
    ]
    report |= {"figures": figures, "minutes": (time.perf_counter() - start) / 60}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device_name()}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{report['device']}: read {read / 1e12:.2f} TB/s\n{table(figures)}\nwritten: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
