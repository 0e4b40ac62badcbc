"""What the commands work on: a model and data that fit together, and what was not given but inferred."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discedit.cli.arguments import Options, chosen
from discedit.cli.data import CPU, Images, make_loader, number_classes, open_data, times
from discedit.cli.errors import InputError, explained
from discedit.cli.models import ModelSource, Preprocessing, load_weights, open_model, some
from discedit.cli.run_folder import Console, Result, RunFolder, record_of
from discedit.model.forward import call, first_tensor, frozen_eval, index_samples, to_device, unpack_batch
from discedit.model.size import accuracy_per_class, count_parameters
from discedit.moments.calibration import batch_size_of
from discedit.moments.collect import collect_moments
from discedit.moments.moments import Moments
from discedit.recipes.recipe import Recipe

IMAGE_OPTIONS = ("size", "mean", "std")


@dataclass
class Job:
    """A model with the data that a command works on."""

    options: Options
    console: Console
    folder: RunFolder
    source: ModelSource
    base: nn.Module  # before the recipes
    model: nn.Module  # with them
    num_classes: int
    class_names: list[str] | None
    data: Iterable[Any] | None
    test: Iterable[Any] | None
    example: Any  # inputs of one sample; None where there is nothing to tell their shape
    facts: dict[str, Any]

    def finish(self, text: str, **results: Any) -> Result:
        record = record_of(self.console, self.options, self.source.packages, **self.facts, results=results)
        return self.folder.finish(record, text)

    def moments(self, model: nn.Module) -> Moments:
        assert self.data is not None
        progress, labels = self.console.progress, self.options.labels
        return collect_moments(model, self.data, self.num_classes, labels=labels, progress=progress)

    def accuracy(self, model: nn.Module) -> Tensor | None:
        """Of each class on the test data, if there is any."""
        return None if self.test is None else accuracy_per_class(model, self.test, self.num_classes)

    def names(self) -> list[str]:
        return self.class_names or [str(cls) for cls in range(self.num_classes)]

    def protected(self, wanted: Mapping[str, float]) -> dict[int, float]:
        """Of --protect, by index."""
        return {cls: weight for name, weight in wanted.items() for cls in self.classes([name], "--protect")}

    def classes(self, wanted: Iterable[str], argument: str = "--classes") -> list[int]:
        """Indices of classes that are named, or given as indices."""
        names = self.names()
        found = []
        for name in wanted:
            if name not in names and not (name.isascii() and name.isdigit() and int(name) < self.num_classes):
                known = f"names ({', '.join(names[:20])}) or " if self.class_names else ""
                raise InputError(f"{argument}: must be {known}indices in 0..{self.num_classes - 1}, got {name!r}.")
            found.append(names.index(name) if name in names else int(name))
        return list(dict.fromkeys(found))


def prepare(options: Options, console: Console, *, classes: int = 0) -> Job:
    """Loads the model and opens the data, and says what was not given but inferred.

    `classes` is their number where neither an option nor data tells, such as that of given scores.
    """
    rank, ranks = console.rank, console.ranks
    folder = RunFolder(options, console)
    # Before the model is made: a factory may draw weights that no file replaces.
    torch.manual_seed(options.seed)
    device, dtype = _device(options.device, ranks), getattr(torch, options.dtype)
    source = open_model(options.model, pretrained=options.pretrained)
    if options.weights is not None:
        load_weights(source.model, options.weights)
    base = source.model.to(device, dtype)
    model = _with_recipes(base, options.recipe)
    known = _preprocessing(options, source.preprocessing)
    opened, names = _open(options, known, options.class_names or source.class_names, console)
    example = _example(opened, known, dtype)
    logits = None if example is None else _count_logits(model, example, device)
    num_classes = options.num_classes or logits or classes
    _check_classes(num_classes, names, opened)
    parameters = count_parameters(model)
    console.say(f"model: {options.model}: {parameters:,} parameters, {num_classes} classes")
    if logits not in (None, num_classes):
        console.say(f"model: gives {logits} logits; --num-classes {num_classes} holds for the labels")
    loaders, about_data = {}, {}
    for argument, data in opened.items():
        limit = options.limit_per_class if argument == "data" else None
        loaders[argument] = make_loader(
            data, argument=f"--{argument}", dtype=dtype, batch_size=options.batch_size, workers=options.workers,
            limit_per_class=limit, num_classes=num_classes, rank=rank, ranks=ranks,
        )  # fmt: skip
        about_data[argument] = _facts(getattr(options, argument), data, limit, num_classes, console)
    if any(isinstance(data, Images) for data in opened.values()):
        console.say(f"images: {_told(options, known)}")
    about_model = {
        "spec": options.model, "weights": options.weights, "recipes": options.recipe, "parameters": parameters,
        "classes": num_classes, "class_names": names,
    }  # fmt: skip
    about = {"seed": options.seed, "device": str(device), "dtype": options.dtype, "ranks": ranks}
    return Job(
        options, console, folder, source, base, model, num_classes, names,
        data=loaders.get("data"),
        test=loaders.get("test"),
        example=None if example is None else to_device(example, device),
        facts={**about, "model": about_model, "data": about_data},
    )  # fmt: skip


def _device(name: str, ranks: int) -> torch.device:
    """The device that --device names; under torchrun each rank's own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0') if ranks > 1 else 0}"
    elif name != "cpu" and ranks > 1:
        raise InputError(f"--device: must be cuda where there are several ranks, each has its own; got {name!r}.")
    with explained(f"--device: {name!r} cannot be used"):
        device = torch.device(name)
        if device.type == "cuda":
            if device.index >= (found := torch.cuda.device_count()):
                raise InputError(f"--device: torch finds {found} CUDA devices, got {name!r}.")
            # What means "cuda" without a number takes the current device: what processes exchange, for one.
            torch.cuda.set_device(device)
    return device


def _with_recipes(model: nn.Module, paths: Sequence[Path]) -> nn.Module:
    """Each edits what the one before leaves."""
    for path in paths:
        try:
            model = Recipe.load(path).apply(model).model
        except ValueError as error:
            raise InputError(f"--recipe: {str(path)!r} cannot be applied: {error}") from error
    return model


def _preprocessing(options: Options, known: Preprocessing) -> Preprocessing:
    """What the model's configuration says, and over it what the command line says."""
    given = chosen(options, *IMAGE_OPTIONS)
    if ("mean" in given) != ("std" in given):
        raise InputError("--mean: goes together with --std, only one of them was given.")
    if "size" in given:
        given["resize"] = None
    return replace(known, **given)


def _open(
    options: Options, known: Preprocessing, names: list[str] | None, console: Console
) -> tuple[dict[str, Any], list[str] | None]:
    """The data of --data and --test, and the names of the classes, as far as they or the arguments tell."""
    opened: dict[str, Any] = {}
    for argument in ("data", "test"):
        spec = getattr(options, argument, None)
        if spec is None:
            continue
        opened[argument] = data = open_data(spec, f"--{argument}")
        if isinstance(data, Images):
            data.preprocessing = known
            how = number_classes(data, names)
            names = names or data.class_names
            if how:
                console.say(f"{argument}: {how}")
        elif chosen(options, *IMAGE_OPTIONS):
            raise InputError(f"--{argument}: --size, --mean and --std are for folders and .npz files, not a factory.")
    return opened, names


def _example(opened: Mapping[str, Any], known: Preprocessing, dtype: torch.dtype) -> Any:
    """Inputs of one sample: of the data, or else random ones of the shape that is known; None where none is."""
    for argument, data in opened.items():
        with explained(f"--{argument}: cannot be read"):
            batch = next(iter(make_loader(data, argument=f"--{argument}", dtype=dtype)), None)
        if batch is None:
            raise InputError(f"--{argument}: must give at least one sample, it gives none.")
        inputs, _ = unpack_batch(f"--{argument}", batch, 0, CPU, labels_needed=False)
        return index_samples(inputs, torch.arange(1), batch_size_of(f"--{argument}", inputs))
    if known.size is None or known.channels is None:
        return None
    return torch.randn(1, known.channels, *known.size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _count_logits(model: nn.Module, example: Any, device: torch.device) -> int:
    """Runs the model on one sample."""
    shape = tuple(tensor.shape) if (tensor := first_tensor(example)) is not None else type(example).__name__
    with explained(f"--model: cannot run on inputs of shape {shape}"), frozen_eval(model):
        logits = first_tensor(call(model, to_device(example, device)))
    if logits is None or logits.ndim != 2:
        found = type(logits).__name__ if logits is None else f"shape {tuple(logits.shape)}"
        raise InputError(f"--model: must give logits of shape (samples, classes) for {shape}, it gives {found}.")
    return logits.shape[1]


def _check_classes(num_classes: int, names: list[str] | None, opened: Mapping[str, Any]) -> None:
    if not num_classes:
        raise InputError("--num-classes: must be given where there is no data to run the model on.")
    if names is not None and len(names) != num_classes:
        raise InputError(
            f"--class-names: must name each of the model's {num_classes} classes, --class-names, the model or the data "
            f"names {len(names)}: {some(names)}. --class-names or --num-classes says otherwise."
        )
    for data in opened.values():
        if isinstance(data, Images) and int(data.labels.max()) >= num_classes:
            index = int((data.labels >= num_classes).nonzero()[0])
            raise InputError(
                f"{data.argument}: labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), "
                f"{data.name(index)} has {int(data.labels[index])}."
            )


def _facts(spec: str, data: Any, limit: int | None, num_classes: int, console: Console) -> dict[str, Any]:
    """Data as run.json names them."""
    if not isinstance(data, Images):
        return {"spec": spec, "samples_per_class": None}
    counts = torch.bincount(data.labels[data.first_of_each_class(limit)], minlength=num_classes)
    samples = int(counts.sum())
    ignored = f"; {data.ignored} files that are none were passed over" if data.ignored else ""
    console.say(f"{data.argument.removeprefix('--')}: {data.spec}: {samples:,} images{ignored}")
    preprocessing = asdict(data.preprocessing)
    return {
        "spec": spec, "samples_per_class": counts.tolist(), "samples": samples, "preprocessing": preprocessing,
    }  # fmt: skip


def _told(options: Options, known: Preprocessing) -> str:
    """What is done to images, and where that is known from."""
    size = "as they are" if known.size is None else times(known.size)
    scaled = "in [0, 1], not normalised" if known.mean is None else f"mean {known.mean}, std {known.std}"
    given = [f"--{name}" for name in chosen(options, *IMAGE_OPTIONS)]
    if known.source and len(given) < len(IMAGE_OPTIONS):
        given.append(known.source)
    return f"size {size}, {scaled} (from {', '.join(given) or 'nothing: no option, no configuration'})"


def accuracy_rows(
    columns: Mapping[str, Sequence[float]], names: Sequence[str], apart: Mapping[str, Collection[int]]
) -> list[list[str]]:
    """Accuracy by class of several models, in percent, and the means of all classes and of those to be kept.

    Args:
        apart: what became of some classes, in words -> which.
    """
    words = {cls: word for word, classes in apart.items() for cls in classes}
    rows: list[list[str]] = [["test accuracy, %", *columns]]

    def row(title: str, classes: Sequence[int]) -> None:
        means = [torch.tensor(shares, dtype=torch.float64)[list(classes)].nanmean() for shares in columns.values()]
        rows.append([title, *(f"{100 * float(mean):.2f}" for mean in means)])

    for cls, name in enumerate(names):
        if len(names) <= 20 or cls in words:
            row(f"{name} ({words[cls]})" if cls in words else name, [cls])
    row("mean of classes", range(len(names)))
    if words:
        row("mean of the others", [cls for cls in range(len(names)) if cls not in words])
    return rows
