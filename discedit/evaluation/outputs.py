"""What several classifiers give for the same samples: logits and penultimate features, in one pass over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import (
    Quota,
    call,
    checked_labels,
    device_of,
    first_tensor,
    frozen_eval,
    hooked,
    index_samples,
    samples_in,
    to_device,
    unpack_batch,
)
from discedit.model.trace import ModelTrace, SampleOrder
from discedit.moments.calibration import concat_batches

OP = "evaluate"


@dataclass(frozen=True)
class Outputs:
    """One model's answers to all samples, on the CPU: logits (samples, classes), features (samples, width), labels."""

    logits: Tensor
    features: Tensor  # width 0: not asked for
    labels: Tensor

    def of(self, chosen: Tensor) -> Outputs:
        """Those of the samples that a mask or indices name."""
        return Outputs(self.logits[chosen], self.features[chosen], self.labels[chosen])

    def penultimate(self) -> Tensor:
        return self.features.double()

    def recall(self) -> Tensor:
        """Share of each class's samples that are classified rightly, float64; NaN for a class without samples."""
        hit = self.labels[self.logits.argmax(1) == self.labels]
        right, total = (torch.bincount(labels, minlength=self.logits.shape[1]) for labels in (hit, self.labels))
        return right.double() / total.double()


@dataclass(frozen=True)
class ForgetRetain:
    """A figure of the forgotten and of the other classes, on test samples."""

    forget: float
    retain: float


def is_among(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))


def means(values: Tensor, classes: Sequence[int]) -> ForgetRetain:
    """The means over these classes and over all others; classes without samples (NaN) do not count."""
    own = is_among(torch.arange(len(values)), classes)
    return ForgetRetain(float(values[own].nanmean()), float(values[~own].nanmean()))


class Kept:
    """Inputs with labels, to run again, of which some can be taken."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def of(cls, batches: Sequence[Kept], device: torch.device) -> Kept:
        inputs = concat_batches([batch.inputs for batch in batches], len(batches[0]))
        return cls(to_device(inputs, device), torch.cat([batch.labels for batch in batches]).to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Kept:
        return Kept(index_samples(self.inputs, index, len(self)), self.labels[index.to(self.labels.device)])

    def first(self, number: int) -> Kept:
        """About so many, as many of each class."""
        classes = set(self.labels.tolist())
        return self.take(Quota(dict.fromkeys(classes, -(-number // max(1, len(classes))))).take(self.labels))

    def among(self, classes: Sequence[int], *, inside: bool = True) -> Kept:
        return self.take((is_among(self.labels, classes) == inside).nonzero()[:, 0])


@dataclass(frozen=True)
class EvaluationData:
    """What is measured on."""

    models: Mapping[str, nn.Module]  # "edited", and where given "original" and "retrained"
    classes: list[int]  # to forget
    others: list[int]
    outputs: Mapping[str, Mapping[str, Outputs]]  # "test", and where given "train" -> model -> what it gives
    kept: Mapping[str, Sequence[Kept]]  # the same -> samples to run again; none unless a metric requires them
    seed: int

    def sets(self, name: str) -> tuple[Outputs, Outputs]:
        """What a model gives for training and for test samples."""
        return self.outputs["train"][name], self.outputs["test"][name]

    def samples(self, name: str) -> tuple[Kept, Kept]:
        """Training and test samples to run again, on the model's device."""
        train, test = (Kept.of(self.kept[part], device_of(self.models[name])) for part in ("train", "test"))
        return train, test


def gather(
    argument: str,
    loader: Iterable[Any],
    models: Mapping[str, nn.Module],
    num_classes: int,
    *,
    features: bool | str = False,
    keep: Mapping[int, int] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Outputs], list[Kept]]:
    """What each model gives for the same batches, and samples of them, in one pass over the loader.

    Args:
        argument: what errors call the loader. Models they call by their names.
        features: as for `FeatureReader`.
        keep: how many samples of each class to keep.
        seed: of torch's CPU generator during the pass, so that a loader that shuffles gives the same batches.
    """
    where, quota = f"{OP}: {argument}", Quota(keep or {})
    device = device_of(next(iter(models.values())))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    labels, kept = [], []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(frozen_eval(model))
        # Inside `frozen_eval`, which puts the caller's random state back afterwards.
        torch.default_generator.manual_seed(seed)
        readers = {name: FeatureReader(name, model, features) for name, model in models.items()}
        for index, batch in enumerate(loader):
            inputs, given = unpack_batch(where, batch, index, device, labels_needed=True)
            classes = checked_labels(where, given, num_classes, index).cpu()
            labels.append(classes)
            if len(places := quota.take(classes)):
                kept.append(Kept(index_samples(inputs, places, len(classes)), classes[places]))
            for name, model in models.items():
                output, read = readers[name].run(to_device(inputs, device_of(model)), len(classes))
                at = f"in batch {index} of {argument}"
                logits = _checked_logits(name, first_tensor(output), (len(classes), num_classes), at)
                if len(classes):
                    found[name].append((logits, read))
    if not sum(map(len, labels)):
        raise ValueError(f"{where} must give at least one sample, it gave none.")
    whole = torch.cat(labels)
    answers = {name: [torch.cat(parts) for parts in zip(*batches, strict=True)] for name, batches in found.items()}
    return {name: Outputs(logits, read, whole) for name, (logits, read) in answers.items()}, kept


def _checked_logits(name: str, logits: Tensor | None, shape: tuple[int, int], at: str) -> Tensor:
    found = "none" if logits is None else f"shape {validation.shape_of(logits)}"
    if logits is not None and logits.shape == shape:
        if bool(logits.isfinite().all()):
            return logits.detach().float().cpu()
        found = "NaN or Inf"
    rule = f"must give finite logits of shape (samples, num_classes), here {shape}"
    raise ValueError(f"{OP}: {name} {rule}; {at} it gave {found}.")


class FeatureReader:
    """Penultimate features of a model: the input of its head (True), what a named layer gives, or none (False)."""

    def __init__(self, name: str, model: nn.Module, features: bool | str) -> None:
        self._name, self._model, self._wanted = name, model, bool(features)
        self._named = isinstance(features, str)
        self._layer = features if isinstance(features, str) else ""
        self._found = False
        if self._layer not in dict(model.named_modules()):
            raise ValueError(f"{OP}: features must name a layer of the models, {name} has none called {features!r}.")

    def run(self, inputs: Any, samples: int) -> tuple[Any, Tensor]:
        """What the model gives for a batch, and (samples, width), on the CPU: means over tokens, or places of a map."""
        if not self._wanted or not samples:
            return call(self._model, inputs), torch.empty(samples, 0)
        if not self._found:
            self._find(inputs)
        output, read = self._read(inputs)
        if read is None or read.ndim < 2 or len(read) != samples:
            self._refuse("it gave no tensor" if read is None else f"its shape is {validation.shape_of(read)}")
        if read.ndim > 2:
            read = read.float().mean(1) if read.ndim == 3 else read.float().flatten(2).mean(2)
        return output, read.detach().float().cpu()

    def _find(self, inputs: Any) -> None:
        """The layer, whose features must come in the order of the samples: in another they would get wrong labels."""
        head = self._layer if self._named else ModelTrace.of(self._model, inputs).head
        if head is None:
            raise ValueError(
                f"{OP}: {self._name}: the features are the input of the last linear layer, whose output must be the "
                "model's output; there is none such. Name the layer whose output are the features: features='layer "
                "name'."
            )
        self._layer, self._found = head, True

        def run(batch: Any) -> dict[str, Tensor]:
            read = self._read(batch)[1]
            return {} if read is None else {"features": read}

        # The loader draws from the same generator: looking at the first batch must not change its order.
        with torch.random.fork_rng([]):
            if SampleOrder(inputs, samples_in(inputs), run).windows("features") != 1:
                self._refuse("its rows are others")

    def _read(self, inputs: Any) -> tuple[Any, Tensor | None]:
        seen: list[Tensor | None] = [None]

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(first_tensor(output if self._named else args or kwargs))

        with hooked([self._model.get_submodule(self._layer).register_forward_hook(read, with_kwargs=True)]):
            return call(self._model, inputs), seen[-1]

    def _refuse(self, found: str) -> NoReturn:
        raise ValueError(
            f"{OP}: {self._name}: layer {self._layer!r} must give one row of features for each sample, in the order of "
            f"the batch; {found}."
        )
