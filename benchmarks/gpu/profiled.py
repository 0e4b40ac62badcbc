"""The kernels that Nsight Compute looks at, each launched twice: nothing else, because every launch is replayed."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.gpu import figures, rehearsal
from benchmarks.gpu.device import Gpu, Host
from benchmarks.idioms import CLASSES, STATISTICS, feature_map
from discedit import ops


def main() -> None:
    rehearsal.install()
    rehearsed = rehearsal.VARIABLE in os.environ
    device = (Host() if rehearsed else Gpu()).device
    sizes = figures.TINY if rehearsed else figures.FULL
    for layout in ("channels_last", "NCHW"):
        x, named = feature_map(next(iter(sizes.maps.values())), torch.bfloat16, layout, device=device)
        labels = torch.arange(len(x), device=device) % CLASSES
        for name in ("mean", "mean+rms+absmax"):
            names = STATISTICS[name]
            options: dict[str, Any] = {"layout": named, "backend": "cuda"}
            options |= {"statistic": names[0]} if len(names) == 1 else {"statistic": names, "witness": "vector"}
            for _ in range(2):
                ops.class_moments(x, labels, CLASSES, **options)
    state = figures.random_moments(sizes.classes, 64, device)
    for _ in range(2):
        ops.pairwise_min(state, bound="minimax", backend="cuda")


if __name__ == "__main__":
    main()
