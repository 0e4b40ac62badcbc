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
from discedit.moments.moments import Moments
from discedit.recipes.recipe import Edit, Recipe
from discedit.reporting import sections
from discedit.scoring.scores import Scores

if TYPE_CHECKING:
    from jinja2 import Template

OP = "report"
POINT = ("title", "accuracy", "parameters", "macs", "ratio")
TITLE = "What tells the classes apart"


def report(
    path: str | os.PathLike[str],
    scores: Scores,
    *,
    edits: Mapping[str, Edit | Recipe] | Sequence[Any] = (),
    accuracy: Mapping[str, Tensor] | None = None,
    curve: Sequence[Mapping[str, Any]] | None = None,
    moments: Moments | None = None,
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
        moments: what the scores were computed from: shows how many components never changed.
        class_names: one name per class; by default "class 0" and so on.
        title: of the page.
        settings: anything that JSON has (versions, seeds, arguments), as a table at the end.

    Returns:
        The path of the page.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a path with another ending, no layers, names, accuracies or moments that do not fit the scores,
            accuracies or shares outside [0, 1], or settings that JSON does not have. Nothing is then written.

    >>> import tempfile, torch, discedit
    >>> moments = discedit.Moments(2)
    >>> moments.update("conv", torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]), torch.arange(4) // 2)
    >>> folder = tempfile.TemporaryDirectory()
    >>> page = discedit.report(f"{folder.name}/page.html", discedit.score(moments), class_names=["cat", "dog"])
    >>> "What tells the classes apart" in page.read_text()
    True
    >>> folder.cleanup()
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{OP}: path must end in .html, got {str(target)!r}.")
    _check("scores", scores, Scores, "a discedit.Scores")
    if not scores:
        raise ValueError(f"{OP}: scores must hold at least one layer, it is empty.")
    names = sections.Names(scores, _class_names(class_names, scores.num_classes))
    edits = _titled("edits", edits or {}, "Edit or Recipe")
    for name, made in edits.items():
        _check(f"edits[{name!r}]", made, (Edit, Recipe), "an Edit or a Recipe")
    if accuracy is not None:
        accuracy = _accuracy(accuracy, scores.num_classes)
    if curve is not None:
        _check_curve(curve)
    if moments is not None:
        _check_moments(moments, scores)
    if title is not None:
        _check("title", title, str, "a string")
    if settings is not None:
        _check_settings(settings)
    page = _template().render(
        title=title or TITLE,
        about=sections.about(scores, moments),
        heat=sections.heat(scores, names),
        edits=[sections.edit(name, made, scores, names) for name, made in edits.items()],
        accuracy=None if accuracy is None else sections.accuracy(accuracy, edits, names),
        curve=None if curve is None else sections.curve(curve),
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
    return environment.get_template("report.html")


def _check(argument: str, given: Any, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"{OP}: {argument} must be {what}, got {type(given).__name__}.")


def _class_names(given: Any, count: int) -> list[str]:
    if given is None:
        return [f"class {k}" for k in range(count)]
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{OP}: class_names must be a sequence of strings, got {given!r}.")
    if len(given) != count:
        raise ValueError(f"{OP}: class_names must name {count} classes, got {len(given)} names.")
    return list(given)


def _titled(argument: str, given: Any, what: str) -> dict[str, Any]:
    _check(argument, given, Mapping, f"a mapping from title to {what}")
    for title in given:
        if not isinstance(title, str):
            raise TypeError(f"{OP}: {argument} must have strings for titles, got {title!r}.")
    return dict(given)


def _accuracy(given: Any, count: int) -> dict[str, Tensor]:
    found = {}
    for title, values in _titled("accuracy", given, "accuracies by class").items():
        try:
            shares = found[title] = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{OP}: accuracy[{title!r}] must be numbers, got {type(values).__name__}.") from error
        if tuple(shares.shape) != (count,):
            shape = validation.shape_of(shares)
            raise ValueError(
                f"{OP}: accuracy[{title!r}] must hold one share for each of {count} classes, got shape {shape}."
            )
        for k in ((shares < 0) | (shares > 1)).nonzero().flatten().tolist():
            raise ValueError(f"{OP}: accuracy[{title!r}] must lie in [0, 1], got {float(shares[k]):g} for class {k}.")
    if not found:
        raise ValueError(f"{OP}: accuracy must hold at least one model's accuracies, it is empty.")
    return found


def _check_curve(given: Any) -> None:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise TypeError(f"{OP}: curve must be a sequence of mappings, got {type(given).__name__}.")
    if not given:
        raise ValueError(f"{OP}: curve must hold at least one point, it is empty.")
    for i, point in enumerate(given):
        _check(f"curve[{i}]", point, Mapping, "a mapping")
        _check(f"curve[{i}]['title']", point.get("title"), str, "a string")
        for key, value in point.items():
            if key not in POINT:
                raise ValueError(f"{OP}: curve[{i}] must have keys out of {validation.quoted(POINT)}, got {key!r}.")
            if key != "title" and value is not None and not (validation.is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{OP}: curve[{i}][{key!r}] must be a share in [0, 1], got {value!r}.")
        sizes = [key for key in ("parameters", "macs") if point.get(key) is not None]
        if point.get("accuracy") is None or not sizes:
            wanted = "'parameters' or 'macs'" if point.get("accuracy") is not None else "'accuracy'"
            raise ValueError(f"{OP}: curve[{i}] must have {wanted}, got {dict(point)!r}.")


def _check_moments(moments: Any, scores: Scores) -> None:
    _check("moments", moments, Moments, "a discedit.Moments")
    if moments.num_classes != scores.num_classes:
        wanted = f"of the {scores.num_classes} classes of the scores"
        raise ValueError(f"{OP}: moments must be {wanted}, they are of {moments.num_classes}.")
    for layer, values in scores.items():
        found = moments[layer].channels if layer in moments else "none"
        if found != len(values):
            wanted = f"those of the scores, which have {len(values)} components in layer {layer!r}"
            raise ValueError(f"{OP}: moments must be {wanted}: they have {found}.")


def _check_settings(settings: Any) -> None:
    _check("settings", settings, Mapping, "a mapping")
    for name, value in settings.items():
        if not isinstance(name, str):
            raise TypeError(f"{OP}: settings must have strings for names, got {name!r}.")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{OP}: settings[{name!r}] must be what JSON has, got {value!r}.") from error
