"""The `discedit` console command."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from discedit import _backends, demo

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 2 bad arguments or input (the message is on stderr)."""
    parser = argparse.ArgumentParser(
        prog="discedit", description="Find what tells classes apart in a trained network, and prune or unlearn with it."
    )
    parser.add_argument("--version", action="version", version=f"discedit {version('discedit')}")
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser(
        "demo", help="score, prune and unlearn a class on real images, with a before/after table"
    )
    show.add_argument("--data", choices=sorted(demo.MODELS, reverse=True), default="digits")
    show.add_argument("--model", choices=[name for names in demo.MODELS.values() for name in names])
    show.add_argument(
        "--ratio", type=float, default=0.3, help="share of each layer's components to prune (default 0.3)"
    )
    show.add_argument("--forget", type=int, default=3, metavar="CLASS", help="class index to unlearn (default 3)")
    show.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (default out/demo)")

    commands.add_parser("doctor", help="what is built, which backends can run, and why the others cannot")

    options = parser.parse_args(arguments)
    if options.command == "doctor":
        print(doctor())
        return 0
    models = demo.MODELS[options.data]
    name = options.model or models[0]
    if name not in models:
        parser.error(f"--model must be one of {list(models)} for --data {options.data}, got {name!r}")
    try:
        demo.run(options.data, name, ratio=options.ratio, forget=options.forget, out=options.out, say=_say)
    except (ValueError, OSError) as error:
        print(f"discedit demo: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        print(f"discedit demo: {error}. Install the demo's needs: pip install 'discedit[demo]'", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def doctor() -> str:
    """The report of `discedit doctor`."""
    lines = [
        f"discedit {version('discedit')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}",
        "",
    ]
    for backend in _backends.status():
        lines.append(f"{backend.name:10} {'runs' if backend.runs else 'cannot run':11} {backend.detail}")
        if backend.ops:
            lines.append(f"{'':22} ops: {', '.join(backend.ops)}")
    lines += ["", '"auto" takes the first of these that can run an op on the tensor\'s device.']
    return "\n".join(lines)
