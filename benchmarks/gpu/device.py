"""Time on a device: what a GPU offers for it, and the same for the CPU, on which the gate is rehearsed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Event(Protocol):
    """A moment in the device's own time."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to `end`."""


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.multiprocessors: int = properties.multi_processor_count
        self.cache_bytes: int = properties.L2_cache_size

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def sleep(self, cycles: int) -> None:
        """Keeps the device busy for so many cycles of a multiprocessor."""
        torch.cuda._sleep(cycles)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


class HostEvent:
    """A moment in the host's time."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class Host:
    """The CPU in place of a GPU."""

    device = torch.device("cpu")
    multiprocessors = 1
    cache_bytes = 1 << 20

    def event(self) -> HostEvent:
        return HostEvent()

    def sleep(self, cycles: int) -> None:
        time.sleep(cycles / 1e9)

    def wait(self) -> None:
        pass


class Clock:
    """Medians of the device's and of the host's time, apart.

    Before each run a buffer of four times the L2 cache is read: written lines would go back to memory while the next
    run is timed. The device is kept busy until the host has asked for everything, so that it never waits for the host.

    Args:
        repeats: timed runs.
        ahead: cycles that the host gets ahead of the device; the default is some 20 ms.
    """

    def __init__(self, gpu: Gpu | Host, repeats: int = 30, ahead: int = 40_000_000) -> None:
        self.gpu, self.repeats, self.ahead = gpu, repeats, ahead
        self._flush = torch.zeros(gpu.cache_bytes, dtype=torch.float32, device=gpu.device)  # 4 bytes each

    def __call__(self, runs: Sequence[Callable[[], object]], repeats: int | None = None) -> float:
        """Median seconds of the device; `runs` take turns: the same work on different inputs."""
        for run in runs:
            run()
        events = []
        self.gpu.wait()
        self.gpu.sleep(self.ahead)
        for i in range(repeats or self.repeats):
            self._flush.sum()
            start, end = self.gpu.event(), self.gpu.event()
            start.record()
            runs[i % len(runs)]()
            end.record()
            events.append((start, end))
        self.gpu.wait()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def host(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median seconds until `run` has returned, whatever the device has done by then."""
        run()
        self.gpu.wait()
        times = []
        for _ in range(repeats or self.repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        self.gpu.wait()
        return statistics.median(times)

    def cycles_per_second(self) -> float:
        """Of a multiprocessor, under load, by its own counter."""
        start, end = self.gpu.event(), self.gpu.event()
        self.gpu.sleep(self.ahead)
        start.record()
        self.gpu.sleep(self.ahead)
        end.record()
        self.gpu.wait()
        return self.ahead / (start.elapsed_time(end) / 1e3)
