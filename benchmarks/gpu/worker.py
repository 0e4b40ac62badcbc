"""The process that measures: takes steps by name from its input, gives rows to a pipe, one line of JSON each.

Started by the gate, which watches it: whatever ends this process ends one step.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import rehearsal

Message = dict[str, Any]


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as pipe:
        try:
            from benchmarks.gpu import figures
            from benchmarks.gpu.device import Gpu, Host
            from discedit import backends

            modules = {"cpu": backends.extensions.cpu_module()[1], "cuda": backends.extensions.cuda_module()[1]}
            rehearsal.install()
            rehearsed = rehearsal.VARIABLE in os.environ
            bench = figures.Bench(Host(), figures.TINY) if rehearsed else figures.Bench(Gpu(), figures.FULL)
            ready = {"modules": modules, **facts(bench)}
        except BaseException:
            pipe.write(json.dumps({"failed": traceback.format_exc()[-4000:]}) + "\n")
            raise
        serve(pipe, bench, figures.STEPS, ready)


def serve(pipe: IO[str], bench: Any, steps: Mapping[str, Callable[[Any], Iterator[Any]]], ready: Message) -> None:
    """Answers requests for steps until the input ends or the device is of no use any more."""

    def say(message: Message) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    say({"ready": ready})
    for line in sys.stdin:
        asked = json.loads(line)
        if not run(bench, steps[asked["step"]], asked["seconds"], asked["skip"], say):
            say({"end": "broken"})
            return
        say({"end": "ok"})


def run(
    bench: Any, step: Callable[[Any], Iterator[Any]], seconds: float, skip: int, say: Callable[[Message], None]
) -> bool:
    """The cases of a step but the first `skip`, while there is time: none begins that would end too late if it took as
    long as the last. Returns whether the device still works."""
    start = time.perf_counter()
    before = 0.0
    cases = itertools.islice(step(bench), skip, None)
    while True:
        try:
            case = next(cases, None)
        except Exception:
            say({"row": {"status": "failed", "traceback": traceback.format_exc()[-4000:]}})
            case = None
        if case is None:
            bench.forget()
            return True
        began = time.perf_counter()
        if began - start + before > seconds:
            say({"row": case.facts | {"status": "not measured", "why": f"the step's {seconds:.0f} s are over"}})
            continue
        say({"case": case.facts})
        row = outcome(case)
        before = time.perf_counter() - began
        say({"row": case.facts | row | {"took, s": round(before, 3)}})
        if row["status"] == "failed" and not still_works(bench):
            return False


def still_works(bench: Any) -> bool:
    """Some errors of a device stay: every later call fails with them."""
    try:
        bench.forget()
        bench.gpu.wait()
    except RuntimeError:
        return False
    return True


def outcome(case: Any) -> Message:
    """The rest of a row; warnings are noted, and stop nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row: Message = {"status": "ok", **case.run()}
        except Exception:
            row = {"status": "failed", "traceback": traceback.format_exc()[-4000:]}
    found = sorted({f"{warning.category.__name__}: {warning.message}"[:300] for warning in caught})
    return row | ({"warnings": found} if found else {})


def facts(bench: Any) -> Message:
    import torch

    import discedit

    note = Path(discedit.__file__).with_name("_build.json")
    found: Message = {
        "built at": json.loads(note.read_text()).get("commit") if note.is_file() else None,
        "multiprocessors": bench.gpu.multiprocessors,
        "L2, bytes": bench.gpu.cache_bytes,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
    }
    for name in ("triton", "discedit", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    main()
