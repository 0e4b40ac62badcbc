"""What the commands `score`, `prune`, `unlearn`, `evaluate` and `report` do with their options."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save as format_tensors
from torch import Tensor

from discedit import backends
from discedit.backends.arguments import asked
from discedit.cli import arguments
from discedit.cli.arguments import Options, chosen, command
from discedit.cli.errors import GroupError, InputError, NothingChangedError, explained
from discedit.cli.job import Job, accuracy_rows, prepare
from discedit.cli.models import load_weights
from discedit.cli.run_folder import Console, Result, RunFolder, load_run, record_of
from discedit.common import files
from discedit.common.tables import format_table
from discedit.editing import AblateComponents, EraseDirections, LeastSquares
from discedit.editing.prune import iterative_prune, prune
from discedit.editing.specialise import specialise
from discedit.editing.unlearn import METHODS, unlearn
from discedit.evaluation.evaluate import evaluate
from discedit.evaluation.relearning import Relearning
from discedit.integrations import huggingface
from discedit.model.forward import device_of
from discedit.model.size import count_macs, count_parameters
from discedit.moments.collect import collect_blocks, collect_moments
from discedit.moments.distributed import OtherFailed
from discedit.moments.moments import Moments
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.recipe import Edit, Recipe
from discedit.reporting.report import report
from discedit.scoring.scores import OVER_PAIRS, Scores, score
from discedit.selection import AboveDeviations, Limit, MaxDamage, MeasureDivergence, Random, TopFraction, TopK
from discedit.selection.budget import BUDGETS, AcrossLayers, Budget, MaxLatency
from discedit.selection.importance import OF_SCORES

GROUP_FAILURES = ("gloo", "nccl", "timed out", "connection", "peer")  # in messages of torch.distributed
LIMITS: dict[str, type[Limit]] = {kind.name: kind for kind in (TopFraction, TopK, AboveDeviations, MaxDamage)}
Run = tuple[str, Path, dict[str, Any]]  # title, folder and run.json


# ---- score -----------------------------------------------------------------------------------------------------------


@command(*arguments.SCORE)
def score_command(options: Options, console: Console) -> Result:
    """How well each component tells each class from the rest: one pass over the data."""
    if options.checkpoint_every is not None and options.checkpoint is None:
        raise InputError("--checkpoint-every: needs --checkpoint, which was not given.")
    with explained("--bound-option"):  # before the pass, not after it
        asked("score", options.bound, dict(options.bound_option), options.witness)
    job = prepare(options, console)
    device = device_of(job.model)
    for op in ("pool", "fold_moments") if options.backend != "auto" else ():
        if reason := backends.why_not(options.backend, op, device):
            raise InputError(f"--backend: {options.backend!r} cannot run: {reason}.")
    with _process_group(console.ranks, device, options.timeout):
        blocks = _collect(job)
    if console.rank:
        return {}, ""
    together = blocks[0].rows(slice(None))
    for block in blocks[1:]:
        together.merge(block)
    scores = score(
        blocks,
        backend=_backend_of_scores(options, device, console),
        **chosen(options, "bound", "witness", "pairs"),
        **dict(options.bound_option),
    )
    together.save(job.folder.file("moments.safetensors"))
    scores.save(job.folder.file("scores.safetensors"))
    layers = _best(scores)
    return job.finish(
        _score_table(layers, job.names()),
        samples_per_class=scores.counts.tolist(),
        components=sum(map(len, scores.values())),
        settings=scores.settings,
        layers=layers,
    )


@contextmanager
def _process_group(size: int, device: torch.device, timeout: float) -> Iterator[None]:
    """A group of all ranks, if there are several."""
    if size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield
    except (OtherFailed, RuntimeError) as error:
        # gloo and NCCL raise plain RuntimeErrors too, which their words alone tell from a bug.
        known = isinstance(error, (OtherFailed, dist.DistError))
        if known or any(mark in str(error).lower() for mark in GROUP_FAILURES):
            raise GroupError(f"another process of the group failed or is late: {error}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _collect(job: Job) -> list[Moments]:
    """Moments of all samples, or of each block of them."""
    options = job.options
    several = len(options.statistic) > 1
    settings: dict[str, Any] = {"witness": "vector" if several else "quadratic"}
    settings["group"] = "world" if job.console.ranks > 1 else None
    names = ("witness", "labels", "layers", "read", "scale", "backend", "checkpoint", "checkpoint_every")
    settings |= {**chosen(options, *names), "progress": job.console.progress}
    settings["statistic"] = options.statistic[slice(None) if several or settings["witness"] == "vector" else 0]
    if options.blocks is None:
        return [collect_moments(job.model, job.data or (), job.num_classes, **settings)]
    return collect_blocks(job.model, job.data or (), job.num_classes, blocks=options.blocks, **settings)


def _backend_of_scores(options: Options, device: torch.device, console: Console) -> str:
    """The one asked for, where it can also compute bounds."""
    name: str = options.backend
    ops = ["one_vs_rest", "merge_moments", *(["pairwise_min", "pairwise_mean"] if options.pairs else [])]
    if name != "auto" and any(backends.why_not(name, op, device, bound=options.bound) for op in ops):
        console.say(f"scores: computed by auto, since {name} has no bounds of this kind")
        return "auto"
    return name


def _best(scores: Scores) -> dict[str, dict[str, Any]]:
    """Of each layer the component that tells a class best."""
    found: dict[str, dict[str, Any]] = {}
    errors = scores.standard_error() if scores.errors else {}
    for layer, values in scores.items():
        known = values.nan_to_num(nan=-1.0)
        if not known.numel():
            continue
        channel, cls = divmod(int(known.argmax()), values.shape[1])
        best = {"component": channel, "class": cls, "score": float(values[channel, cls])}
        if layer in errors:
            best["standard_error"] = float(errors[layer][channel, cls])
        found[layer] = {"components": len(values), "mean_of_best": float(known.amax(1).mean()), "best": best}
    return found


def _score_table(layers: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = [("layer", "components", "mean of best", "best score", "of component", "for class")]
    for layer, found in layers.items():
        best, numbers = found["best"], [f"{value:.3f}" for value in (found["mean_of_best"], found["best"]["score"])]
        rows.append((layer, found["components"], *numbers, best["component"], names[best["class"]]))
    return format_table(rows, left=(0, 5))


# ---- prune and unlearn -----------------------------------------------------------------------------------------------


@command(*arguments.PRUNE)
def prune_command(options: Options, console: Console) -> Result:
    """Remove the least important components and repair what is left.

    Exactly one budget: --ratio, --global-ratio, --threshold, --parameters, --macs or --latency. With --classes the
    model is pruned for these alone, and gives all others the logit -1e4.
    """
    if options.classes and (options.scores is not None or options.data is None):
        raise InputError("--classes: needs --data, of which scores are made where a criterion wants them.")
    given = _given_scores(options)
    if options.data is None and options.rescore:
        raise InputError("--rescore: needs --data, which was not given.")
    budget = _budget(options, console)
    job = prepare(options, console, classes=given.num_classes if given else 0)
    if job.example is None:
        raise InputError("--data: must be given, or --size, for inputs that show what hangs on what.")
    pairs = options.criterion in OVER_PAIRS
    classes = job.classes(options.classes) if options.classes else []
    needed = given is not None or options.criterion in (OF_SCORES if classes else ("auto", *OF_SCORES))
    scores = _scores_of(job, given, pairs=pairs) if needed and not classes else None
    settings = chosen(options, "criterion", "repair", "layers", "components", "ignore")
    if options.criterion == "random":
        settings["criterion"] = Random(options.seed)
    settings |= {"example_inputs": job.example, "data": job.data, "budget": budget}
    if options.protect:
        settings["protect"] = job.protected(options.protect)
    if classes:
        of_classes = score(job.moments(job.model).of_classes(classes), pairs=pairs) if needed else None
        settings |= {"steps": options.steps} if options.steps > 1 else {}
        edit = specialise(job.model, of_classes, classes=classes, head="mask", **settings)
        others = [cls for cls in range(job.num_classes) if cls not in classes]
        return _finish(job, edit, None, apart={"left out": others}, classes=classes)
    if options.rescore:
        settings["rescore"] = lambda model: score(job.moments(model), pairs=pairs)
    if options.rescore or options.steps > 1:
        edit = iterative_prune(job.model, scores, steps=options.steps, **settings)
    else:
        edit = prune(job.model, scores, **settings)
    return _finish(job, edit, scores if given is None else None)


def _budget(options: Options, console: Console) -> Budget:
    given = chosen(options, *BUDGETS)
    if len(given) != 1:
        found = ", ".join(f"--{name}" for name in given).replace("_", "-") or "none"
        raise InputError(f"--ratio: exactly one budget must be given, got {found}.")
    [(name, value)] = given.items()
    kind, limits = BUDGETS[name], {"floor": options.floor, "round_to": options.round_to}
    if not issubclass(kind, AcrossLayers):
        return kind(value, **limits)
    across: Any = options.across
    if isinstance(across, Path):
        across = DivergenceTable.load(across)
    elif across == "divergence" or (across == "auto" and options.data and options.repair in ("auto", "least_squares")):
        across = MeasureDivergence(trials=options.trials, progress=console.progress)
    if options.trials and not isinstance(across, MeasureDivergence):
        raise InputError("--trials: goes with --across divergence, which needs --data.")
    if issubclass(kind, MaxLatency):
        return kind(value, across=across, **limits, progress=console.progress)
    return kind(value, across=across, **limits)


@command(*arguments.UNLEARN)
def unlearn_command(options: Options, console: Console) -> Result:
    """Edit the model so that it no longer recognises some classes.

    At most one limit: --fraction, --top, --deviations, --damage, or --forget-accuracy and --retain-drop.
    """
    given = _given_scores(options)
    method = _method(options)
    job = prepare(options, console, classes=given.num_classes if given else 0)
    forget = job.classes(options.classes)
    console.say("classes: " + ", ".join(f"{cls} ({job.names()[cls]})" for cls in forget))
    scores = _scores_of(job, given, pairs=False)
    edit = unlearn(
        job.model,
        scores,
        classes=forget,
        method=method,
        data=None if options.no_data else job.data,
        example_inputs=job.example,
        **chosen(options, "forget_accuracy", "retain_drop", "layers"),
    )
    return _finish(job, edit, scores if given is None else None, apart={"forgotten": forget}, classes=forget)


def _method(options: Options) -> str | EraseDirections | AblateComponents:
    """The way of unlearning, of the options that are given."""
    given = chosen(options, *(str(option.name) for option in arguments.METHOD))
    if options.method == "auto":
        for name in given:
            raise InputError(f"--{name}: goes with a --method that is named.")
        return "auto"
    limits = [name for name in LIMITS if name in given]
    if len(limits) > 1:
        raise InputError(f"--{limits[0]}: one limit may be given, got {' and '.join(f'--{name}' for name in limits)}.")
    for name in limits:
        given["limit"] = LIMITS[name](given.pop(name))
    if "protection" in given:
        if given.get("repair") != "least_squares":
            raise InputError("--protection: goes with --repair least_squares.")
        given["repair"] = LeastSquares(given.pop("protection"))
    kind: type[EraseDirections] | type[AblateComponents] = METHODS[options.method]
    for name in given.keys() - {field.name for field in fields(kind)}:
        raise InputError(f"--{limits[0] if name == 'limit' else name}: does not go with --method {options.method}.")
    return kind(**given)


def _given_scores(options: Options) -> Scores | None:
    """Read before anything that takes long."""
    if options.scores is not None:
        path: Path = options.scores
        return Scores.load(path / "scores.safetensors" if path.is_dir() else path)
    if options.data is None:
        raise InputError("--scores: must be given, or --data to compute them from.")
    return None


def _scores_of(job: Job, given: Scores | None, *, pairs: bool) -> Scores:
    scores = given or score(job.moments(job.model), pairs=pairs)
    if scores.num_classes != job.num_classes:
        raise InputError(f"--scores: must be of {job.num_classes} classes, they are of {scores.num_classes}.")
    return scores


def _finish(
    job: Job, edit: Edit, computed: Scores | None, *, apart: Mapping[str, list[int]] | None = None, **results: Any
) -> Result:
    """Measures, writes and tells what an edit did, and writes scores that were computed for it.

    Args:
        apart: what became of some classes, in words -> which; their accuracy is told apart.
    """
    kind, folder = job.console.command, job.folder
    if not edit.recipe.operations:
        raise NothingChangedError("the edit changes nothing, so nothing was written.")
    columns: dict[str, list[float]] = {}
    for name, model in (("before", job.model), ("after", edit.model)):
        accuracy = job.accuracy(model)
        macs = None if job.example is None else count_macs(model, job.example)
        results[name] = {"parameters": count_parameters(model), "macs": macs, "accuracy": None}
        if accuracy is not None:
            columns[name] = results[name]["accuracy"] = accuracy.tolist()
    results["layers"] = {
        layer: {"edited": len(channels), "of": edit.widths.get(layer)}
        for layer, channels in edit.recipe.components.items()
    }
    results |= {"skipped": edit.skipped, "settings": edit.recipe.settings}
    if computed is not None:
        computed.save(folder.file("scores.safetensors"))
    if edit.divergences is not None:
        edit.divergences.save(folder.file("divergences.safetensors"))
    if edit.latencies is not None:
        edit.latencies.save(folder.file("latencies.safetensors"))
        results["latency"] = {"before": edit.latency_before, "after": edit.latency_after}
    edit.recipe.save(folder.file(f"{kind}.json"))
    folder.file(f"{kind}.values.safetensors")
    _save_model(job, edit)
    measured = "accuracy: not measured, since there is no --test"
    if columns:
        measured = format_table(accuracy_rows(columns, job.names(), apart or {}))
    return job.finish(f"{edit.summary()}\n\n{measured}", **results)


def _save_model(job: Job, edit: Edit) -> None:
    """The weights; of a transformers model the folder that `--model hf:` takes."""
    if job.source.whole and not job.options.recipe:
        # Whole first and then renamed, so that a run that is stopped leaves no half of a model under its names.
        with tempfile.TemporaryDirectory(prefix=".", dir=job.folder.path) as temporary:
            huggingface.save_pretrained(edit, temporary)
            for path in sorted(Path(temporary).iterdir()):
                path.replace(job.folder.file(path.name))
        return
    state = edit.model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(state.items())}  # tied tensors under their first name
    # Cloned, as safetensors refuses tensors that share memory.
    weights = {name: state[name].detach().cpu().contiguous().clone() for name in reversed(once.values())}
    files.write_atomically(job.folder.file("model.safetensors"), format_tensors(weights))


# ---- evaluate --------------------------------------------------------------------------------------------------------


@command(*arguments.EVALUATE)
def evaluate_command(options: Options, console: Console) -> Result:
    """What an edited model still knows of the classes it should have forgotten."""
    if options.recipe and options.original is not None:
        raise InputError("--original: must be left out with --recipe, whose original is the model without it.")
    job = prepare(options, console)
    wanted = job.classes(options.classes) if options.classes else _forgotten(options.recipe)
    console.say("classes: " + ", ".join(f"{cls} ({job.names()[cls]})" for cls in wanted if cls < job.num_classes))
    others: dict[str, Any] = {"original": job.base if options.recipe else None}
    for name, path in chosen(options, "original", "retrained").items():
        others[name] = copy.deepcopy(job.base)
        load_weights(others[name], path, argument=f"--{name}")
    relearning = Relearning(options.learning_rate, max_steps=options.max_steps)
    tuned = [relearning] if {"all", "relearning"} & {*options.metrics} else []
    found = evaluate(
        job.model,
        classes=wanted,
        test=job.test or (),
        num_classes=job.num_classes,
        train=job.data,
        metrics=[*options.metrics, *tuned],
        features=options.features,
        seed=options.seed,
        **others,
    )
    return job.finish(found.table(), classes=wanted, evaluation=found.to_dict())


def _forgotten(paths: Sequence[Path]) -> list[int]:
    """The classes that recipes of `unlearn` forget."""
    recipes = [recipe for recipe in map(Recipe.load, paths) if recipe.edit == "unlearn"]
    found = [cls for recipe in recipes for cls in recipe.settings.get("classes", []) if isinstance(cls, int)]
    if not found:
        raise InputError("--classes: must be given, since no --recipe is of an unlearning that names them.")
    return list(dict.fromkeys(found))


# ---- report ----------------------------------------------------------------------------------------------------------


@command(
    click.Argument(["runs"], nargs=-1, required=True, type=arguments.EXISTING),
    arguments.option("--title", help="heading of the page"),
    arguments.out("report"),
    *arguments.RUN,
)
def report_command(options: Options, console: Console) -> Result:
    """One HTML page from run folders of score, prune and unlearn."""
    folders, records = zip(*map(load_run, options.runs), strict=True)
    names = [folder.resolve().name for folder in folders]
    titles = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs: list[Run] = list(zip(titles, folders, records, strict=True))
    scored = [run for run in runs if (run[1] / "scores.safetensors").is_file()]
    if not scored:
        raise NothingChangedError("none of the runs holds scores, so there is nothing to show.")
    title, folder, record = min(scored, key=lambda run: run[2]["command"] != "score")
    if len(scored) > 1:
        console.say(f"scores: of {title}; {len(scored) - 1} other runs hold scores too")
    edits, accuracy, curve = _of_edits(runs)
    model = record.get("model")
    target = RunFolder(options, console)
    report(
        target.file("report.html"),
        Scores.load(folder / "scores.safetensors"),
        edits=edits,
        accuracy=accuracy or None,
        curve=curve or None,
        class_names=model.get("class_names") if isinstance(model, dict) else None,
        title=options.title,
        settings={name: found["arguments"] for name, _, found in runs},
    )
    results = {"runs": {name: str(where) for name, where, _ in runs}}
    return target.finish(record_of(console, options, (), seed=options.seed, data={}, results=results))


def _of_edits(runs: Sequence[Run]) -> tuple[dict[str, Recipe], dict[str, Tensor], list[dict[str, Any]]]:
    """Recipes, accuracy by class and the points of a curve, of the runs that edited a model."""
    edits, accuracy, curve = {}, {}, []
    for title, folder, record in runs:
        kind, results = record["command"], record["results"]
        if kind not in ("prune", "unlearn"):
            continue
        edits[title] = Recipe.load(folder / f"{kind}.json")
        for name in ("before", "after"):
            values = files.field(results, name, dict, folder / "run.json").get("accuracy")
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
    title = ", ".join(str(settings[key]) for key in ("criterion", "repair") if key in settings) or "prune"
    point = {"title": title, "accuracy": float(per_class.nanmean())}
    if name == "before" or isinstance(ratio, float):
        point["ratio"] = 0.0 if name == "before" else ratio
    for size in ("parameters", "macs"):
        whole, left = (results[which].get(size) for which in ("before", name))
        if whole and left is not None:
            point[size] = left / whole
    return point
