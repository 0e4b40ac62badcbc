"""`report`: scores, edits and what they did to a model, as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discedit.common import files, validation
from discedit.recipes.recipe import Edit, Recipe
from discedit.reporting import sections
from discedit.scoring.scores import Scores

if TYPE_CHECKING:
    from jinja2 import Template

OP = "report"
GIVEN: dict[str, tuple[tuple[type, ...], str]] = {  # argument -> its types and what they are called
    "path": ((str, os.PathLike), "a path"),
    "scores": ((Scores,), "a discedit.Scores"),
    "edits": ((Mapping,), "a mapping of titles to edits"),
    "accuracy": ((Mapping,), "a mapping of titles to accuracies"),
    "curve": ((Sequence,), "a list of points"),
    "class_names": ((Sequence,), "a list of names"),
    "settings": ((Mapping,), "a mapping of names to settings"),
}
POINT = ("title", "accuracy", "parameters", "macs", "ratio")


def report(
    path: str | os.PathLike[str],
    scores: Scores,
    *,
    edits: Mapping[str, Edit | Recipe] | None = None,
    accuracy: Mapping[str, Tensor] | None = None,
    curve: Sequence[Mapping[str, Any]] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML page about scores, and about edits, accuracies and settings where they are given.

    It holds all that it shows: no script, nothing from the network. Names, titles and settings are text in it, whatever
    they look like. Of more than 40 classes, or 128 components of a layer, groups are shown. The same arguments give the
    same bytes.

    Args:
        path: of the page, ending in ".html"; its folder is made where it is missing.
        scores: what `discedit.score` gave.
        edits: title -> `Edit`, or the `Recipe` of one, which does not know costs and skipped layers.
        accuracy: title -> accuracy by class, shape (classes,), in [0, 1], NaN for a class without samples. The first is
            what the others are compared with. Where the title of an edit comes back here, that edit says which classes
            were to be forgotten; elsewhere all edits together.
        curve: points of trade-offs: mappings with "title" (points that share one make a line), "accuracy" and at least
            one of "parameters" and "macs", the shares that are left, all in [0, 1]; "ratio" where there is one.
        class_names: one name per class; by default "class 0" and so on.
        title: of the page.
        settings: anything that JSON has (versions, seeds, arguments), as a table at the end.

    Returns:
        The path of the page.

    Raises:
        TypeError: an argument of another type.
        ValueError: a path with another ending, no layers, names or accuracies that do not fit the scores, accuracies or
            shares outside [0, 1], or settings that JSON does not have. Nothing is then written.

    >>> import tempfile, torch, discedit
    >>> moments = discedit.Moments(2)
    >>> moments.update("conv", torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]), torch.arange(4) // 2)
    >>> folder = tempfile.TemporaryDirectory()
    >>> page = discedit.report(f"{folder.name}/page.html", discedit.score(moments), class_names=["cat", "dog"])
    >>> "What tells the classes apart" in page.read_text()
    True
    >>> folder.cleanup()
    """
    edits, accuracy, curve = edits or {}, accuracy or {}, curve or ()
    given: dict[str, Any] = {"path": path, "scores": scores, "edits": edits, "accuracy": accuracy, "curve": curve}
    given |= {"class_names": class_names or (), "settings": {} if settings is None else settings}
    for argument, value in given.items():
        validation.instance(OP, argument, value, *GIVEN[argument])
    for name, made in edits.items():
        validation.instance(OP, f"edits[{name!r}]", made, (Edit, Recipe), "a discedit.Edit or a discedit.Recipe")
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{OP}: path must end in .html, got {str(target)!r}.")
    if not scores:
        raise ValueError(f"{OP}: scores must hold at least one layer, it is empty.")
    count = scores.num_classes
    if class_names is None:
        class_names = [f"class {k}" for k in range(count)]
    if isinstance(class_names, str) or len(class_names) != count:
        raise ValueError(f"{OP}: class_names must name {count} classes, got {class_names!r}.")
    names = sections.Names(scores, class_names)
    shares = {title: _shares(f"accuracy[{title!r}]", values, count) for title, values in accuracy.items()}
    for i, point in enumerate(curve):
        _check_point(f"curve[{i}]", point)
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{OP}: settings must be what JSON has, got {settings!r}: {error}") from error
    page = _template().render(
        title=title or "What tells the classes apart",
        about=sections.about(scores),
        heat=sections.heat(scores, names),
        edits=[sections.edit(name, made, scores, names) for name, made in edits.items()],
        accuracy=sections.accuracy(shares, edits, names) if shares else None,
        curve=sections.curve(curve) if curve else None,
        classes=sections.classes(scores, names),
        settings=None if settings is None else sections.table(settings),
    )
    # A lone surrogate, as in file names that are no text, has no bytes of its own.
    files.write_atomically(target, page.encode("utf-8", "replace"))
    return target


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("discedit.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (sections.percent, sections.number, sections.points, sections.short, sections.step, sections.isolated)
    environment.filters |= {word.__name__: word for word in words}
    return environment.get_template("report.html")


def _shares(argument: str, values: Any, count: int) -> Tensor:
    """Accuracy by class."""
    try:
        shares = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{OP}: {argument} must hold numbers, got {values!r:.60}: {error}") from error
    if tuple(shares.shape) != (count,):
        shape = validation.shape_of(shares)
        raise ValueError(f"{OP}: {argument} must hold one share for each of {count} classes, got shape {shape}.")
    for k in ((shares < 0) | (shares > 1)).nonzero().flatten().tolist():
        raise ValueError(f"{OP}: {argument} must lie in [0, 1], got {float(shares[k]):g} for class {k}.")
    return shares


def _check_point(argument: str, point: Mapping[str, Any]) -> None:
    """One point of a trade-off."""
    validation.instance(OP, argument, point, Mapping, "a mapping")
    for key, value in point.items():
        if key not in POINT:
            raise ValueError(f"{OP}: {argument} must have keys out of {validation.quoted(POINT)}, got {key!r}.")
        if key != "title" and value is not None and not (validation.is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{OP}: {argument}[{key!r}] must be a share in [0, 1], got {value!r}.")
    sizes = [point.get(key) for key in ("parameters", "macs")]
    if None in (point.get("title"), point.get("accuracy")) or sizes == [None, None]:
        wanted = "'title', 'accuracy', and 'parameters' or 'macs'"
        raise ValueError(f"{OP}: {argument} must have {wanted}, got {dict(point)!r}.")
