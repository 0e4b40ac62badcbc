"""Can the class be brought back? By a few steps of training, or by batch-norm statistics alone.

What each shows and what it cannot: docs/evaluation.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discedit.common import validation
from discedit.evaluation.outputs import EvaluationData, ForgetRetain, Kept, Outputs, means
from discedit.model.forward import call, first_tensor, frozen_eval
from discedit.moments.calibration import batch_norms

EVALUATED = 100  # samples at once
RECALIBRATED = 128
JUDGED = 200  # test samples that every step of relearning is judged by


@dataclass(frozen=True)
class RelearnTime:
    """Steps of SGD until the forget accuracy is `target`, half of the original's; None: more than `most`.

    `accuracy`: the forget accuracy then (or after the last step), on `samples` test samples.
    """

    steps: int | None
    most: int
    accuracy: float
    target: float
    samples: int


@dataclass(frozen=True)
class Recall(ForgetRetain):
    """Accuracy on `samples` test samples with batch-norm statistics of retained samples alone: means over classes."""

    samples: int


@dataclass(frozen=True)
class Relearning:
    """The metric "relearning" with other options: steps of plain SGD that bring the classes back.

    A copy is trained, all parameters of it, until it knows the classes half as well as the original did. It stays in
    eval mode: batch-norm statistics and dropout play no part.

    Args:
        learning_rate: another one needs another number of steps, so only models measured alike compare.
        batch_size: half of each batch are forgotten, half retained classes.
        max_steps: then it is given up.

    Raises:
        ValueError: a number out of range.

    Source: relearn time of Golatkar et al., Forgetting Outside the Box, ECCV 2020, and Tarun et al., Fast Yet Effective
    Machine Unlearning, 2021 (there until the original's accuracy is reached, within a margin).
    """

    learning_rate: float = 0.001
    batch_size: int = 64
    max_steps: int = 50

    def __post_init__(self) -> None:
        rate = validation.at_least_zero("Relearning", "learning_rate", self.learning_rate)
        object.__setattr__(self, "learning_rate", rate)  # Python's own numbers, for JSON
        for name in ("batch_size", "max_steps"):
            object.__setattr__(self, name, validation.positive_integer("Relearning", name, getattr(self, name)))

    def __call__(self, data: EvaluationData) -> dict[str, RelearnTime]:
        found, target = {}, math.nan
        for name in sorted(data.models, key=lambda name: name != "original"):  # whose accuracy sets the target
            train, test = data.samples(name)
            test = test.among(data.classes).first(JUDGED)
            if name == "original":
                target = accuracies(data.models[name], test, data.classes).forget / 2
            found[name] = self._relearn(data.models[name], train, test, data, target)
        return {name: found[name] for name in data.models}

    def _relearn(self, model: nn.Module, train: Kept, test: Kept, data: EvaluationData, target: float) -> RelearnTime:
        random = torch.Generator().manual_seed(data.seed)
        parts = [train.among(data.classes, inside=inside) for inside in (True, False)]
        batches = [_cycle(len(part), max(1, self.batch_size // 2), random) for part in parts]
        with frozen_eval(model):
            student = copy.deepcopy(model)
            student.requires_grad_(True)
            for steps in range(self.max_steps + 1):
                accuracy = accuracies(student, test, data.classes).forget
                if accuracy >= target or steps == self.max_steps:
                    break
                student.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    # Both halves one after the other: the gradient of the whole batch, in half the memory.
                    for part, indices in zip(parts, batches, strict=True):
                        batch = part.take(next(indices))
                        loss = F.cross_entropy(_logits(student, batch.inputs), batch.labels) / 2
                        loss.backward()  # type: ignore[no-untyped-call]
                # By hand: the first optimizer of a process takes seconds to import what compiles it.
                for parameter in student.parameters():
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-self.learning_rate)
        return RelearnTime(steps if accuracy >= target else None, self.max_steps, accuracy, target, len(test))


def accuracies(model: nn.Module, test: Kept, classes: Sequence[int]) -> ForgetRetain:
    with frozen_eval(model):
        batches = [torch.arange(start, min(start + EVALUATED, len(test))) for start in range(0, len(test), EVALUATED)]
        logits = torch.cat([_logits(model, test.take(batch).inputs).cpu() for batch in batches])
    return means(Outputs(logits, torch.empty(len(test), 0), test.labels.cpu()).recall(), classes)


def recall_by_batch_norms(data: EvaluationData) -> dict[str, Recall]:
    """`batchnorm_recall` of the models that have batch norms."""
    return {
        name: batchnorm_recall(model, *data.samples(name), data.classes, data.seed)
        for name, model in data.models.items()
        if batch_norms(model)
    }


def batchnorm_recall(model: nn.Module, train: Kept, test: Kept, classes: Sequence[int], seed: int) -> Recall:
    """Accuracy of a copy whose batch norms take their statistics from retained training samples alone.

    Source: Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, 2016 (re-estimated statistics);
    that this alone can undo unlearning is what was published as CoBRA.
    """
    retain = train.among(classes, inside=False)
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    with frozen_eval(model):
        other = copy.deepcopy(model)
        for norm in batch_norms(other).values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for index in order.tensor_split(max(1, round(len(order) / RECALIBRATED))):
            call(other, retain.take(index).inputs)
        other.eval()
        found = accuracies(other, test, classes)
    return Recall(found.forget, found.retain, len(test))


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    logits = first_tensor(call(model, inputs))
    assert logits is not None  # it gave some when its outputs were gathered
    return logits.float()


def _cycle(samples: int, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Endless batches, in a new order whenever all samples had their turn."""
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=random)
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))
