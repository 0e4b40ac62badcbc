"""What the commands `score`, `prune`, `unlearn`, `evaluate` and `report` do with their options."""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as format_tensors
from torch import Tensor, nn

from discedit import backends
from discedit.backends import arguments
from discedit.cli.data import Batches, Images, check_labels, number_classes, open_data
from discedit.cli.models import InputError, ModelSource, Preprocessing, load_weights, open_model, some
from discedit.cli.run_folder import Clock, Console, GroupError, NothingChangedError, RunFolder, load_run, record_of
from discedit.common import files
from discedit.editing.prune import OF_SCORES, prune
from discedit.editing.unlearn import unlearn
from discedit.evaluation.evaluate import evaluate
from discedit.evaluation.relearning import Relearning
from discedit.integrations import huggingface
from discedit.model.forward import call, chosen, device_of, first_tensor, moved, split, undisturbed
from discedit.model.size import accuracy_per_class, count_macs, count_parameters
from discedit.moments.calibration import samples_of
from discedit.moments.collect import collect_blocks, collect_moments
from discedit.moments.distributed import OtherFailed
from discedit.moments.moments import Moments
from discedit.recipes.recipe import Edit, Recipe
from discedit.recipes.stack import Stack
from discedit.reporting.report import report
from discedit.scoring.scores import OVER_PAIRS, Scores, score

Result = tuple[dict[str, Any], str]  # what run.json holds, and what is shown
IMAGE_OPTIONS = ("size", "mean", "std")
GROUP_FAILURES = ("gloo", "nccl", "timed out", "connection", "peer")  # in messages of torch.distributed


@dataclass
class Job:
    """A model with the data that a command works on."""

    options: argparse.Namespace
    console: Console
    source: ModelSource
    base: nn.Module  # before the recipes
    model: nn.Module  # with them
    num_classes: int
    class_names: list[str] | None
    data: Batches | None
    test: Batches | None
    example: Any  # inputs of one sample; None where there is nothing to tell their shape
    facts: dict[str, Any]

    def record(self, clock: Clock, **results: Any) -> dict[str, Any]:
        if self.console.warnings:
            results["warnings"] = self.console.warnings
        return record_of(
            self.options.command, _arguments(self.options), clock, self.source.packages, **self.facts, results=results
        )

    def moments(self, model: nn.Module, *, labels: str, **options: Any) -> Moments:
        assert self.data is not None
        return collect_moments(
            model, self.data, self.num_classes, labels=labels, progress=self.console.progress, **options
        )

    def accuracy(self, model: nn.Module) -> Tensor | None:
        """Of each class on the test data, if there is any."""
        return None if self.test is None else accuracy_per_class(model, self.test, self.num_classes)

    def names(self) -> list[str]:
        return self.class_names or [str(cls) for cls in range(self.num_classes)]

    def classes(self, wanted: list[str]) -> list[int]:
        """Indices of classes that are named, or given as indices."""
        names = self.names()
        found = []
        for name in wanted:
            if name in names:
                found.append(names.index(name))
            elif name.isascii() and name.isdigit() and int(name) < self.num_classes:
                found.append(int(name))
            else:
                known = f"names ({', '.join(names[:20])}) or " if self.class_names else ""
                raise InputError(f"--classes: must be {known}indices in 0..{self.num_classes - 1}, got {name!r}.")
        return list(dict.fromkeys(found))


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "command"}


# ---- model and data --------------------------------------------------------------------------------------------------


def prepared(options: argparse.Namespace, console: Console, *, rank: int = 0, ranks: int = 1, classes: int = 0) -> Job:
    """Loads the model and opens the data, and says what was not given but inferred.

    Args:
        classes: number of classes where neither an option nor data tells, such as that of given scores.

    Raises:
        InputError, FileNotFoundError: something is missing, damaged or does not fit.
    """
    torch.manual_seed(options.seed)
    device, dtype = _device(options.device, ranks), getattr(torch, options.dtype)
    source = open_model(options.model, pretrained=options.pretrained)
    if options.weights is not None:
        load_weights(source.model, options.weights)
    base = source.model.to(device, dtype)
    model = _with_recipes(base, options.recipe)

    known = _preprocessing(options, source.preprocessing)
    opened: dict[str, Any] = {}
    for argument in ("data", "test"):
        spec = getattr(options, argument, None)
        if spec is not None:
            opened[argument] = open_data(spec, f"--{argument}")
    names = options.class_names or source.class_names
    for argument, one in opened.items():
        if isinstance(one, Images):
            one.preprocessing = known
            how = number_classes(one, names, f"--{argument}")
            names = names or one.class_names
            if how:
                console.say(f"{argument}: {how}")
        elif any(getattr(options, name) is not None for name in IMAGE_OPTIONS):
            raise InputError(f"--{argument}: --size, --mean and --std are for folders and .npz files, not a factory.")

    example = _example(opened, known, dtype)
    logits = None if example is None else _trial(model, example, device)
    num_classes = options.num_classes or logits or classes
    if not num_classes:
        raise InputError("--num-classes: must be given where there is no data to run the model on.")
    if names is not None and len(names) != num_classes:
        where = "--class-names" if options.class_names else "--model" if source.class_names else "--data"
        raise InputError(
            f"{where}: must name each of the model's {num_classes} classes, names {len(names)}: "
            f"{some(names)}. --class-names or --num-classes says otherwise."
        )
    loaders: dict[str, Batches] = {}
    facts: dict[str, Any] = {}
    for argument, one in opened.items():
        if isinstance(one, Images):
            check_labels(one, num_classes, f"--{argument}")
        loaders[argument] = Batches(
            one,
            argument=f"--{argument}",
            batch_size=options.batch_size,
            workers=options.workers,
            dtype=dtype,
            limit_per_class=options.limit_per_class if argument == "data" else None,
            num_classes=num_classes,
            rank=rank,
            ranks=ranks,
        )
        facts[argument] = _described(getattr(options, argument), one, loaders[argument])
    parameters = count_parameters(model)
    _say_what_holds(console, options, parameters, num_classes, logits, opened, facts, known)
    return Job(
        options=options,
        console=console,
        source=source,
        base=base,
        model=model,
        num_classes=num_classes,
        class_names=names,
        data=loaders.get("data"),
        test=loaders.get("test"),
        example=None if example is None else moved(example, device),
        facts={
            "seed": options.seed,
            "device": str(device),
            "dtype": options.dtype,
            "ranks": ranks,
            "model": {
                "spec": options.model,
                "weights": options.weights,
                "recipes": options.recipe,
                "parameters": parameters,
                "classes": num_classes,
                "class_names": names,
            },
            "data": facts,
        },
    )


def _device(name: str, ranks: int) -> torch.device:
    """The device that --device names; under torchrun each rank's own GPU.

    Raises:
        InputError: there is none such.
    """
    here = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if here else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if name == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"--device: must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if not here:
        raise InputError(f"--device: torch finds no CUDA device, got {name!r}.")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0)
    elif ranks > 1:
        raise InputError(f"--device: must be cuda where there are several ranks, each has its own; got {name!r}.")
    if device.index >= torch.cuda.device_count():
        raise InputError(f"--device: there are {torch.cuda.device_count()} CUDA devices, got {str(device)!r}.")
    torch.cuda.set_device(device)
    return device


def _with_recipes(base: nn.Module, paths: list[Path]) -> nn.Module:
    if not paths:
        return base
    stack = Stack(base)
    for number, path in enumerate(paths, start=1):
        stack.push(f"{number}. {path}", Recipe.load(path))
    return stack.model


def _preprocessing(options: argparse.Namespace, known: Preprocessing) -> Preprocessing:
    """What the model's configuration says, and over it what the command line says."""
    given = {name: getattr(options, name) for name in IMAGE_OPTIONS if getattr(options, name) is not None}
    if ("mean" in given) != ("std" in given):
        raise InputError("--mean: goes together with --std, only one of them was given.")
    if "std" in given and not all(value > 0 for value in given["std"]):
        raise InputError(f"--std: must be above 0, got {given['std']}.")
    if "size" in given:
        given["resize"] = None
    return replace(known, **given)


def _example(opened: Mapping[str, Any], known: Preprocessing, dtype: torch.dtype) -> Any:
    """Inputs of one sample: of the data, or else random ones of the shape that is known; None where none is."""
    for argument, one in opened.items():
        batches = Batches(one, argument=f"--{argument}", batch_size=1, workers=0, dtype=dtype)
        try:
            batch = next(iter(batches), None)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--{argument}: cannot be read: {type(error).__name__}: {error}") from error
        if batch is None:
            raise InputError(f"--{argument}: must give at least one sample, it gives none.")
        inputs, _ = split(f"--{argument}", batch, 0, torch.device("cpu"), labels_needed=False)
        return chosen(inputs, torch.arange(1), samples_of("--data", inputs))
    if known.size is None or known.channels is None:
        return None
    return torch.randn(1, known.channels, *known.size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _trial(model: nn.Module, example: Any, device: torch.device) -> int:
    """Runs the model on one sample; the number of its logits."""
    shape = tuple(tensor.shape) if (tensor := first_tensor(example)) is not None else type(example).__name__
    try:
        with undisturbed(model):
            logits = first_tensor(call(model, moved(example, device)))
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"--model: cannot run on inputs of shape {shape}: {type(error).__name__}: {why}") from error
    if logits is None or logits.ndim != 2:
        found = type(logits).__name__ if logits is None else f"shape {tuple(logits.shape)}"
        raise InputError(f"--model: must give logits of shape (samples, classes) for {shape}, it gives {found}.")
    return logits.shape[1]


def _described(spec: str, source: Any, batches: Batches) -> dict[str, Any]:
    """Data as run.json names them."""
    found: dict[str, Any] = {"spec": spec, "samples_per_class": batches.per_class}
    if isinstance(source, Images):
        found["samples"] = sum(batches.per_class or [])
        found["preprocessing"] = asdict(source.preprocessing)
    return found


def _say_what_holds(
    console: Console,
    options: argparse.Namespace,
    parameters: int,
    num_classes: int,
    logits: int | None,
    opened: Mapping[str, Any],
    facts: Mapping[str, Any],
    known: Preprocessing,
) -> None:
    console.say(f"model: {options.model}: {parameters:,} parameters, {num_classes} classes")
    if logits is not None and logits != num_classes:
        console.say(f"model: gives {logits} logits; --num-classes {num_classes} holds for the labels")
    for argument, one in opened.items():
        if isinstance(one, Images):
            console.say(f"{argument}: {one.spec}: {facts[argument]['samples']:,} images")
        if getattr(one, "ignored", None):
            console.say(f"{argument}: {len(one.ignored)} files that are no images were passed over")
    if any(isinstance(one, Images) for one in opened.values()):
        size = "as they are" if known.size is None else " x ".join(map(str, known.size))
        scaled = "in [0, 1], not normalised" if known.mean is None else f"mean {known.mean}, std {known.std}"
        given = [f"--{name}" for name in IMAGE_OPTIONS if getattr(options, name) is not None]
        if known.source and len(given) < len(IMAGE_OPTIONS):
            given.append(known.source)
        console.say(
            f"images: size {size}, {scaled} (from {', '.join(given) or 'nothing: no option, no configuration'})"
        )


# ---- score -----------------------------------------------------------------------------------------------------------


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says."""
    try:
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE in the environment must be integers: {error}") from error
    return rank, size


@contextmanager
def process_group(size: int, device: torch.device, timeout: float) -> Iterator[None]:
    """A group of all ranks, if there are several.

    Raises:
        GroupError: another rank fails or does not answer in time.
    """
    if size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield
    except (OtherFailed, dist.DistError) as error:
        raise GroupError(str(error)) from error
    except RuntimeError as error:
        if any(mark in str(error).lower() for mark in GROUP_FAILURES):
            raise GroupError(str(error)) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def score_command(options: argparse.Namespace, console: Console) -> Result:
    clock = Clock()
    rank, size = ranks()
    console.rank = rank
    if options.checkpoint_every is not None and options.checkpoint is None:
        raise InputError("--checkpoint-every: needs --checkpoint, which was not given.")
    bound_options = _bound_options(options)
    with _run_folder(options, rank) as folder:
        job = prepared(options, console, rank=rank, ranks=size)
        device = device_of(job.model)
        _check_backend(options.backend, device)
        with process_group(size, device, options.timeout):
            parts = _collected(job, options, size)
        if rank:
            return {}, ""
        together = parts[0].rows(slice(None))
        for part in parts[1:]:
            together.merge(part)
        scores = score(
            parts if len(parts) > 1 else parts[0],
            bound=options.bound,
            witness=options.witness,
            pairs=options.pairs,
            backend=_backend_of_scores(options, device, console),
            **bound_options,
        )
        folder.clear()
        together.save(folder.file("moments.safetensors"))
        scores.save(folder.file("scores.safetensors"))
        record = job.record(
            clock,
            samples_per_class=scores.counts.tolist(),
            components=sum(map(len, scores.values())),
            settings=scores.settings,
            layers=_best(scores),
        )
        folder.finish(record)
    return record, _score_table(record, job.names(), folder.path)


def _bound_options(options: argparse.Namespace) -> dict[str, Any]:
    known = arguments.OPTIONS.get(options.bound, {})
    for name, _ in options.bound_option:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise InputError(f"--bound-option: --bound {options.bound} {takes}, got {name!r}.")
    return dict(options.bound_option)


def _check_backend(name: str, device: torch.device) -> None:
    for op in ("pool", "fold_moments") if name != "auto" else ():
        reason = backends.why_not(name, op, device)
        if reason:
            raise InputError(f"--backend: {name!r} cannot run: {reason}.")


def _backend_of_scores(options: argparse.Namespace, device: torch.device, console: Console) -> str:
    """The one asked for, where it can also compute bounds."""
    name: str = options.backend
    ops = ["one_vs_rest", "merge_moments", *(["pairwise_min", "pairwise_mean"] if options.pairs else [])]
    if name != "auto" and any(backends.why_not(name, op, device, bound=options.bound) for op in ops):
        console.say(f"scores: computed by auto, since {name} has no bounds of this kind")
        return "auto"
    return name


def _collected(job: Job, options: argparse.Namespace, size: int) -> list[Moments]:
    """Moments of all samples, or of each block of them."""
    statistic = options.statistic if len(options.statistic) > 1 else options.statistic[0]
    witness = options.witness or ("vector" if len(options.statistic) > 1 else "quadratic")
    if witness == "vector":
        statistic = list(options.statistic)
    arguments: dict[str, Any] = {
        "labels": options.labels,
        "layers": options.layers,
        "read": options.read,
        "statistic": statistic,
        "witness": witness,
        "scale": options.scale,
        "progress": job.console.progress,
        "backend": options.backend,
    }
    if size > 1:
        arguments["group"] = "world"
    if options.checkpoint is not None:
        arguments["checkpoint"] = options.checkpoint
        if options.checkpoint_every is not None:
            arguments["checkpoint_every"] = options.checkpoint_every
    if options.blocks is None:
        return [collect_moments(job.model, job.data or (), job.num_classes, **arguments)]
    return collect_blocks(job.model, job.data or (), job.num_classes, blocks=options.blocks, **arguments)


def _best(scores: Scores) -> dict[str, dict[str, Any]]:
    """Of each layer the component that tells a class best."""
    found: dict[str, dict[str, Any]] = {}
    for layer, values in scores.items():
        known = values.nan_to_num(nan=-1.0)
        if not known.numel():
            continue
        channel, cls = divmod(int(known.argmax()), values.shape[1])
        found[layer] = {
            "components": len(values),
            "mean_of_best": float(known.amax(1).mean()),
            "best": {"component": channel, "class": cls, "score": float(values[channel, cls])},
        }
        if scores.errors:
            found[layer]["best"]["standard_error"] = float(scores.standard_error()[layer][channel, cls])
    return found


def _score_table(record: Mapping[str, Any], names: list[str], out: Path) -> str:
    layers = record["results"]["layers"]
    width = max([len(layer) for layer in layers] + [5])
    lines = [f"{'layer':{width}}  components  mean of best  best score  of component  for class"]
    for layer, found in layers.items():
        best = found["best"]
        lines.append(
            f"{layer:{width}}  {found['components']:10}  {found['mean_of_best']:12.3f}  {best['score'] or 0:10.3f}  "
            f"{best['component']:12}  {names[best['class']]}"
        )
    return "\n".join([*lines, _written(record, out)])


# ---- prune and unlearn -----------------------------------------------------------------------------------------------


def prune_command(options: argparse.Namespace, console: Console) -> Result:
    clock = Clock()
    _only_one_rank(options)
    given = _given_scores(options)
    if options.data is None and options.rescore:
        raise InputError("--rescore: needs --data, which was not given.")
    with _run_folder(options) as folder:
        job = prepared(options, console, classes=0 if given is None else given.num_classes)
        if job.example is None:
            raise InputError("--data: must be given, or --size, for inputs that show what hangs on what.")
        scores = None
        if given is not None or options.method == "discedit" or options.criterion in OF_SCORES:
            scores = _scores_of(job, given, pairs=options.criterion in OVER_PAIRS)

        def rescore(model: nn.Module) -> Scores:
            return score(job.moments(model, labels=options.labels), pairs=options.criterion in OVER_PAIRS)

        budgets = {
            name: getattr(options, name) for name in ("ratio", "global_ratio", "threshold", "parameters", "macs")
        }
        edit = prune(
            job.model,
            scores,
            example_inputs=job.example,
            across=options.across,
            round_to=options.round_to,
            floor=options.floor,
            method=options.method,
            criterion=options.criterion,
            repair=options.repair,
            data=job.data,
            layers=options.layers,
            ignore=options.ignore,
            components=options.components,
            keep_outputs=not options.shrink_outputs,
            steps=options.steps,
            rescore=rescore if options.rescore else None,
            seed=options.seed,
            **budgets,
        )
        return _finished(job, folder, clock, edit, scores if given is None else None, {})


def unlearn_command(options: argparse.Namespace, console: Console) -> Result:
    clock = Clock()
    _only_one_rank(options)
    given = _given_scores(options)
    with _run_folder(options) as folder:
        job = prepared(options, console, classes=0 if given is None else given.num_classes)
        forget = job.classes(options.classes)
        console.say("classes: " + ", ".join(f"{cls} ({job.names()[cls]})" for cls in forget))
        scores = _scores_of(job, given, pairs=False)
        names = ("method", "fraction", "top", "deviations", "damage", "forget_accuracy", "retain_drop", "by", "sign",
                 "layers", "components", "factor", "around", "repair", "protection", "remove")  # fmt: skip
        edit = unlearn(
            job.model,
            scores,
            classes=forget,
            data=None if options.no_data else job.data,
            example_inputs=job.example,
            **{name: getattr(options, name) for name in names},
        )
        return _finished(job, folder, clock, edit, scores if given is None else None, {"classes": forget})


def _only_one_rank(options: argparse.Namespace) -> None:
    size = ranks()[1]
    if size > 1:
        raise InputError(f"{options.command} runs on one rank, torchrun started {size}: only score takes several.")


def _given_scores(options: argparse.Namespace) -> Scores | None:
    """Read before anything that takes long."""
    if options.scores is None:
        if options.data is None:
            raise InputError("--scores: must be given, or --data to compute them from.")
        return None
    path: Path = options.scores
    return Scores.load(path / "scores.safetensors" if path.is_dir() else path)


def _scores_of(job: Job, given: Scores | None, *, pairs: bool) -> Scores:
    scores = given or score(job.moments(job.model, labels=job.options.labels), pairs=pairs)
    if scores.num_classes != job.num_classes:
        raise InputError(f"--scores: must be of {job.num_classes} classes, they are of {scores.num_classes}.")
    return scores


def _finished(
    job: Job, folder: RunFolder, clock: Clock, edit: Edit, computed: Scores | None, extra: Mapping[str, Any]
) -> Result:
    """Measures, writes and tells what an edit did, and writes scores that were computed for it."""
    kind = job.options.command
    if not edit.recipe.operations:
        raise NothingChangedError("the edit changes nothing, so nothing was written.")
    example = job.example
    results: dict[str, Any] = dict(extra)
    for name, model in (("before", job.model), ("after", edit.model)):
        accuracy = job.accuracy(model)
        results[name] = {
            "parameters": count_parameters(model),
            "macs": None if example is None else count_macs(model, example),
            "accuracy": None if accuracy is None else accuracy.tolist(),
        }
    results["layers"] = {
        layer: {"edited": len(channels), "of": edit.widths.get(layer)}
        for layer, channels in edit.recipe.components.items()
    }
    results["skipped"] = edit.skipped
    results["settings"] = edit.recipe.settings
    folder.clear()
    if computed is not None:
        computed.save(folder.file("scores.safetensors"))
    for name in (f"{kind}.json", f"{kind}.values.safetensors"):
        path = folder.file(name)
    edit.recipe.save(path.with_name(f"{kind}.json"))
    _save_model(job, folder, edit)
    record = job.record(clock, **results)
    folder.finish(record)
    return record, "\n".join([edit.summary(), "", *_before_and_after(job, results), _written(record, folder.path)])


def _save_model(job: Job, folder: RunFolder, edit: Edit) -> None:
    """The weights; of a transformers model the folder that `--model hf:` takes."""
    if job.source.whole and not job.options.recipe:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.path) as temporary:
            huggingface.save_pretrained(edit, temporary)
            for path in sorted(Path(temporary).iterdir()):
                path.replace(folder.file(path.name))
        return
    state = edit.model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(state.items())}  # tied tensors under their first name
    weights = {name: state[name].detach().cpu().contiguous().clone() for name in reversed(once.values())}
    files.write_atomically(folder.file("model.safetensors"), format_tensors(weights))


def _before_and_after(job: Job, results: Mapping[str, Any]) -> list[str]:
    """Test accuracy by class."""
    before, after = results["before"]["accuracy"], results["after"]["accuracy"]
    if before is None:
        return ["accuracy: not measured, since there is no --test"]
    forgotten = results.get("classes", ())
    names = job.names()
    shown = [cls for cls in range(job.num_classes) if job.num_classes <= 20 or cls in forgotten]
    titles = {cls: names[cls] + (" (forgotten)" if cls in forgotten else "") for cls in shown}
    width = max([len(title) for title in titles.values()] + [len("mean of the others")])
    lines = [f"{'test accuracy, %':{width}}  {'before':>7}  {'after':>7}"]

    def row(title: str, classes: list[int]) -> None:
        cells = (torch.tensor(values, dtype=torch.float64)[classes].nanmean() for values in (before, after))
        lines.append(f"{title:{width}}" + "".join(f"  {100 * float(cell):7.2f}" for cell in cells))

    for cls, title in titles.items():
        row(title, [cls])
    row("mean of classes", list(range(job.num_classes)))
    if forgotten:
        row("mean of the others", [cls for cls in range(job.num_classes) if cls not in forgotten])
    return lines


# ---- evaluate --------------------------------------------------------------------------------------------------------


def evaluate_command(options: argparse.Namespace, console: Console) -> Result:
    clock = Clock()
    _only_one_rank(options)
    if options.recipe and options.original is not None:
        raise InputError("--original: must be left out with --recipe, whose original is the model without it.")
    with _run_folder(options) as folder:
        job = prepared(options, console)
        assert job.test is not None
        wanted = job.classes(options.classes) if options.classes else _forgotten(options.recipe)
        console.say("classes: " + ", ".join(f"{cls} ({job.names()[cls]})" for cls in wanted if cls < job.num_classes))
        others: dict[str, Any] = {"original": job.base if options.recipe else None, "retrained": None}
        for name in others:
            path = getattr(options, name)
            if path is not None:
                other = copy.deepcopy(job.base)
                load_weights(other, path, argument=f"--{name}")
                others[name] = other
        relearning = Relearning(options.learning_rate, max_steps=options.max_steps)
        tuned = [relearning] if {"all", "relearning"} & {*options.metrics} else []
        report = evaluate(
            job.model,
            classes=wanted,
            test=job.test,
            num_classes=job.num_classes,
            train=job.data,
            metrics=[*options.metrics, *tuned],
            features=options.features,
            seed=options.seed,
            **others,
        )
        folder.clear()
        record = job.record(clock, classes=wanted, evaluation=report.to_dict())
        folder.finish(record)
    return record, f"{report.table()}\n{_written(record, folder.path)}"


def _forgotten(paths: list[Path]) -> list[int]:
    """The classes that recipes of `unlearn` forget."""
    found: list[int] = []
    for path in paths:
        recipe = Recipe.load(path)
        if recipe.edit == "unlearn":
            found += [cls for cls in recipe.settings.get("classes", []) if isinstance(cls, int)]
    if not found:
        raise InputError("--classes: must be given, since no --recipe is of an unlearning that names them.")
    return list(dict.fromkeys(found))


# ---- report ----------------------------------------------------------------------------------------------------------


def report_command(options: argparse.Namespace, console: Console) -> Result:
    clock = Clock()
    _only_one_rank(options)
    runs = [load_run(path) for path in options.runs]
    titles = _titles([folder for folder, _ in runs])
    shown = [(title, folder, record) for title, (folder, record) in zip(titles, runs, strict=True)]
    scored = [(title, folder, record) for title, folder, record in shown if (folder / "scores.safetensors").is_file()]
    if not scored:
        raise NothingChangedError("none of the runs holds scores, so there is nothing to show.")
    scored.sort(key=lambda run: run[2]["command"] != "score")
    title, folder, record = scored[0]
    if len(scored) > 1:
        console.say(f"scores: of {title}; {len(scored) - 1} other runs hold scores too")
    moments_file = folder / "moments.safetensors"
    edits, accuracy, curve = _of_edits(shown)
    model = record.get("model")
    with _run_folder(options) as target:
        target.clear()
        page = target.file("report.html")
        written = report(
            page,
            Scores.load(folder / "scores.safetensors"),
            edits=edits or (),
            accuracy=accuracy or None,
            curve=curve or None,
            moments=Moments.load(moments_file) if moments_file.is_file() else None,
            class_names=model.get("class_names") if isinstance(model, dict) else None,
            title=options.title,
            settings={name: found["arguments"] for name, _, found in shown},
            pngs=options.pngs,
        )
        for path in written:
            if path != page:
                target.file(path.name)
        results = {"runs": {name: str(where) for name, where, _ in shown}, "warnings": console.warnings}
        result = record_of("report", _arguments(options), clock, (), seed=options.seed, data={}, results=results)
        target.finish(result)
    return result, _written(result, target.path)


def _titles(folders: list[Path]) -> list[str]:
    """The folders' names, with more of the path where these are not enough."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _of_edits(
    runs: list[tuple[str, Path, dict[str, Any]]],
) -> tuple[dict[str, Recipe], dict[str, Tensor], list[dict[str, Any]]]:
    """Recipes, accuracy by class and the points of a curve, of the runs that edited a model."""
    edits, accuracy, curve = {}, {}, []
    for title, folder, record in runs:
        kind, results = record["command"], record["results"]
        if kind not in ("prune", "unlearn"):
            continue
        edits[title] = Recipe.load(folder / f"{kind}.json")
        for name in ("before", "after"):
            found = files.field(results, name, dict, folder / "run.json")
            values = found.get("accuracy")
            if values is None:
                continue
            per_class = torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)
            if name == "after":
                accuracy[title] = per_class
            elif not record["arguments"].get("recipe"):  # else an edited model was edited further
                accuracy.setdefault("original", per_class)
            if kind == "prune":
                point = _point(record, name, per_class)
                if point not in curve:  # where nothing is pruned, all begin
                    curve.append(point)
    return edits, accuracy, curve


def _point(record: Mapping[str, Any], name: str, per_class: Tensor) -> dict[str, Any]:
    """Of a pruning, before or after; points of the same way to prune make a line."""
    results, ratio = record["results"], record["arguments"].get("ratio")
    settings = results.get("settings", {})
    point = {
        "title": ", ".join(str(settings[key]) for key in ("criterion", "repair") if key in settings) or "prune",
        "accuracy": float(per_class.nanmean()),
    }
    if name == "before" or isinstance(ratio, float):
        point["ratio"] = 0.0 if name == "before" else ratio
    for size in ("parameters", "macs"):
        whole, left = (results[which].get(size) for which in ("before", name))
        if whole and left is not None:
            point[size] = left / whole
    return point


# ---- what commands have in common ------------------------------------------------------------------------------------


@contextmanager
def _run_folder(options: argparse.Namespace, rank: int = 0) -> Iterator[RunFolder]:
    """The run folder, which other ranks than 0 only name."""
    folder = RunFolder(options.out, overwrite=options.overwrite, writes=rank == 0)
    try:
        yield folder
    except BaseException:
        folder.release()
        raise


def _written(record: Mapping[str, Any], out: Path) -> str:
    return f"written to {out}: {', '.join([*(file['name'] for file in record['files']), 'run.json'])}"


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], Result]] = {
    "score": score_command,
    "prune": prune_command,
    "unlearn": unlearn_command,
    "evaluate": evaluate_command,
    "report": report_command,
}
