"""What the gate does, most valuable first, and how many seconds each step may take of six minutes.

Imports nothing: the process that watches the others must not depend on what they depend on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One part of the gate.

    Attributes:
        seconds: budget where the whole run has `MINUTES`; it is scaled with the run's minutes.
        estimate: what the seconds are made of.
    """

    name: str
    seconds: float
    estimate: str


MINUTES = 6.0
# Where figures are measured: before the first of these steps a process starts, which holds them all.
FIGURES = (
    Step("smoke", 20, "8 s to import and to start CUDA, 12 s to compile Triton's kernels of 19 checks"),
    Step("ceilings", 10, "3 s to compile two kernels, 5 x 0.1 s, 2 s to draw 2 GB"),
    Step(
        "scoring", 30, "each network 4 s for its first batches, 5 rounds of 8 passes of 45 to 75 ms, at two batch sizes"
    ),
    Step("pairwise_min", 30, "12 cells of up to 1 s, 5 runs each, 4 s to compile"),
    Step("class_moments", 60, "72 cells of 0.3 s, 24 Triton kernels of 1 s, two torch.compile of 8 s"),
    Step("patches", 40, "small maps 3 s, patch_moments 24 cells of 0.5 s and 8 s to compile, passes 2 x 6 s"),
)
PROGRAMS = (
    Step("tests", 90, "330 tests of 0.3 s and 60 Triton kernels of 1 s in 6 processes, each 10 s to start"),
    Step("profile", 30, "8 s to start under ncu, 5 kernels replayed some 20 times"),
    Step("sanitizer", 30, "10 s to start, 12 tests at ten times their time"),
)
INSTALL = Step("install", 20, "8 s to install a wheel, 6 s to import it; a build takes a minute more, on top of all")
STEPS = (INSTALL, *FIGURES, *PROGRAMS)
