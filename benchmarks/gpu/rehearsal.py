"""Backend "cuda" on CPU tensors: csrc/cuda compiled by a C++ compiler (tests/cuda_on_host), so that the gate's steps
run without a GPU.

    python -m benchmarks.gpu.rehearsal FOLDER    # compiles it there, unless it is there already
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = "DISCEDIT_REHEARSAL"  # the folder, for the processes of a rehearsal
NAME = "_cuda_on_host"


def prepare(folder: Path) -> Path:
    """The compiled module in `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_on_host

    found = list(folder.glob(f"{NAME}*"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    return cuda_on_host.compile_in(folder)


def install() -> None:
    """Where `VARIABLE` names a folder: its module takes the place of discedit._cuda, and takes CPU tensors."""
    if VARIABLE not in os.environ:
        return
    from discedit import backends

    module = _loaded(next(Path(os.environ[VARIABLE]).glob(f"{NAME}*")))
    why_not = backends.why_not

    def why_not_here(backend: str, op: str, device: object, *facts: object, **more: object) -> str:
        reason = why_not(backend, op, device, *facts, **more)
        return "" if backend == "cuda" and reason.startswith("it takes tensors of an NVIDIA GPU") else reason

    backends.extensions.cuda_module = lambda: (module, "")
    backends.why_not = why_not_here


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))
