"""The `discedit` console command: parse, run, print; what is wrong becomes a message and an exit code (docs/cli.md)."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

import click
import torch

from discedit import backends
from discedit.cli.arguments import OUTPUT, Options, command
from discedit.cli.commands import evaluate_command, prune_command, report_command, score_command, unlearn_command
from discedit.cli.demo import demo_command
from discedit.cli.run_folder import Console, Result, as_json

DONE, BUG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@command(*OUTPUT)
def doctor_command(options: Options, console: Console) -> Result:
    """What is built, which backends can run, and why the others cannot."""
    return doctor()


@click.group(
    "discedit",
    commands=[score_command, prune_command, unlearn_command, evaluate_command, report_command, doctor_command,
              demo_command],
    no_args_is_help=False,
)  # fmt: skip
@click.version_option(package_name="discedit", message="%(prog)s %(version)s")
def discedit() -> None:
    """Find what tells classes apart in a trained network, and prune or unlearn with it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 done, 2 bad arguments or input, 3 nothing changed, 4 another process of the group failed, 130 interrupted. Any
    other failure is a bug, and an exception.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_object = "--json" in given  # also where the rest is refused
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        with discedit.make_context("discedit", list(given)) as context:
            record, text = discedit.invoke(context)
        if record or text:
            print(as_json(record) if as_object else text, flush=True)
        return DONE
    except click.exceptions.Exit as stop:  # --help and --version
        return stop.exit_code
    except BrokenPipeError:  # nobody reads on, which is no failure
        with suppress(OSError, ValueError):  # the interpreter flushes at its end: not to the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except BaseException as error:
        name = next((word for word in given if word in discedit.commands), "")
        code, message = _explained(error, name)
        if code != BUG:
            print(f"{f'discedit {name}'.rstrip()}: {message}", file=sys.stderr, flush=True)
        if as_object:
            print(json.dumps({"error": message}), flush=True)
        if code == BUG:
            raise
        return code


def _explained(error: BaseException, name: str) -> tuple[int, str]:
    """Exit code and message of a failure."""
    if isinstance(error, click.UsageError):
        help = f" See {error.ctx.command_path} --help." if error.ctx else ""
        return BAD_INPUT, f"{error.format_message().rstrip('.')}.{help}"
    if isinstance(error, click.ClickException):  # those of errors.py
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return BAD_INPUT, f"out of memory, a smaller --batch-size may help: {error}"
    if isinstance(error, ModuleNotFoundError):
        extra = "demo" if name == "demo" else "cli"
        return BAD_INPUT, f"{error}. Install what it needs: pip install 'discedit[{extra}]'"
    if isinstance(error, (ValueError, OSError)):
        return BAD_INPUT, str(error)
    return BUG, f"{type(error).__name__}: {error}"


def doctor() -> Result:
    """What is built and can run, as JSON has it and as text."""
    versions = {"discedit": version("discedit"), "Python": platform.python_version(), "torch": str(torch.__version__)}
    lines = [", ".join(f"{name} {number}" for name, number in versions.items()) + f", {platform.machine()}", ""]
    found = {}
    for backend in backends.status():
        found[backend.name] = {"runs": backend.runs, "detail": backend.detail, "ops": list(backend.ops)}
        lines.append(f"{backend.name:10} {'runs' if backend.runs else 'cannot run':11} {backend.detail}")
        if backend.ops:
            lines.append(f"{'':22} ops: {', '.join(backend.ops)}")
    lines += ["", '"auto" takes the first of these that can run an op on the tensor\'s device.']
    record = {"command": "doctor", "versions": versions, "machine": platform.machine(), "backends": found}
    return record, "\n".join(lines)
