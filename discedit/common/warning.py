"""Warnings that name the line of the caller's program."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A warning at the line that called the library, however deep in it that is found out."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("discedit", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
