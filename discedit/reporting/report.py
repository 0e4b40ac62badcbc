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
from discedit.reporting import colours, sections
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
    pngs: bool = False,
) -> list[Path]:
    """Write one HTML page about scores, and about edits, accuracies and settings where they are given.

    The page holds all that it shows: no script, nothing from the network. Light and dark, on paper and on a phone. What
    comes from outside (names, titles, settings) is text in it, whatever it looks like. Of more than 40 classes, or more
    than 128 components of a layer, groups are shown, and the page says so. Deterministic: the same arguments give the
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
        pngs: also write the figures as NAME.scores.png, NAME.edits.png, NAME.accuracy.png and NAME.curve.png, those for
            which there is something to show. Needs matplotlib: ``pip install 'discedit[report]'``.

    Returns:
        The files that were written, the page first.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a path with another ending, no layers, names, accuracies or moments that do not fit the scores,
            accuracies or shares outside [0, 1], or settings that JSON does not have.
        ModuleNotFoundError: pngs without matplotlib. Nothing is then written.

    >>> import tempfile, torch, discedit
    >>> moments = discedit.Moments(2)
    >>> moments.update("conv", torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]), torch.arange(4) // 2)
    >>> folder = tempfile.TemporaryDirectory()
    >>> [page] = discedit.report(f"{folder.name}/page.html", discedit.score(moments), class_names=["cat", "dog"])
    >>> "What tells the classes apart" in page.read_text()
    True
    >>> folder.cleanup()
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{OP}: path must end in .html, got {str(target)!r}.")
    _check_scores(scores)
    names = sections.Names(scores, _class_names(class_names, scores.num_classes))
    made = _edits(edits)
    shares = None if accuracy is None else _accuracy(accuracy, scores.num_classes)
    points = None if curve is None else _curve(curve)
    if moments is not None:
        _check_moments(moments, scores)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"{OP}: title must be a string, got {type(title).__name__}.")
    if settings is not None:
        _check_settings(settings)
    if pngs:
        from discedit.reporting import pngs as _pngs  # matplotlib is optional: say so before anything is written

        figures = _pngs.figures(scores, names, made, shares, points)
    page = _template().render(
        title=title or TITLE,
        colours=[(colour, colours.ink(colour)) for colour in colours.scale()],
        about=sections.about(scores, moments),
        heat=sections.heat(scores, names),
        edits=[sections.edit(name, each, scores, names) for name, each in made.items()],
        accuracy=None if shares is None else sections.accuracy(shares, made, names),
        curve=None if points is None else sections.curve(points),
        classes=sections.classes(scores, names),
        settings=None if settings is None else sections.table(settings),
    )
    # A lone surrogate, as in file names that are no text, has no bytes of its own.
    files.write_atomically(target, page.encode("utf-8", "replace"))
    written = [target]
    if pngs:
        for name, data in figures.items():
            written.append(target.with_name(f"{target.stem}.{name}.png"))
            files.write_atomically(written[-1], data)
    return written


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


def _check_scores(scores: Any) -> None:
    if not isinstance(scores, Scores):
        raise TypeError(f"{OP}: scores must be a discedit.Scores, got {type(scores).__name__}.")
    if not scores:
        raise ValueError(f"{OP}: scores must hold at least one layer, it is empty.")


def _class_names(given: Any, count: int) -> list[str]:
    if given is None:
        return [f"class {k}" for k in range(count)]
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{OP}: class_names must be a sequence of strings, got {given!r}.")
    if len(given) != count:
        raise ValueError(f"{OP}: class_names must name {count} classes, got {len(given)} names.")
    return list(given)


def _titled(argument: str, given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{OP}: {argument} must be a mapping from title to {what}, got {type(given).__name__}.")
    for title in given:
        if not isinstance(title, str):
            raise TypeError(f"{OP}: {argument} must have strings for titles, got {title!r}.")
    return dict(given)


def _edits(given: Any) -> dict[str, Edit | Recipe]:
    edits = {} if isinstance(given, Sequence) and not len(given) else _titled("edits", given, "Edit or Recipe")
    for title, made in edits.items():
        if not isinstance(made, (Edit, Recipe)):
            raise TypeError(f"{OP}: edits[{title!r}] must be an Edit or a Recipe, got {type(made).__name__}.")
    return edits


def _accuracy(given: Any, count: int) -> dict[str, Tensor]:
    found = {}
    for title, values in _titled("accuracy", given, "accuracies by class").items():
        try:
            shares = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{OP}: accuracy[{title!r}] must be numbers, got {type(values).__name__}.") from error
        if tuple(shares.shape) != (count,):
            raise ValueError(
                f"{OP}: accuracy[{title!r}] must hold one share for each of {count} classes, got shape "
                f"{validation.shape_of(shares)}."
            )
        wrong = (shares < 0) | (shares > 1)
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0, 0])
            raise ValueError(f"{OP}: accuracy[{title!r}] must lie in [0, 1], got {float(shares[k]):g} for class {k}.")
        found[title] = shares
    if not found:
        raise ValueError(f"{OP}: accuracy must hold at least one model's accuracies, it is empty.")
    return found


def _curve(given: Any) -> list[Mapping[str, Any]]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise TypeError(f"{OP}: curve must be a sequence of mappings, got {type(given).__name__}.")
    if not given:
        raise ValueError(f"{OP}: curve must hold at least one point, it is empty.")
    for i, point in enumerate(given):
        if not isinstance(point, Mapping):
            raise TypeError(f"{OP}: curve[{i}] must be a mapping, got {type(point).__name__}.")
        for key, value in point.items():
            if key not in POINT:
                raise ValueError(f"{OP}: curve[{i}] must have keys out of {validation.quoted(POINT)}, got {key!r}.")
            if key == "title":
                if not isinstance(value, str):
                    raise TypeError(f"{OP}: curve[{i}]['title'] must be a string, got {value!r}.")
            elif value is not None and not (validation.is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{OP}: curve[{i}][{key!r}] must be a share in [0, 1], got {value!r}.")
        for key in ("title", "accuracy"):
            if point.get(key) is None:
                raise ValueError(f"{OP}: curve[{i}] must have {key!r}, got {dict(point)!r}.")
        if point.get("parameters") is None and point.get("macs") is None:
            raise ValueError(f"{OP}: curve[{i}] must have 'parameters' or 'macs', got {dict(point)!r}.")
    return list(given)


def _check_moments(moments: Any, scores: Scores) -> None:
    if not isinstance(moments, Moments):
        raise TypeError(f"{OP}: moments must be a discedit.Moments, got {type(moments).__name__}.")
    if moments.num_classes != scores.num_classes:
        raise ValueError(
            f"{OP}: moments must be of the {scores.num_classes} classes of the scores, they are of "
            f"{moments.num_classes}."
        )
    for layer, values in scores.items():
        found = moments[layer].channels if layer in moments else "none"
        if found != len(values):
            raise ValueError(
                f"{OP}: moments must be those of the scores, which have {len(values)} components in layer {layer!r}: "
                f"they have {found}."
            )


def _check_settings(settings: Any) -> None:
    if not isinstance(settings, Mapping):
        raise TypeError(f"{OP}: settings must be a mapping, got {type(settings).__name__}.")
    for name, value in settings.items():
        if not isinstance(name, str):
            raise TypeError(f"{OP}: settings must have strings for names, got {name!r}.")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{OP}: settings[{name!r}] must be what JSON has, got {value!r}.") from error
