"""What several classifiers give for the same samples: logits and penultimate features, in one pass over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import (
    Quota,
    call,
    checked_labels,
    chosen,
    device_of,
    first_tensor,
    moved,
    samples_in,
    split,
    undisturbed,
)
from discedit.model.trace import ModelTrace, SampleOrder
from discedit.moments.calibration import joined


@dataclass(frozen=True)
class Outputs:
    """One model's answers to all samples, on the CPU: logits (samples, classes), features (samples, width)."""

    logits: Tensor
    features: Tensor | None
    labels: Tensor

    def of(self, chosen: Tensor) -> Outputs:
        """Those of the samples that a mask or indices name."""
        features = None if self.features is None else self.features[chosen]
        return Outputs(self.logits[chosen], features, self.labels[chosen])

    def penultimate(self) -> Tensor:
        if self.features is None:
            raise RuntimeError("features were not gathered.")
        return self.features.double()


def accuracies(outputs: Outputs, num_classes: int) -> Tensor:
    """Share of each class's samples that are classified rightly, float64; NaN for a class without samples."""
    hit = outputs.labels[outputs.logits.argmax(1) == outputs.labels]
    right = torch.bincount(hit, minlength=num_classes).double()
    return right / torch.bincount(outputs.labels, minlength=num_classes).double()


def is_among(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))


class Samples:
    """The first samples of each class that a loader gave, as inputs to run again: at most `quota[class]` of each."""

    def __init__(self, quota: Mapping[int, int]) -> None:
        self._quota = Quota(quota)
        self._inputs: list[Any] = []
        self._labels: list[Tensor] = []

    def add(self, inputs: Any, labels: Tensor) -> None:
        index = self._quota.take(labels)
        if len(index):
            self._inputs.append(chosen(inputs, index, len(labels)))
            self._labels.append(labels[index])

    @property
    def labels(self) -> Tensor:
        return torch.cat(self._labels) if self._labels else torch.zeros(0, dtype=torch.int64)

    def joined(self) -> Any:
        return joined(self._inputs, len(self._labels[0]))


def gather(
    op: str,
    argument: str,
    loader: Iterable[Any],
    models: Mapping[str, nn.Module],
    num_classes: int,
    *,
    features: bool | str = False,
    samples: Samples | None = None,
    seed: int = 0,
) -> dict[str, Outputs]:
    """What each model gives for the same batches, in one pass over the loader.

    Args:
        op, argument: what errors call the caller and the loader.
        models: by the names that errors give them. They are left as they were.
        features: whether to gather the input of the head as well; or the name of a layer, whose output is gathered.
        samples: keeps samples of this pass.
        seed: of torch's CPU generator during the pass, so that a loader that shuffles gives the same batches.

    Raises:
        ValueError: an empty loader, labels that do not fit, a model without logits or with NaN or Inf among them, or
            no head to be found.
    """
    devices = {name: device_of(model) for name, model in models.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        torch.default_generator.manual_seed(seed)
        readers = (
            {name: stack.enter_context(_Reader(op, name, model, features)) for name, model in models.items()}
            if features
            else {}
        )
        for index, batch in enumerate(loader):
            inputs, given = split(f"{op}: {argument}", batch, index, next(iter(devices.values())), labels_needed=True)
            classes = checked_labels(f"{op}: {argument}", given, num_classes, index).cpu()
            labels.append(classes)
            if samples is not None:
                samples.add(inputs, classes)
            for name, model in models.items():
                reader = readers.get(name) if len(classes) else None
                own = moved(inputs, devices[name])
                if reader is not None:
                    reader.begin(own)
                output = first_tensor(call(model, own))
                logits[name].append(_checked(op, name, argument, index, output, len(classes), num_classes))
                if reader is not None:
                    reader.take(len(classes))
    if not sum(map(len, labels)):
        raise ValueError(f"{op}: {argument} must give at least one sample, it gave none.")
    together = torch.cat(labels)
    return {
        name: Outputs(torch.cat(logits[name]), readers[name].features() if features else None, together)
        for name in models
    }


def _checked(
    op: str, name: str, argument: str, index: int, output: Tensor | None, samples: int, num_classes: int
) -> Tensor:
    if output is None or output.shape != (samples, num_classes):
        found = "none" if output is None else f"shape {validation.shape_of(output)}"
        raise ValueError(
            f"{op}: {name} must give logits of shape (samples, num_classes), here ({samples}, {num_classes}); in batch "
            f"{index} of {argument} it gave {found}."
        )
    logits = output.detach().float().cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{op}: {name} must give finite logits, in batch {index} of {argument} there is NaN or Inf.")
    return logits


class _Reader(ExitStack):
    """Reads penultimate features while a model runs: the input of its head, or what a layer gives."""

    def __init__(self, op: str, name: str, model: nn.Module, layer: bool | str) -> None:
        super().__init__()
        self._where, self._model = f"{op}: {name}", model
        self._features: list[Tensor] = []
        self._read: Tensor | None = None  # since the model began
        self._output = isinstance(layer, str)
        self._layer: str | None = None
        self._hooked = False
        if isinstance(layer, str):
            if layer not in dict(model.named_modules()):
                raise ValueError(f"{op}: features must name a layer of the models, {name} has none called {layer!r}.")
            self._layer = layer

    def begin(self, inputs: Any) -> None:
        """Before the model runs on a batch."""
        self._read = None
        self._layer = self._layer or ModelTrace.of(self._model, inputs).head
        if self._layer is not None and not self._hooked:
            module = self._model.get_submodule(self._layer)
            self.callback(module.register_forward_hook(self._hook, with_kwargs=True).remove)
            self._hooked = True
            self._check_order(inputs)

    def _check_order(self, inputs: Any) -> None:
        """Features must be those of the samples in their order, or they get wrong labels."""

        def run(batch: Any) -> dict[str, Tensor]:
            call(self._model, batch)
            read, self._read = self._read, None
            return {} if read is None else {"features": read}

        with torch.random.fork_rng([]):
            order = SampleOrder(inputs, samples_in(inputs), run)
        if order.windows("features") != 1:
            raise ValueError(
                f"{self._where}: layer {self._layer!r} must give one row of features for each sample, in the order of "
                "the batch; its rows are others."
            )

    def _hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._read = first_tensor(output if self._output else args or kwargs)

    def take(self, samples: int) -> None:
        if self._layer is None:
            raise ValueError(
                f"{self._where}: the features are the input of the last linear layer, whose output must be the model's "
                "output; there is none such. Name the layer whose output are the features: features='layer name'."
            )
        if self._read is None:
            raise ValueError(f"{self._where}: layer {self._layer!r} must run and give a tensor for every batch.")
        read, self._read = self._read.detach(), None
        if read.ndim < 2 or len(read) != samples:
            raise ValueError(
                f"{self._where}: layer {self._layer!r} must give one row of features for each of {samples} samples, "
                f"got shape {validation.shape_of(read)}."
            )
        # Tokens are averaged over, and so are the places of a map.
        if read.ndim > 2:
            read = read.float().mean(1) if read.ndim == 3 else read.float().flatten(2).mean(2)
        self._features.append(read.float().cpu())

    def features(self) -> Tensor:
        return torch.cat(self._features)
