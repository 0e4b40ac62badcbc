"""Models of the console command: from what a specification names, with weights and what is known of their inputs."""

from __future__ import annotations

import ast
import json
import math
import pickle
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.cli.errors import InputError, explained
from discedit.integrations import huggingface

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which processors store
EXAMPLES = 'discedit.zoo:cifar_resnet("resnet20"), timm:resnet18 or hf:FOLDER'
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the model takes: resized, cropped, scaled to [0, 1], then (x - mean) / std."""

    size: tuple[int, int] | None = None  # height and width; None: images stay as they are
    resize: int | None = None  # length of the shorter side before the crop; None: the shortest that covers the size
    mean: tuple[float, ...] | None = None  # for each channel, or one for all; None: x stays in [0, 1]
    std: tuple[float, ...] | None = None
    channels: int | None = None  # 1 (grey) or 3 (red, green, blue)
    interpolation: str = "bilinear"  # or "nearest", "bicubic", "lanczos"
    source: str = ""  # where this is known from, for the reader


@dataclass
class ModelSource:
    """A model, and what is known of its inputs and classes."""

    model: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: list[str] | None = None
    packages: tuple[str, ...] = ()  # whose versions matter beside torch's
    whole: bool = False  # a transformers model as its configuration describes it


def open_model(spec: str, *, pretrained: bool = False) -> ModelSource:
    """The model that "timm:NAME", "hf:FOLDER" or "module:factory" names, on the CPU, in eval mode."""
    kind, _, rest = spec.partition(":")
    if pretrained and kind != "timm":
        raise InputError(f"--pretrained: goes with --model timm:NAME alone, got --model {spec!r}.")
    if kind == "timm":
        source = _timm(rest, pretrained)
    elif kind == "hf":
        source = _huggingface(rest)
    else:
        model = resolve("--model", spec)
        if not isinstance(model, nn.Module):
            raise InputError(f"--model: {spec!r} must give a torch.nn.Module, it gives a {type(model).__name__}.")
        source = ModelSource(model)
    source.model.eval()
    if source.preprocessing.channels is None:
        first = next((module for module in source.model.modules() if isinstance(module, _ConvNd)), None)
        if first is not None and first.in_channels in (1, 3):
            source.preprocessing = replace(source.preprocessing, channels=first.in_channels)
    return source


def resolve(argument: str, spec: str) -> Any:
    """What "module:name", "module:name(literals)" or either with an "[index]" behind it names.

    The module is imported, from the working directory too. Of the rest nothing is evaluated: arguments are literals.
    A name that stands without parentheses is called without arguments if it can be called, unless it is a model.
    """
    module, _, rest = spec.partition(":")
    try:
        node = ast.parse(rest, mode="eval").body
        keys = []
        if isinstance(node, ast.Subscript):
            keys, node = [ast.literal_eval(node.slice)], node.value
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        arguments = [ast.literal_eval(value) for value in call.args]
        keywords = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."), *keywords)):
            raise ValueError("a name is expected")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{argument}: must be MODULE:FACTORY or MODULE:FACTORY(LITERALS), such as {EXAMPLES}; got {spec!r}."
        ) from error
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` has it, also for the console script
        sys.path.insert(0, folder)
    with explained(f"{argument}: {spec!r} failed"):
        found: Any = pkgutil.resolve_name(f"{module}:{name}")
        if call is node or (callable(found) and not isinstance(found, nn.Module)):
            found = found(*arguments, **keywords)
        for key in keys:
            found = found[key]
    return found


def _timm(name: str, pretrained: bool) -> ModelSource:
    with explained(f"--model: timm cannot make {name!r}"):
        model = import_module("timm").create_model(name, pretrained=pretrained)
        data = import_module("timm.data").resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    known = Preprocessing(
        size=(height, width),
        resize=math.floor(min(height, width) / (data.get("crop_pct") or 1.0)),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        channels=channels,
        interpolation=data["interpolation"] if data["interpolation"] in RESAMPLING.values() else "bilinear",
        source="timm's configuration",
    )
    return ModelSource(model, known, packages=("timm",))


def _huggingface(name: str) -> ModelSource:
    folder = Path(name)
    if not name or not (folder / "config.json").is_file():
        raise InputError(f"--model: hf: must be followed by a local folder with a config.json, got {name!r}.")
    edited = (folder / huggingface.RECIPE).is_file()
    with explained(f"--model: cannot load {name!r}"):
        transformers = import_module("transformers")
        transformers.utils.logging.disable_progress_bar()  # for files that load in no time
        if edited:
            model: Any = huggingface.load_pretrained(folder).model
        else:
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            absent = {kind.replace("_", " "): sorted(map(str, names)) for kind, names in report.items() if names}
            if absent:
                found = "; ".join(f"{kind}: {some(names)}" for kind, names in absent.items())
                raise InputError(f"--model: cannot load {name!r}: {found}")
    labels = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
    names = [labels.get(index, "") for index in range(len(labels))]
    known = all(names) and names != [f"LABEL_{index}" for index in range(len(names))]
    return ModelSource(model, _processor(folder, model.config), names if known else None, ("transformers",), not edited)


def _processor(folder: Path, config: Any) -> Preprocessing:
    """What the image processor's file says, or else the model's configuration.

    The file is read here, since transformers' own processors want a torchvision that fits this very torch.
    """
    size = getattr(config, "image_size", None)
    known = Preprocessing(
        size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        channels=getattr(config, "num_channels", None),
        source=str(folder / "config.json"),
    )
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return known
    with explained(f"--model: {str(file)!r} is no image processor's configuration"):
        given = json.loads(file.read_text(encoding="utf-8"))
        whole = _sides(given.get("size")) if given.get("do_resize", True) else {}
        crop = _sides(given.get("crop_size")) if given.get("do_center_crop", True) else {}
        target = crop if "height" in crop else whole
        shorter = whole.get("shortest_edge")
        if shorter is None and target is crop and "height" in whole:
            shorter = min(whole["height"], whole["width"])
        if shorter is not None and "height" not in target:
            target = {"height": shorter, "width": shorter}
        # The processor multiplies by a factor where we divide by 255.
        factor = 255 * float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 255.0
        normalised = given.get("do_normalize", True) and "image_mean" in given
        mean, std = (given["image_mean"], given["image_std"]) if normalised else ((0.0,), (1.0,))
        return replace(
            known,
            size=(int(target["height"]), int(target["width"])) if target else known.size,
            resize=None if shorter is None else int(shorter),
            mean=tuple(float(value) / factor for value in mean),
            std=tuple(float(value) / factor for value in std),
            interpolation=RESAMPLING.get(given.get("resample", 2), "bilinear"),
            source=str(file),
        )


def _sides(size: Any) -> dict[str, Any]:
    return {"height": size, "width": size} if isinstance(size, int) else size or {}


def load_weights(model: nn.Module, path: Path, *, argument: str = "--weights") -> None:
    """Fill a model with the weights of a .safetensors, .pt or .pth file, all of them and nothing else.

    Counters of batch norms, which evaluation does not use, may be absent; of tensors that hang in several places one
    name is enough.
    """
    weights = _state_dict(path, argument)
    missing = [name for name in huggingface.unfilled(model, weights) if not name.endswith("num_batches_tracked")]
    own = model.state_dict()
    unexpected = [name for name in weights if name not in own]
    wrong = [f"{kind} {some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    try:
        if wrong:
            raise RuntimeError("; ".join(wrong))
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"{argument}: {str(path)!r} does not fit the model: {' '.join(str(error).split())}") from error


def _state_dict(path: Path, argument: str) -> Mapping[str, Tensor]:
    what = f"{argument}: {str(path)!r} cannot be read"
    with explained(what):
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in (".pt", ".pth"):
            raise InputError(f"{what}: it must be a .safetensors, .pt or .pth file")
        try:
            # Tensors alone: a pickle from elsewhere could run anything.
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose own message says how to run it all the same
            raise InputError(f"{what}: it is damaged, or holds more than tensors in plain containers") from error
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"{argument}: {str(path)!r} must hold a state dict, tensors by name, it holds a {type(weights).__name__}."
        )
    return weights


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
