"""Edited transformers models in a folder: saved with their recipe, loaded again."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import call, device_of, first_tensor, frozen_eval
from discedit.model.size import count_parameters
from discedit.recipes.recipe import Edit, Recipe, architecture_of

RECIPE = "discedit.json"
WEIGHTS = "model.safetensors"


def save_pretrained(edit: Edit, folder: str | os.PathLike[str]) -> bool:
    """Save an edited transformers model: what its own `save_pretrained` writes, and the recipe beside it.

    Where each layer kept as many neurons as every other (`intermediate_size`), or as many attention heads
    (`num_attention_heads`, with `head_dim`), and the model class heeds these, the configuration is written with them,
    and transformers' own `from_pretrained` loads the folder too. It must give the same logits, bit for bit, for random
    images; else the configuration stays that of the whole model, and only `load_pretrained` loads the folder.

    Args:
        edit: from `prune`, `unlearn` or `Recipe.apply`, on a model class of transformers. Its model may have been
            trained since.
        folder: made if it is not there.

    Returns:
        Whether transformers' own `from_pretrained` loads the folder too.

    Raises:
        TypeError: edit is no `Edit`.
        ValueError: its model is no transformers model, or has other shapes than the edit left.
        ImportError: transformers is not installed.
    """
    import transformers

    validation.instance("save_pretrained", "edit", edit, Edit, "a discedit.Edit")
    model: Any = edit.model
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or getattr(transformers, name, None) is not type(model):
        raise ValueError(f"save_pretrained: edit.model must be a model class of transformers, got {name}.")
    _check_shapes("save_pretrained: edit.model", architecture_of(model), edit.recipe.edited_architecture())
    # The module's own names, which the recipe uses, in one file.
    options: dict[str, Any] = {"max_shard_size": 1 << 62}
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        options["save_original_format"] = False
    model.save_pretrained(folder, **options)
    edit.recipe.save(Path(folder) / RECIPE)
    if all(operation.kind in ("fill", "set") for operation in edit.recipe.operations):
        return True
    config = _pruned_config(edit.recipe, model)
    if config is None:
        return False
    config.save_pretrained(folder)
    if _loads_the_same(model, folder):
        return True
    model.config.save_pretrained(folder)
    return False


def load_pretrained(folder: str | os.PathLike[str]) -> Edit:
    """Load what `save_pretrained` wrote.

    Returns:
        `Edit` with the edited model, of the class that the configuration names, on the CPU, in eval mode and with
        transformers' default attention, and with the recipe, which can undo the edit.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one is damaged, or they do not fit together.
        ImportError: transformers is not installed.
    """
    import transformers

    path = Path(folder)
    for file in ("config.json", RECIPE, WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"load_pretrained: folder must be one that discedit.huggingface.save_pretrained wrote, {str(path)!r} "
                f"has no {file}."
            )
    config = transformers.AutoConfig.from_pretrained(path)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, str(name), None)
    if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"load_pretrained: config.architectures must name a model class of transformers, got {name!r}."
        )
    recipe = Recipe.load(path / RECIPE)
    model = _built(model_class, config)
    shapes = architecture_of(model)
    # A configuration with the pruned sizes needs no recipe; one that fits neither is refused by it.
    if shapes == recipe.architecture or shapes != recipe.edited_architecture():
        recipe.apply(model, inplace=True)
    try:
        weights = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"load_pretrained: {str(path / WEIGHTS)!r} is damaged or cut short: {error}") from error
    _fill(model, weights, str(path / WEIGHTS))
    names = [name for name, _ in model.named_parameters()]
    before = sum(math.prod(recipe.architecture[name]) for name in names)
    return Edit(model.eval(), recipe, before, count_parameters(model))


def _check_shapes(what: str, found: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{what} must hold {name!r} of shape {expected.get(name, 'none (absent)')}, as the edit leaves it, got "
                f"{found.get(name, 'none (absent)')}."
            )


def _built(model_class: Any, config: Any) -> nn.Module:
    """A model with weights that are still to be filled; the caller's random state is left alone."""
    with torch.random.fork_rng([]):
        model: nn.Module = model_class(config)
    return model


def _fill(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Gives the model these weights, in their own types: each exactly once; tied ones under any of their names."""
    own, missing = model.state_dict(keep_vars=True), unfilled(model, weights)
    expected = {name: list(tensor.shape) for name, tensor in own.items() if name in weights or name in missing}
    _check_shapes(source, {name: list(tensor.shape) for name, tensor in weights.items()}, expected)
    for name, tensor in weights.items():
        own[name].data = tensor.to(own[name].device, copy=True)  # which may be mapped from the file


def unfilled(model: nn.Module, weights: Collection[str]) -> list[str]:
    """The model's tensors that weights of these names leave as they are; of tied ones any of their names will do."""
    own = model.state_dict(keep_vars=True)  # the parameters themselves: those of a plain state_dict are all others
    filled = {id(own[name]) for name in weights if name in own}
    return [name for name, tensor in own.items() if id(tensor) not in filled]


def _pruned_config(recipe: Recipe, model: Any) -> Any:
    """A configuration from which the model's class builds the sizes that the recipe leaves; None if there is none."""
    config = copy.deepcopy(model.config)
    widths = {
        len(operation.index)
        for operation in recipe.operations
        if operation.kind == "keep"
        and recipe.architecture[operation.target][operation.dim] == getattr(config, "intermediate_size", None)
    }
    # One number for all layers is what a configuration can say.
    if len(widths) == 1:
        config.intermediate_size = widths.pop()
    heads = {operation.value for operation in recipe.operations if operation.name == "num_attention_heads"}
    # Their width must be named with them: transformers takes the hidden size over their number for it.
    if len(heads) == 1 and isinstance(config.num_attention_heads, int):
        config.head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        config.num_attention_heads = heads.pop()
    try:
        found = architecture_of(_built(type(model), config))
    except (ValueError, RuntimeError):  # sizes that the class does not take
        return None
    return config if found == recipe.edited_architecture() else None


def _loads_the_same(model: Any, folder: str | os.PathLike[str]) -> bool:
    """Whether transformers' own loader gives a model with the same logits for random images."""
    if model.main_input_name != "pixel_values":
        return False
    size = getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images.to(device_of(model), model.dtype)}
    try:
        other, report = type(model).from_pretrained(folder, output_loading_info=True)
        with frozen_eval(model), frozen_eval(other.to(device_of(model))):
            expected, found = first_tensor(call(model, inputs)), first_tensor(call(other, inputs))
    except (ValueError, RuntimeError):  # the sizes are right, but not what the class makes of them
        return False
    return not any(report.values()) and expected is not None and found is not None and torch.equal(expected, found)
