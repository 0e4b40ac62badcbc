"""The `discedit` console command: parse, run, print; what is wrong becomes a message and an exit code (docs/cli.md)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from discedit import backends as _backends
from discedit.cli import demo
from discedit.cli.arguments import UsageError, parser, wants_json
from discedit.cli.commands import COMMANDS, Result
from discedit.cli.run_folder import Console, GroupError, NothingChangedError, as_json, plain

DONE, BAD_INPUT, NOTHING_CHANGED, GROUP_FAILED, INTERRUPTED = 0, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 done, 2 bad arguments or input, 3 nothing changed, 4 another process of the group failed, 130 interrupted. Any
    other failure is a bug, and an exception.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(given)
    except BrokenPipeError:  # nobody reads on, which is no failure
        _close_stdout()
        return DONE


def _run(given: list[str]) -> int:
    name = "discedit"
    try:
        try:
            options = parser().parse_args(given)
        except SystemExit as stop:  # --help and --version
            return int(stop.code or 0)
        name = f"discedit {options.command}"
        console = Console(options.command, quiet=options.quiet)
        with console.warning():
            record, text = _result(options, console)
        if record or text:
            print(as_json(plain(record)) if options.json else text, flush=True)
        return DONE
    except UsageError as error:
        print(error.usage, end="", file=sys.stderr)
        return _failed(given, name, str(error), BAD_INPUT)
    except NothingChangedError as error:
        return _failed(given, name, str(error), NOTHING_CHANGED)
    except GroupError as error:
        return _failed(given, name, f"another process of the group failed or is late: {error}", GROUP_FAILED)
    except KeyboardInterrupt:
        return _failed(given, name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _failed(given, name, f"out of memory, a smaller --batch-size may help: {error}", BAD_INPUT)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's own, on the CPU
            raise
        return _failed(given, name, f"out of memory: {error}", BAD_INPUT)
    except (ValueError, OSError) as error:
        return _failed(given, name, str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        extra = "demo" if name.endswith("demo") else "cli"
        return _failed(given, name, f"{error}. Install what it needs: pip install 'discedit[{extra}]'", BAD_INPUT)
    except BaseException as error:
        if wants_json(given):
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        raise


def _result(options: argparse.Namespace, console: Console) -> Result:
    if options.command == "doctor":
        return doctor()
    if options.command == "demo":
        return _demo(options, console)
    return COMMANDS[options.command](options, console)


def _failed(given: list[str], name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    if wants_json(given):
        print(json.dumps({"error": message}), flush=True)
    return code


def _close_stdout() -> None:
    """So that the interpreter, which flushes at its end, does not complain either."""
    with suppress(OSError, ValueError):  # where there is no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _demo(options: argparse.Namespace, console: Console) -> Result:
    models = demo.MODELS[options.data]
    name = options.model or models[0]
    if name not in models:
        raise ValueError(f"--model must be one of {list(models)} for --data {options.data}, got {name!r}")

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    columns = demo.run(options.data, name, ratio=options.ratio, forget=options.forget, out=options.out, say=say)
    results: dict[str, Any] = {
        column.title: {
            "accuracy": column.accuracy.tolist(),
            "parameters": column.parameters,
            "macs": column.macs,
        }
        for column in columns
    }
    return {"command": "demo", "results": results, "out": str(options.out)} if options.json else {}, ""


def doctor() -> Result:
    """What is built and can run, as JSON has it and as text."""
    versions = {"discedit": version("discedit"), "Python": platform.python_version(), "torch": str(torch.__version__)}
    lines = [", ".join(f"{name} {number}" for name, number in versions.items()) + f", {platform.machine()}", ""]
    backends = {}
    for backend in _backends.status():
        backends[backend.name] = {"runs": backend.runs, "detail": backend.detail, "ops": list(backend.ops)}
        lines.append(f"{backend.name:10} {'runs' if backend.runs else 'cannot run':11} {backend.detail}")
        if backend.ops:
            lines.append(f"{'':22} ops: {', '.join(backend.ops)}")
    lines += ["", '"auto" takes the first of these that can run an op on the tensor\'s device.']
    record = {"command": "doctor", "versions": versions, "machine": platform.machine(), "backends": backends}
    return record, "\n".join(lines)
