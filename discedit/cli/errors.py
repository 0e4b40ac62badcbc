"""Failures that the console command explains: by a message and an exit code (docs/cli.md), without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import click

OWN = re.compile(r"(--)?[A-Za-z_][\w.-]*: ")  # the op, or the option, that a sentence is about
EXTRA = ("PIL", "timm", "transformers")  # packages that discedit[cli] installs


class InputError(click.ClickException):
    """What the caller gave cannot be used; the message says why."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        # A DataLoader raises an error of a worker process anew, with its traceback for a message: take the last line.
        super().__init__(message.rpartition("InputError: ")[2].strip())


class NothingChangedError(click.ClickException):
    """The command had nothing to do; the message says why."""

    exit_code = 3


class GroupError(click.ClickException):
    """Another process of the group failed or did not answer in time."""

    exit_code = 4


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes an `InputError` of whatever fails within, such as the caller's own code or a damaged file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # A sentence of the library's own, such as "score: bound must be ...", needs no type in front of it.
        said = str(error) if OWN.match(str(error)) else f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name in EXTRA
        remedy = ", which is not installed: pip install 'discedit[cli]'" if missing else ""
        raise InputError(f"{what}: {said}{remedy}") from error
