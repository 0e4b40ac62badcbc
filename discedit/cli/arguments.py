"""The command line: every option of every command, and what its values look like."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from discedit import backends
from discedit.backends import arguments
from discedit.cli.data import MOST_CLASSES
from discedit.cli.errors import explained
from discedit.cli.run_folder import Console, Result
from discedit.editing import ablation
from discedit.editing.prune import OUTPUTS, REPAIRS
from discedit.editing.row_operations import AROUND
from discedit.editing.unlearn import METHODS
from discedit.evaluation.evaluate import METRICS
from discedit.graph.pruning_graph import INNER, KINDS
from discedit.moments.moments import READS
from discedit.selection.budget import ACROSS
from discedit.selection.importance import CRITERIA
from discedit.selection.ranking import MEASURES, SIGNS

Options = SimpleNamespace  # of a command, by name
EPILOG = """\b
exit codes:
  0  done
  2  bad arguments or input; the message is on stderr (with --json also on stdout)
  3  nothing changed: an edit that edits nothing, a report without content
  4  another process of the group failed or did not answer in time
  130  interrupted
"""
MODEL = """\
MODULE:FACTORY such as 'discedit.zoo:cifar_resnet("resnet20")' (imported, also from the working directory; arguments are
literals), timm:NAME, or hf:FOLDER (a local transformers image classifier, or one that this command has edited)"""
DATA = """\
an image folder (FOLDER/CLASS/image.png; classes in sorted order), an .npz file (arrays images and labels), or
MODULE:FACTORY that gives a dataset or loader, such as 'discedit.zoo:cifar10("train", limit=2500)'"""


# ---- what values look like -------------------------------------------------------------------------------------------


class Finite(click.types.FloatParamType):
    """A number that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite.", param, ctx)
        return number


class FiniteRange(click.FloatRange, Finite):
    """One in a range."""


NUMBER = Finite()
ABOVE_ZERO = FiniteRange(0, min_open=True)
COUNT = click.IntRange(1, 10**9)
SIDE = click.IntRange(1, 1 << 13)
EXISTING = click.Path(exists=True, path_type=Path)


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise click.BadParameter(f"must be names with commas between, got {text!r}")
    return found


def class_names(text: str) -> list[str]:
    if not text.startswith("@"):
        return names(text)
    with explained(f"--class-names: cannot read {text[1:]!r}"):
        found = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    if not found or not all(found):
        raise click.BadParameter(f"must hold one name on each line, {text[1:]!r} does not")
    return found


def device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise click.BadParameter(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def listed(kind: click.ParamType[Any]) -> Callable[[str], tuple[Any, ...]]:
    """ "0.5" or "0.485,0.456,0.406"."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def size(text: str) -> tuple[int, int]:
    """ "224" or "224x160" (height x width)."""
    sides = [SIDE(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise click.BadParameter(f"must be N or HEIGHTxWIDTH, got {text!r}")
    return sides[0], sides[-1]


def amount(text: str) -> int | float:
    """ "120000" is a number of things, "0.5" a share."""
    return int(text) if text.isdecimal() else NUMBER(text)


def amount_by_layer(text: str) -> Any:
    """ "0.3", or "conv1=0.3,conv2=0.5"."""
    if "=" not in text:
        return amount(text)
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(layer.strip() for layer, _, _ in pairs):
        raise click.BadParameter(f"must be a number, or LAYER=NUMBER with commas between, got {text!r}")
    return {layer.strip(): amount(value) for layer, _, value in pairs}


def by_class(text: str) -> dict[str, int | float]:
    """ "cat=3,5=2"."""
    if not all("=" in part for part in text.split(",")):
        raise click.BadParameter(f"must be CLASS=NUMBER with commas between, got {text!r}")
    found: dict[str, int | float] = amount_by_layer(text)
    return found


def across(text: str) -> str | Path:
    """A way to compare layers, or the file of a `DivergenceTable`."""
    if text in ACROSS:
        return text
    if not Path(text).is_file():
        ways = ", ".join(map(repr, ACROSS))
        raise click.BadParameter(f"must be one of {ways}, or a file of divergences that exists, got {text!r}")
    return Path(text)


def bound_option(text: str) -> tuple[str, Any]:
    """ "radius=2", or "value_range=0,1"."""
    name, _, value = text.partition("=")
    found = tuple(amount(part) for part in value.split(","))
    return name, found if len(found) > 1 else found[0]


# ---- options, in the groups that commands share ----------------------------------------------------------------------


def option(name: str, type: Any = None, default: Any = None, help: str = "", **settings: Any) -> click.Option:
    if default is not None:  # click takes a None that it is given for a value
        settings["default"] = default
    return click.Option([name], type=click.Choice(type) if isinstance(type, tuple) else type, help=help, **settings)


def flag(name: str, help: str) -> click.Option:
    return click.Option([name], is_flag=True, help=help)


OUTPUT = [
    flag("--json", "one JSON object on stdout, and nothing else there"),
    flag("--quiet", "no progress and no remarks on stderr; warnings stay"),
]
RUN = [
    flag("--overwrite", "replace a run that is already in --out"),
    option("--seed", click.IntRange(0, (1 << 63) - 1), 0, "of all random choices"),
    *OUTPUT,
]
MODEL_OPTIONS = [
    option("--model", required=True, metavar="SPEC", help=MODEL),
    flag("--pretrained", "of timm:NAME: with its published weights"),
    option("--weights", EXISTING, help="state dict, .safetensors or .pt/.pth (read without running code)"),
    option("--recipe", EXISTING, multiple=True,
           help="recipe of an earlier edit to apply first; may be given again, and applies in this order"),
    option("--device", device, "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N"),
    option("--dtype", ("float32", "bfloat16", "float16"), "float32", "what the model runs in"),
]  # fmt: skip


def data_options(serves: str = "", *, required: bool = False) -> list[click.Option]:
    return [
        option("--data", required=required, metavar="SPEC", help=f"{DATA}{serves}"),
        option("--num-classes", click.IntRange(1, MOST_CLASSES), help="default: of the model's logits"),
        option("--class-names", class_names, metavar="A,B,...",
               help="of the classes in the order of the logits, or @FILE, one on each line; folders must bear them"),
        option("--limit-per-class", COUNT, help="only the first N samples of each class of --data"),
        option("--batch-size", COUNT, 256, "samples that run together"),
        option("--workers", click.IntRange(0, 256), 0, "processes that read data; 0: this one"),
        option("--size", size, metavar="N", help="of images of folders and .npz files: resize the shorter side, then "
               "crop the centre: N or HxW (default: what timm or the processor says)"),
        option("--mean", listed(NUMBER), metavar="R,G,B", help="of pixels in [0, 1], for each channel"),
        option("--std", listed(ABOVE_ZERO), metavar="R,G,B", help="standard deviation, the same way"),
    ]  # fmt: skip


def out(command: str) -> click.Option:
    return option("--out", click.Path(path_type=Path), f"out/{command}", "run folder")


def on_model(command: str, *own: click.Option, serves: str = "", needed: bool = False) -> list[click.Parameter]:
    """Options of a command that works on a model and data, which its own ones are between."""
    return [*MODEL_OPTIONS, *data_options(serves, required=needed), *own, out(command), *RUN]


TEST = option("--test", metavar="SPEC", help="data to test on; as for --data")
LABELS = option("--labels", ("given", "predicted"), "given", "whose labels: the data's, or the model's own answers")
SCORES = option("--scores", EXISTING, help="file or run folder of `discedit score`; default: computed from --data")
LAYERS = option("--layers", names, metavar="A,B,...", help="layers to read or edit (default: all that can be)")

SCORE = on_model(
    "score",
    LABELS,
    LAYERS,
    option("--read", READS, "consumer", "a layer as the next one gets it, behind its norm, or at its output"),
    option("--statistic", names, "mean", f"of a feature map: {', '.join(arguments.STATISTICS)}; several with commas"),
    option("--witness", arguments.WITNESSES, help="default quadratic; vector for several statistics"),
    option("--scale", ABOVE_ZERO, help="of the witness exp: exp(-X t)"),
    option("--bound", arguments.BOUNDS, "minimax", "of what tells a class from the rest"),
    option("--bound-option", bound_option, multiple=True, metavar="NAME=VALUE",
           help="radius or rho of robust; alpha, value_range (as LOW,HIGH) or comparisons of certified"),
    flag("--pairs", "also score all pairs of classes (for pairwise criteria)"),
    option("--blocks", click.IntRange(2, 1000), help="standard errors by the jackknife, from N blocks of the samples"),
    option("--backend", ("auto", *backends.NAMES), "auto", "see `discedit doctor`"),
    option("--checkpoint", click.Path(path_type=Path), help="of long runs: save the state there, and go on from it"),
    option("--checkpoint-every", NUMBER, help="so many seconds (default 60)"),
    option("--timeout", ABOVE_ZERO, 1800.0, "under torchrun: seconds to wait for other processes"),
    needed=True,
)  # fmt: skip
PRUNE = on_model(
    "prune",
    TEST,
    SCORES,
    LABELS,
    option("--ratio", amount_by_layer, metavar="X", help="share of each layer's components to remove, or LAYER=X,..."),
    option("--global-ratio", NUMBER, help="share of all components together"),
    option("--threshold", NUMBER, help="components less important than this go"),
    option("--parameters", amount, metavar="N", help="parameters that may be left: a number, or a share below 1"),
    option("--macs", amount, metavar="N", help="the same for multiply-accumulates"),
    option("--latency", amount, metavar="N", help="the same for milliseconds that one sample takes here"),
    option("--criterion", ("auto", *CRITERIA), "auto", "of importance"),
    option("--repair", REPAIRS, "auto", "what follows the removal"),
    option("--components", names, "filters,neurons,heads", f"all, or of {', '.join((*KINDS, *INNER, OUTPUTS))}"),
    option("--across", across, "auto", f"how layers compare: {', '.join(ACROSS)}, or a file of divergences"),
    option("--trials", COUNT, help="of divergence, at most (default 128)"),
    option("--round-to", COUNT, 1, "what stays in a layer is a multiple of N"),
    option("--floor", amount_by_layer, "1", "components left in each layer at least, or LAYER=N,...", metavar="N"),
    LAYERS,
    option("--ignore", names, metavar="A,B,...", help="layers to leave whole"),
    option("--classes", names, metavar="A,B,...", help="prune for these classes alone, names or indices"),
    option("--protect", by_class, metavar="A=N,...", help="samples of class A count N times in --data"),
    option("--steps", click.IntRange(1, 1000), 1, "in N equal steps"),
    flag("--rescore", "score the model anew after each step; needs --data"),
    serves="; scores, criterion and repair come from it",
)
METHOD = [  # of unlearning: what its classes take, None where it was not given
    option("--scale", NUMBER, help="multiplies directions or outputs (default 0, or -1 as modhifi says)"),
    option("--fraction", NUMBER, help="share of the components to ablate for each class"),
    option("--top", COUNT, help="so many of each layer"),
    option("--deviations", NUMBER, help="so far above the mean of their layer"),
    option("--damage", NUMBER, help="share of what tells other classes apart"),
    option("--components", tuple(ablation.KINDS), help="what is ablated (default rows)"),
    option("--by", MEASURES, help="what ranks rows and heads (default score; of modhifi fidelity)"),
    option("--sign", SIGNS, help="which may go; up (default): more active for the class"),
    option("--around", ("auto", *AROUND), help="what they give instead"),
    option("--repair", tuple(ablation.FRACTION), help="of later layers (default none)"),
    option("--protection", NUMBER, help="of the repair least_squares (default 1)"),
    click.Option(["--remove"], is_flag=True, default=None, help="also remove zeroed components physically"),
]
UNLEARN = on_model(
    "unlearn",
    TEST,
    SCORES,
    LABELS,
    option("--classes", names, required=True, metavar="A,B,...", help="names or indices to forget"),
    option("--method", ("auto", *METHODS), "auto", "erase_directions where there is data, else ablate_components"),
    flag("--no-data", "edit from the scores alone; --data then serves to compute them, if given"),
    LAYERS,
    option("--forget-accuracy", NUMBER, help="target for the classes to forget; goes with --retain-drop"),
    option("--retain-drop", NUMBER, help="what the others may lose at most"),
    *METHOD,
    serves="; all classes, labelled",
)
EVALUATE = on_model(
    "evaluate",
    option("--test", required=True, metavar="SPEC", help="data to test on; as for --data"),
    option("--classes", names, metavar="A,B,...", help="names or indices forgotten (default: those of the recipes)"),
    option("--original", EXISTING, help="weights before the edit (default: of the model without --recipe)"),
    option("--retrained", EXISTING, help="weights of a model trained without the classes"),
    option("--metrics", names, "all", f"of {', '.join(METRICS)}"),
    option("--features", metavar="LAYER", help="whose output to look at (default: the input of the head)"),
    option("--learning-rate", ABOVE_ZERO, 0.001, "of relearning"),
    option("--max-steps", COUNT, 50, "of relearning"),
    serves="; samples that the model was trained on",
)


def chosen(options: Options, *names: str) -> dict[str, Any]:
    """Those of these options that were given or have a default, by name: as the library's functions take them."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def command(*parameters: click.Parameter) -> Callable[[Callable[[Options, Console], Result]], click.Command]:
    """Makes a command of a function that is called as it is, `_command` aside, and gets its options and the console."""

    def made(run: Callable[[Options, Console], Result]) -> click.Command:
        name = run.__name__.removesuffix("_command")

        def call(**options: Any) -> Result:
            console = Console(name, quiet=options["quiet"])
            with console.warning():
                return run(Options(**options), console)

        settings = {"show_default": True}
        return click.Command(
            name, callback=call, params=list(parameters), help=run.__doc__, epilog=EPILOG, context_settings=settings
        )

    return made
