"""The command line: every option of every command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from discedit import backends
from discedit.backends import arguments
from discedit.cli import demo
from discedit.cli.data import MOST_CLASSES, parse_numbers, parse_size
from discedit.editing.ablation import AROUND
from discedit.editing.prune import METHODS, REPAIRS
from discedit.editing.unlearn import COMPONENTS
from discedit.editing.unlearn import METHODS as UNLEARN_METHODS
from discedit.editing.unlearn import REPAIRS as UNLEARN_REPAIRS
from discedit.evaluation.evaluate import METRICS
from discedit.graph.pruning_graph import KINDS
from discedit.moments.moments import READS
from discedit.selection.budget import NORMALISATIONS
from discedit.selection.importance import CRITERIA
from discedit.selection.ranking import MEASURES, SIGNS

MANY = (1 << 63) - 1
EPILOG = """\
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


class UsageError(Exception):
    """Arguments that the parser refuses, with the line that shows how the command is used."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{
                "allow_abbrev": False,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                "epilog": EPILOG,
                **options,
            }
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def parser() -> Parser:
    """The whole command line."""
    whole = Parser(
        prog="discedit", description="Find what tells classes apart in a trained network, and prune or unlearn with it."
    )
    whole.add_argument("--version", action="version", version=f"discedit {version('discedit')}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (add, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return whole


# ---- what values look like -------------------------------------------------------------------------------------------


def _value(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type, whose errors say what is wrong."""

    def run(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return run


def _integer(least: int, most: int = MANY) -> Callable[[str], Any]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            rule = f"of at least {least}" if most == MANY else f"from {least} to {most}"
            raise ValueError(f"must be an integer {rule}, got {text!r}")
        return number

    return _value(parse)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {text!r}")
    return number


def _above_zero(text: str) -> float:
    number = _finite(text)
    if number <= 0:
        raise ValueError(f"must be a number above 0, got {text!r}")
    return number


def _at_least_zero(text: str) -> float:
    number = _finite(text)
    if number < 0:
        raise ValueError(f"must be a number of at least 0, got {text!r}")
    return number


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"must be names with commas between, got {text!r}")
    return names


def _class_names(text: str) -> list[str]:
    if not text.startswith("@"):
        return _names(text)
    try:
        names = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {text[1:]!r}: {error}") from error
    if not names or not all(names):
        raise ValueError(f"must hold one name on each line, {text[1:]!r} does not")
    return names


def _of_layers(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """ "0.3", or "conv1=0.3,conv2=0.5"."""

    def parse(text: str) -> Any:
        if "=" not in text:
            return number(text)
        found = {}
        for part in text.split(","):
            layer, equal, value = part.rpartition("=")
            if not equal or not layer.strip():
                raise ValueError(f"must be a number, or LAYER=NUMBER with commas between, got {text!r}")
            found[layer.strip()] = number(value)
        return found

    return _value(parse)


def _amount(text: str) -> int | float:
    """ "120000" is a number of things, "0.5" a share."""
    try:
        return int(text)
    except ValueError:
        return _finite(text)


def _bound_option(text: str) -> tuple[str, Any]:
    name, equal, value = text.partition("=")
    known = sorted({option for options in arguments.OPTIONS.values() for option in options})
    if not equal or name not in known:
        raise ValueError(f"must be NAME=VALUE with a name among {', '.join(known)}, got {text!r}")
    numbers = parse_numbers(value)
    if name == "comparisons":
        return name, int(value)
    return name, numbers if len(numbers) > 1 else numbers[0]


# ---- groups of options that several commands have --------------------------------------------------------------------


def _common(command: Parser, default_out: str) -> None:
    group = command.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, default=Path(default_out), metavar="DIR", help=f"run folder (default {default_out})"
    )
    group.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    group.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="of all random choices (default 0)")
    _output(group)


def _output(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")
    group.add_argument("--quiet", action="store_true", help="no progress and no remarks on stderr; warnings stay")


def _model(command: Parser, *, required: bool = True) -> None:
    group = command.add_argument_group("model")
    group.add_argument("--model", required=required, metavar="SPEC", help=MODEL)
    group.add_argument("--pretrained", action="store_true", help="of timm:NAME: with its published weights")
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict, .safetensors or .pt/.pth (read without running code)"
    )
    group.add_argument(
        "--recipe", type=Path, action="append", default=[], metavar="FILE",
        help="recipe of an earlier edit to apply first; may be given again, and applies in this order",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="what the model runs in (default float32)",
    )  # fmt: skip


def _data(command: Parser, *, required: bool, test: bool, test_required: bool = False, data_help: str = DATA) -> None:
    group = command.add_argument_group("data")
    group.add_argument("--data", required=required, metavar="SPEC", help=data_help)
    if test:
        group.add_argument("--test", required=test_required, metavar="SPEC", help="data to test on; as for --data")
    group.add_argument(
        "--num-classes",
        type=_integer(1, MOST_CLASSES),
        metavar="N",
        help="number of classes (default: of the model's logits)",
    )
    group.add_argument(
        "--class-names", type=_value(_class_names), metavar="A,B,...",
        help="names of the classes in the order of the logits, or @FILE with one on each line; folders must bear them",
    )  # fmt: skip
    group.add_argument(
        "--limit-per-class", type=_integer(1), metavar="N", help="only the first N samples of each class of --data"
    )
    group.add_argument("--batch-size", type=_integer(1), default=256, metavar="N", help="(default 256)")
    group.add_argument(
        "--workers",
        type=_integer(0, 256),
        default=0,
        metavar="N",
        help="processes that read data (default 0: this one)",
    )
    group = command.add_argument_group("images of folders and .npz files", "Default: what timm or the processor says.")
    group.add_argument(
        "--size", type=_value(parse_size), metavar="N", help="resize the shorter side, then crop the centre: N or HxW"
    )
    group.add_argument(
        "--mean", type=_value(parse_numbers), metavar="R,G,B", help="of pixels in [0, 1], for each channel"
    )
    group.add_argument("--std", type=_value(parse_numbers), metavar="R,G,B", help="standard deviation, the same way")


def _scores(command: Parser) -> None:
    group = command.add_argument_group("scores")
    group.add_argument(
        "--scores", type=Path, metavar="FILE",
        help="scores.safetensors or the run folder of `discedit score`; default: computed from --data",
    )  # fmt: skip
    group.add_argument(
        "--labels", choices=("given", "predicted"), default="given",
        help="whose labels the scores are computed with: those given, or the model's own answers (default given)",
    )  # fmt: skip


# ---- the commands ----------------------------------------------------------------------------------------------------


def _score(command: Parser) -> None:
    _model(command)
    _data(command, required=True, test=False)
    group = command.add_argument_group("scores")
    group.add_argument(
        "--labels", choices=("given", "predicted"), default="given",
        help="the data's labels, or the model's own answers (default given)",
    )  # fmt: skip
    group.add_argument(
        "--layers",
        type=_value(_names),
        metavar="A,B,...",
        help="modules to read (default: convolutions and linear layers)",
    )
    group.add_argument(
        "--read", choices=READS, default="consumer",
        help="where a layer is read: as the next layer gets it, behind its norm, or at its output (default consumer)",
    )  # fmt: skip
    group.add_argument(
        "--statistic", type=_value(_names), default=["mean"], metavar="NAME",
        help=f"of a feature map: {', '.join(arguments.STATISTICS)}; several with commas (default mean)",
    )  # fmt: skip
    group.add_argument(
        "--witness", choices=arguments.WITNESSES, help="default quadratic; vector for several statistics"
    )
    group.add_argument("--scale", type=_value(_above_zero), metavar="X", help="of the witness exp: exp(-X t)")
    group.add_argument("--bound", choices=arguments.BOUNDS, default="minimax", help="default minimax")
    group.add_argument(
        "--bound-option", type=_value(_bound_option), action="append", default=[], metavar="NAME=VALUE",
        help="radius or rho of robust; alpha, value_range (as LOW,HIGH) or comparisons of certified",
    )  # fmt: skip
    group.add_argument("--pairs", action="store_true", help="also score all pairs of classes (for pairwise criteria)")
    group.add_argument(
        "--blocks",
        type=_integer(2, 1000),
        metavar="N",
        help="standard errors by the jackknife, from N blocks of the samples",
    )
    group.add_argument(
        "--backend", choices=("auto", *backends.NAMES), default="auto", help="default auto; see `discedit doctor`"
    )
    group = command.add_argument_group("long runs")
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="save the state there, and go on from it")
    group.add_argument(
        "--checkpoint-every", type=_value(_at_least_zero), metavar="SECONDS", help="how often (default 60)"
    )
    group.add_argument(
        "--timeout", type=_value(_above_zero), default=1800.0, metavar="SECONDS",
        help="under torchrun: how long to wait for other processes (default 1800)",
    )  # fmt: skip
    _common(command, "out/score")


def _prune(command: Parser) -> None:
    _model(command)
    _data(command, required=False, test=True, data_help=DATA + "; scores, criterion and repair come from it")
    _scores(command)
    group = command.add_argument_group("budget", "Exactly one.")
    group.add_argument(
        "--ratio",
        type=_of_layers(_finite),
        metavar="X",
        help="share of each layer's components to remove, or LAYER=X,...",
    )
    group.add_argument("--global-ratio", type=_value(_finite), metavar="X", help="share of all components together")
    group.add_argument("--threshold", type=_value(_finite), metavar="X", help="components less important than this go")
    group.add_argument(
        "--parameters",
        type=_value(_amount),
        metavar="N",
        help="parameters that may be left: a number, or a share below 1",
    )
    group.add_argument("--macs", type=_value(_amount), metavar="N", help="the same for multiply-accumulates")
    group = command.add_argument_group("pruning")
    group.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="modhifi: by fidelity, without labels (default discedit)"
    )
    group.add_argument("--criterion", choices=("auto", *CRITERIA), default="auto", help="of importance (default auto)")
    group.add_argument("--repair", choices=REPAIRS, default="auto", help="what follows the removal (default auto)")
    group.add_argument(
        "--components", type=_value(_names), default=["filters", "neurons", "heads"], metavar="A,B,...",
        help=f"all, or of {', '.join(KINDS)} (default filters,neurons,heads)",
    )  # fmt: skip
    group.add_argument(
        "--across", choices=("auto", *NORMALISATIONS), default="auto", help="how layers compare (default auto)"
    )
    group.add_argument(
        "--round-to",
        type=_integer(1),
        default=1,
        metavar="N",
        help="what stays in a layer is a multiple of N (default 1)",
    )
    group.add_argument(
        "--floor", type=_of_layers(_amount), default=1, metavar="N",
        help="components that stay in each layer at least, or LAYER=N,... (default 1)",
    )  # fmt: skip
    group.add_argument(
        "--layers", type=_value(_names), metavar="A,B,...", help="layers to prune (default: all that can be)"
    )
    group.add_argument("--ignore", type=_value(_names), default=[], metavar="A,B,...", help="layers to leave whole")
    group.add_argument("--shrink-outputs", action="store_true", help="outputs beside the logits may lose channels")
    group.add_argument("--steps", type=_integer(1, 1000), default=1, metavar="N", help="in N equal steps (default 1)")
    group.add_argument("--rescore", action="store_true", help="score the model anew after each step; needs --data")
    _common(command, "out/prune")


def _unlearn(command: Parser) -> None:
    _model(command)
    _data(command, required=False, test=True, data_help=DATA + "; all classes, labelled")
    _scores(command)
    group = command.add_argument_group("unlearning")
    group.add_argument(
        "--classes", type=_value(_names), required=True, metavar="A,B,...", help="names or indices to forget"
    )
    group.add_argument(
        "--method", choices=UNLEARN_METHODS, default="discedit", help="how (default discedit; modhifi: by fidelity)"
    )
    group.add_argument(
        "--no-data",
        action="store_true",
        help="edit from the scores alone; --data then serves to compute them, if given",
    )
    group.add_argument("--components", choices=COMPONENTS, default="auto", help="what is edited (default auto)")
    group.add_argument("--layers", type=_value(_names), metavar="A,B,...", help="layers to choose from")
    group.add_argument(
        "--factor", type=_value(_finite), metavar="X", help="multiplies outputs (default 0, or -1 as --method says)"
    )
    group = command.add_argument_group("limit", "At most one; --forget-accuracy and --retain-drop may go together.")
    group.add_argument("--fraction", type=_value(_finite), metavar="X", help="share of the rows to edit for each class")
    group.add_argument("--top", type=_integer(1), metavar="N", help="so many of each layer")
    group.add_argument("--deviations", type=_value(_finite), metavar="X", help="so far above the mean of their layer")
    group.add_argument("--damage", type=_value(_finite), metavar="X", help="share of what tells other classes apart")
    group.add_argument("--forget-accuracy", type=_value(_finite), metavar="X", help="target for the classes to forget")
    group.add_argument("--retain-drop", type=_value(_finite), metavar="X", help="what the others may lose at most")
    group = command.add_argument_group("rows and heads")
    group.add_argument("--by", choices=MEASURES, help="what ranks them (default score; of modhifi fidelity)")
    group.add_argument(
        "--sign", choices=SIGNS, default="up", help="which may go (default up: more active for the class)"
    )
    group.add_argument(
        "--around", choices=("auto", *AROUND), default="auto", help="what they give instead (default auto)"
    )
    group.add_argument("--repair", choices=UNLEARN_REPAIRS, default="none", help="of later layers (default none)")
    group.add_argument("--protection", type=_value(_finite), default=1.0, metavar="X", help="of the repair (default 1)")
    group.add_argument("--remove", action="store_true", help="also remove silenced components physically")
    _common(command, "out/unlearn")


def _evaluate(command: Parser) -> None:
    _model(command)
    _data(
        command,
        required=False,
        test=True,
        test_required=True,
        data_help=DATA + "; samples that the model was trained on",
    )
    group = command.add_argument_group("evaluation")
    group.add_argument(
        "--classes",
        type=_value(_names),
        metavar="A,B,...",
        help="names or indices forgotten (default: those of the recipes)",
    )
    group.add_argument(
        "--original", type=Path, metavar="FILE", help="weights before the edit (default: of the model without --recipe)"
    )
    group.add_argument("--retrained", type=Path, metavar="FILE", help="weights of a model trained without the classes")
    group.add_argument(
        "--metrics",
        type=_value(_names),
        default=["all"],
        metavar="A,B,...",
        help=f"of {', '.join(METRICS)} (default all)",
    )
    group.add_argument("--features", metavar="LAYER", help="whose output to look at (default: the input of the head)")
    group.add_argument("--learning-rate", type=_value(_above_zero), default=0.001, metavar="X", help="(default 0.001)")
    group.add_argument("--max-steps", type=_integer(1), default=50, metavar="N", help="of relearning (default 50)")
    _common(command, "out/evaluate")


def _report(command: Parser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of score, prune or unlearn")
    command.add_argument("--title", help="heading of the page")
    command.add_argument("--pngs", action="store_true", help="also write each figure as a picture")
    _common(command, "out/report")


def _doctor(command: Parser) -> None:
    _output(command)


def _demo(command: Parser) -> None:
    command.add_argument("--data", choices=sorted(demo.MODELS, reverse=True), default="digits", help="(default digits)")
    command.add_argument("--model", choices=[name for names in demo.MODELS.values() for name in names])
    command.add_argument(
        "--ratio", type=float, default=0.3, metavar="X", help="share of each layer's components to prune (default 0.3)"
    )
    command.add_argument("--forget", type=int, default=3, metavar="CLASS", help="class index to unlearn (default 3)")
    command.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder for the files (default out/demo)"
    )
    _output(command)


COMMANDS: dict[str, tuple[Callable[[Parser], None], str]] = {
    "score": (_score, "how well each component tells each class from the rest: one pass over the data"),
    "prune": (_prune, "remove the least important components and repair what is left"),
    "unlearn": (_unlearn, "edit the model so that it no longer recognises some classes"),
    "evaluate": (_evaluate, "what an edited model still knows of the classes it should have forgotten"),
    "report": (_report, "one HTML page from run folders"),
    "doctor": (_doctor, "what is built, which backends can run, and why the others cannot"),
    "demo": (_demo, "score, prune and unlearn a class on real images, with a before/after table"),
}


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json was given, also where the parser refuses the rest."""
    return "--json" in arguments
