"""The compiled modules: `discedit._cpu`, and `discedit._cuda` where it was built."""

from __future__ import annotations

import importlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=1)
def cpu_module() -> tuple[Any, str]:
    """The compiled CPU core, or None and the reason why it is missing."""
    return _load("cpu")


@lru_cache(maxsize=1)
def cuda_module() -> tuple[Any, str]:
    """The compiled CUDA kernels, or None and the reason why they are missing."""
    return _load("cuda")


def _load(name: str) -> tuple[Any, str]:
    try:
        return importlib.import_module(f"discedit._{name}"), ""
    except ImportError as error:
        note = Path(__file__).parent.with_name("_build.json")
        record = json.loads(note.read_text()).get(name, {}) if note.exists() else {"built": True}
        built = f"cannot be imported: {error}"
        return None, built if record.get("built") else str(record.get("reason", "was not built"))
