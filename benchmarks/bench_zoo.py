"""Sixty networks of torchvision, timm, transformers and our own: what the library makes of each, a row per network.

    python -m benchmarks.bench_zoo --write             # half an hour of one core
    python -m benchmarks.bench_zoo --only NAME ...     # these rows anew
    python -m benchmarks.bench_zoo --list              # the names

Weights are random (benchmarks/zoo_networks.py), so nothing is downloaded and no accuracy is measured. Each network runs
in a process of its own (benchmarks/zoo_measure.py); one that hangs, dies or raises costs what it did not get to. What
is measured is kept in benchmarks/zoo.json, and benchmarks/zoo.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import Log
from benchmarks.zoo_networks import NETWORKS

HERE = Path(__file__).parent
RESULTS = HERE / "zoo.json"
MARK = "zoo: "
BAND = (25, 35)  # percent of the parameters, about the share of the components that goes
Row = dict[str, Any]


def run_network(name: str, seconds: int, with_onnx: bool) -> Row:
    """All that the network's process got to, and how it ended unless well."""
    command = [sys.executable, "-m", "benchmarks.zoo_measure", name, *([] if with_onnx else ["--no-onnx"])]
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = ""
    try:
        run = subprocess.run(command, cwd=HERE.parent, env=known, capture_output=True, timeout=seconds)
        output = run.stdout
        if run.returncode:
            last = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
            ended = f"process ended with {run.returncode}: {''.join(last)[:300]}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"stopped after {seconds} s"
    row: Row = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            row |= json.loads(line.removeprefix(MARK))
    return row | ({"failure": ended} if ended else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), metavar="NAME", help="measure these anew")
    parser.add_argument("--list", action="store_true", help="print the names of the networks")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export")
    parser.add_argument("--seconds", type=int, default=400, help="for each network")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/zoo.md")
    options = parser.parse_args()
    if options.list:
        print("\n".join(NETWORKS))
        return
    torch.set_num_threads(1)
    log = Log(RESULTS, any_commit=options.any_commit)
    for name in options.only or NETWORKS:
        if options.only:
            log.entries.pop(name, None)
        log.measure(name, partial(run_network, name, options.seconds, not options.no_onnx))
    log.end("bench_zoo")


if __name__ == "__main__":
    main()
