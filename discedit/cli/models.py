"""Models of the console command: from what a specification names, with weights and what is known of their inputs."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

PICKLED = (".pt", ".pth")
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which processors store
EXAMPLES = 'discedit.zoo:cifar_resnet("resnet20"), timm:resnet18 or hf:FOLDER'
SHOWN = 5  # names in a message


class InputError(ValueError):
    """What the caller gave cannot be used; the message says why."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the model takes: resized, cropped, scaled to [0, 1], then (x - mean) / std.

    Attributes:
        size: height and width that the model takes; None: images stay as they are.
        resize: length of the shorter side before the centre crop; None: the shortest that covers `size`.
        mean, std: one number for each channel, or one for all; None: not known, so x stays in [0, 1].
        channels: 1 (grey) or 3 (red, green, blue); None: not known, so images stay as they are.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        source: where this is known from, for the reader; empty where nothing is.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    interpolation: str = "bilinear"
    source: str = ""


@dataclass
class ModelSource:
    """A model, where it came from and what is known of its inputs and classes."""

    model: nn.Module
    spec: str
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: list[str] | None = None
    packages: tuple[str, ...] = ()  # whose versions matter beside torch's
    whole: bool = False  # a transformers model as its configuration describes it


def open_model(spec: str, *, pretrained: bool = False) -> ModelSource:
    """The model that a specification names, on the CPU, in eval mode.

    Args:
        spec: "timm:NAME", "hf:FOLDER" or "module:factory", as `called` takes it.
        pretrained: of timm: with its published weights.

    Raises:
        InputError: an unknown form, a package that is not installed, or no model there.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm":
        source = _timm(rest, pretrained)
    elif pretrained:
        raise InputError(f"--pretrained: goes with --model timm:NAME alone, got --model {spec!r}.")
    elif kind == "hf":
        source = _huggingface(rest)
    else:
        model = called("--model", spec)
        if not isinstance(model, nn.Module):
            raise InputError(f"--model: {spec!r} must give a torch.nn.Module, it gives a {type(model).__name__}.")
        source = ModelSource(model, spec)
    source.model.eval()
    if source.preprocessing.channels is None:
        source.preprocessing = replace(source.preprocessing, channels=_channels(source.model))
    return source


def called(argument: str, spec: str) -> Any:
    """What "module:name", "module:name(literals)" or either with an "[index]" behind it names.

    The module is imported, from the working directory too. Of the rest nothing is evaluated: arguments are literals.
    A name that stands without parentheses is called without arguments if it can be called, unless it is a model.

    Raises:
        InputError: a specification of another form, or code of that module that fails; it is then the cause.
    """
    module, colon, rest = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in module.split(".")):
        raise InputError(f"{argument}: must be MODULE:FACTORY (such as {EXAMPLES}), got {spec!r}.")
    names, arguments, keywords, index, has_call = _parsed(argument, spec, rest)
    with _working_directory_importable():
        try:
            found: Any = import_module(module)
        except Exception as error:
            raise InputError(f"{argument}: cannot import {module!r}: {type(error).__name__}: {error}") from error
    for name in names:
        if not hasattr(found, name):
            raise InputError(f"{argument}: {module!r} has no {'.'.join(names)!r}.")
        found = getattr(found, name)
    if has_call or (callable(found) and not isinstance(found, nn.Module)):
        try:
            found = found(*arguments, **keywords)
        except Exception as error:
            raise InputError(f"{argument}: {spec!r} failed: {type(error).__name__}: {error}") from error
    if index is not None:
        try:
            found = found[index]
        except Exception as error:
            raise InputError(f"{argument}: {spec!r} has no [{index!r}]: {type(error).__name__}: {error}") from error
    return found


def _parsed(argument: str, spec: str, text: str) -> tuple[list[str], list[Any], dict[str, Any], Any, bool]:
    """Names, literal arguments and index of "a.b(1, c=2)[0]"."""
    try:
        node = ast.parse(text, mode="eval").body
        index = None
        if isinstance(node, ast.Subscript):
            index, node = ast.literal_eval(node.slice), node.value
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        has_call = isinstance(node, ast.Call)
        if isinstance(node, ast.Call):
            arguments = [ast.literal_eval(value) for value in node.args]
            for keyword in node.keywords:
                if keyword.arg is None:
                    raise ValueError("** is not allowed")
                keywords[keyword.arg] = ast.literal_eval(keyword.value)
            node = node.func
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError("it does not begin with a name")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{argument}: after the colon must stand a name, or a name with literal arguments, such as "
            f'cifar_resnet("resnet20"), got {spec!r} ({error}).'
        ) from error
    return [node.id, *names], arguments, keywords, index, has_call


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """As with `python -m`, also for the console script."""
    folder = str(Path.cwd())
    known = folder in sys.path or "" in sys.path
    if not known:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if not known and folder in sys.path:
            sys.path.remove(folder)


def _timm(name: str, pretrained: bool) -> ModelSource:
    timm = _package("timm", "--model timm:NAME")
    if not name:
        raise InputError("--model: timm: must be followed by the name of one of its models, got nothing.")
    try:
        model = timm.create_model(name, pretrained=pretrained)
        data = import_module("timm.data").resolve_model_data_config(model)
    except Exception as error:
        raise InputError(f"--model: timm cannot make {name!r}: {type(error).__name__}: {error}") from error
    channels, height, width = data["input_size"]
    share = data.get("crop_pct") or 1.0
    known = Preprocessing(
        size=(height, width),
        resize=math.floor(min(height, width) / share),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        channels=channels,
        interpolation=data["interpolation"] if data["interpolation"] in RESAMPLING.values() else "bilinear",
        source="timm's configuration",
    )
    return ModelSource(model, f"timm:{name}", known, packages=("timm",))


def _huggingface(name: str) -> ModelSource:
    transformers = _package("transformers", "--model hf:FOLDER")
    folder = Path(name)
    if not name or not (folder / "config.json").is_file():
        raise InputError(f"--model: hf: must be followed by a local folder with a config.json, got {name!r}.")
    from discedit.integrations import huggingface

    transformers.utils.logging.disable_progress_bar()  # for files that load in no time
    try:
        if (folder / huggingface.RECIPE).is_file():
            model = huggingface.load_pretrained(folder).model
        else:
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            absent = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
            if absent:
                kinds = "; ".join(f"{kind.replace('_', ' ')}: {some(names)}" for kind, names in absent.items())
                raise ValueError(f"its weights do not fit its configuration: {kinds}")
    except Exception as error:
        raise InputError(f"--model: cannot load {name!r}: {type(error).__name__}: {error}") from error
    config: Any = model.config
    labels = {int(index): str(label) for index, label in (config.id2label or {}).items()}
    names = [labels.get(index, "") for index in range(len(labels))]
    placeholders = [f"LABEL_{index}" for index in range(len(names))]
    return ModelSource(
        model,
        f"hf:{name}",
        _processor(folder, config),
        None if names == placeholders or not all(names) else names,
        packages=("transformers",),
        whole=not (folder / huggingface.RECIPE).is_file(),
    )


def _processor(folder: Path, config: Any) -> Preprocessing:
    """What the image processor's file says, or else the model's configuration."""
    size = getattr(config, "image_size", None)
    known = Preprocessing(
        size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        channels=getattr(config, "num_channels", None),
        source=str(folder / "config.json"),
    )
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return known
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        sizes = [given.get(name) if given.get(f"do_{verb}", True) else None
                 for name, verb in (("size", "resize"), ("crop_size", "center_crop"))]  # fmt: skip
        whole, crop = ({"height": s, "width": s} if isinstance(s, int) else s or {} for s in sizes)
        target = crop if "height" in crop else whole
        shorter = whole.get("shortest_edge")
        if shorter is None and target is crop and "height" in whole:
            shorter = min(whole["height"], whole["width"])
        if shorter is not None and "height" not in target:
            target = {"height": shorter, "width": shorter}
        mean: tuple[float, ...] = (0.0,)
        std: tuple[float, ...] = (1.0,)
        if given.get("do_normalize", True) and "image_mean" in given:
            mean, std = tuple(map(float, given["image_mean"])), tuple(map(float, given["image_std"]))
        # The processor multiplies by a factor where we divide by 255.
        factor = 255 * float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 255.0
        return replace(
            known,
            size=(int(target["height"]), int(target["width"])) if target else known.size,
            resize=None if shorter is None else int(shorter),
            mean=tuple(value / factor for value in mean),
            std=tuple(value / factor for value in std),
            interpolation=RESAMPLING.get(given.get("resample", 2), "bilinear"),
            source=str(file),
        )
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"--model: {str(file)!r} is no image processor's configuration: {error}") from error


def _package(name: str, what: str) -> Any:
    """An optional package; imported here, because it takes seconds."""
    if find_spec(name) is None:
        raise InputError(f"{what} needs {name}, which is not installed: pip install 'discedit[cli]'")
    try:
        return import_module(name)
    except Exception as error:  # such as a torchvision that was built for another torch
        raise InputError(f"{what} needs {name}, whose import fails: {type(error).__name__}: {error}") from error


def _channels(model: nn.Module) -> int | None:
    """Of the images that the model takes, by its first convolution."""
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 3) else None


def load_weights(model: nn.Module, path: Path, *, argument: str = "--weights") -> None:
    """Fill a model with the weights of a file, all of them and nothing else.

    Counters of batch norms, which evaluation does not use, may be absent; of tensors that hang in several places one
    name is enough.

    Raises:
        FileNotFoundError: no such file. InputError: no state dict, or one that does not fit.
    """
    weights = _state_dict(path, argument)
    own = model.state_dict(keep_vars=True)
    filled = {id(own[name]) for name in weights.keys() & own.keys()}
    missing = [n for n, t in own.items() if id(t) not in filled and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    if missing or unexpected:
        found = [
            f"{title} {some(names)}" for title, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise InputError(f"{argument}: {str(path)!r} does not fit the model: {'; '.join(found)}.")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{argument}: {str(path)!r} does not fit the model: {name!r} must have shape {list(own[name].shape)}, "
                f"got {list(tensor.shape)}."
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def _state_dict(path: Path, argument: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {str(path)!r} does not exist or is no file.")
    if path.suffix not in (".safetensors", *PICKLED):
        raise InputError(f"{argument}: must be a .safetensors, .pt or .pth file, got {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{argument}: {str(path)!r} cannot be read: {why}") from error
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"{argument}: {str(path)!r} must hold a state dict, tensors by name, it holds a {type(weights).__name__}."
        )
    return weights


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
