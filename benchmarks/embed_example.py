"""Runs one script written for torch-pruning with every importance replaced by ours: see benchmarks/bench_embed.py.

    python -m benchmarks.embed_example ours|theirs SCRIPT [ARGUMENTS]

No network: weights that a script would download are drawn at random, as are its picture and its words. The last line of
the output says how it ended.
"""

from __future__ import annotations

import inspect
import io
import re
import runpy
import socket
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vision_ops  # noqa: F401  (before anything imports torchvision)
from torch import nn
from torch_pruning import importance

from discedit.integrations.torch_pruning import OVER_LAYERS, DiscEditImportance

calls: list[str] = []  # the groups that ours was asked about, by their first layer


class NoNetwork(OSError):
    pass


class Ours:
    """Takes what any importance of torch-pruning takes, and scores a model at random when it first sees it."""

    def __init__(self, *_: Any, group_reduction: str = "mean", **__: Any) -> None:
        self.reduction = group_reduction if group_reduction in OVER_LAYERS else "mean"
        self.known: weakref.WeakKeyDictionary[Any, DiscEditImportance] = weakref.WeakKeyDictionary()

    def __call__(self, group: Any) -> Any:
        graph = group._DG
        if graph not in self.known:
            generator = torch.Generator().manual_seed(0)
            scores = {}
            for name, module in graph.model.named_modules():
                if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                    width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                    scores[name] = torch.rand(width, 2, generator=generator)
            self.known[graph] = DiscEditImportance(graph.model, scores, group_reduction=self.reduction)
        calls.append(group[0].dep.target.name)
        return self.known[graph](group)

    def zero_grad(self) -> None:
        """Of the Hessian."""

    def accumulate_grad(self, model: nn.Module) -> None:
        """Of the Hessian."""


def replace() -> None:
    for name, value in list(vars(importance).items()):
        if inspect.isclass(value) and value.__module__ == importance.__name__ and name != "Importance":
            setattr(importance, name, type(name, (Ours,), {}))


def stand_in() -> None:
    """Random weights, pictures and words where a script for transformers or timm would download them."""
    import requests
    import timm
    import transformers
    from PIL import Image

    def picture(*_: Any, **__: Any) -> SimpleNamespace:
        file = io.BytesIO()
        Image.effect_noise((256, 256), 64).convert("RGB").save(file, "png")
        file.seek(0)
        return SimpleNamespace(raw=file)

    def model(cls: Any, *_: Any, **__: Any) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = cls(cls.config_class(**({"num_labels": 1000} if "Classification" in cls.__name__ else {})))
        return made.eval()

    def of_name(name: str, **_: Any) -> nn.Module:
        return model({"swin": transformers.SwinForImageClassification}[name.split("/")[-1].split("-")[0]])

    def words(*_: Any, **__: Any) -> dict[str, torch.Tensor]:
        ids = torch.arange(100, 108)[None]
        return {"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": ids * 0 + 1}

    create = timm.create_model
    timm.create_model = lambda *args, **options: create(*args, **{**options, "pretrained": False})
    requests.get = picture
    transformers.PreTrainedModel.from_pretrained = classmethod(model)  # type: ignore[assignment, method-assign]
    transformers.AutoModelForImageClassification.from_pretrained = of_name
    transformers.AutoImageProcessor.from_pretrained = lambda *_, **__: transformers.ViTImageProcessor()
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: words


def no_network(*_: Any, **__: Any) -> None:
    raise NoNetwork("needs a download")


def main() -> None:
    which, path = sys.argv[1], Path(sys.argv[2])
    if which == "ours":
        replace()
    stand_in()
    socket.socket.connect = no_network  # type: ignore[method-assign]
    socket.getaddrinfo = no_network  # type: ignore[assignment]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
        done = "ran"
    except SystemExit as end:
        done = "ran" if not end.code else f"not run: ended with {end.code}"
    except BaseException as error:
        why = " ".join(str(error).split())[:160]
        seen: BaseException | None = error
        while seen is not None and not isinstance(seen, NoNetwork):
            seen = seen.__cause__ or seen.__context__
        download = seen is not None or re.search("offline|needs a download", why)
        done = "not run: needs a download" if download else f"failed: {type(error).__name__}: {why}"
        if isinstance(error, ImportError):
            done = f"not run: {why}"
    if which == "ours" and done == "ran":
        done += f", {len(calls)} calls" if calls else ", asks no importance"
    print(f"\nembed_example: {done}", flush=True)


if __name__ == "__main__":
    main()
