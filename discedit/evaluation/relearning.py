"""Can the class be brought back? By a few steps of training, or by batch-norm statistics alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discedit.evaluation.outputs import Outputs, Samples, accuracies, is_among
from discedit.evaluation.probes import means
from discedit.model.forward import Quota, call, chosen, first_tensor, moved, undisturbed
from discedit.moments.calibration import batch_norms

EVALUATED = 100  # samples at once
RECALIBRATED = 128


@dataclass(frozen=True)
class Relearning:
    """Steps of SGD until the forget accuracy is `target`, half of the original's; None: more than `most`.

    `accuracy`: the forget accuracy then (or after the last step), on `samples` test samples.
    """

    steps: int | None
    most: int
    accuracy: float
    target: float
    samples: int


@dataclass(frozen=True)
class Recall:
    """Accuracy on `samples` test samples with batch-norm statistics of retained samples alone: means over classes."""

    forget: float
    retain: float
    samples: int


class Kept:
    """Inputs with labels, of which some can be taken."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def of(cls, samples: Samples, device: torch.device) -> Kept:
        return cls(moved(samples.joined(), device), moved(samples.labels, device))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Kept:
        return Kept(chosen(self.inputs, index, len(self)), self.labels[index.to(self.labels.device)])

    def first(self, number: int) -> Kept:
        """About so many, as many of each class."""
        classes = set(self.labels.tolist())
        return self.take(Quota(dict.fromkeys(classes, -(-number // max(1, len(classes))))).take(self.labels))

    def among(self, classes: Sequence[int], *, inside: bool = True) -> Kept:
        return self.take((is_among(self.labels, classes) == inside).nonzero()[:, 0])


def relearning(
    model: nn.Module,
    train: Kept,
    test: Kept,
    classes: Sequence[int],
    *,
    target: float,
    learning_rate: float,
    batch_size: int,
    most: int,
    seed: int,
) -> Relearning:
    """Train a copy, with plain SGD on all parameters, until it knows the classes half as well as the original did.

    Every batch is half forgotten, half retained classes. The copy stays in eval mode: batch-norm statistics and dropout
    play no part. What it cannot show: another learning rate needs another number of steps, so only models measured
    alike compare; and every model learns a class in the end, so compare with a retrained model.

    Source: relearn time of Golatkar et al., Forgetting Outside the Box, ECCV 2020, and Tarun et al., Fast Yet Effective
    Machine Unlearning, 2021 (there until the original's accuracy is reached, within a margin).
    """
    half = max(1, batch_size // 2)
    forget, retain = train.among(classes), train.among(classes, inside=False)
    random = torch.Generator().manual_seed(seed)
    batches = [_cycle(len(part), half, random) for part in (forget, retain)]
    with undisturbed(model):
        student = copy.deepcopy(model)
        student.requires_grad_(True)
        accuracy = forget_accuracy(student, test, classes)
        steps = 0
        while not accuracy >= target and steps < most:
            student.zero_grad(set_to_none=True)
            with torch.enable_grad():
                for part, indices in zip((forget, retain), batches, strict=True):
                    batch = part.take(next(indices))
                    loss = F.cross_entropy(_logits(student, batch.inputs), batch.labels) / 2
                    loss.backward()  # type: ignore[no-untyped-call]
            # By hand: the first optimizer of a process takes seconds to import what compiles it.
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-learning_rate)
            steps += 1
            accuracy = forget_accuracy(student, test, classes)
    return Relearning(steps if accuracy >= target else None, most, accuracy, target, len(test))


def forget_accuracy(model: nn.Module, test: Kept, classes: Sequence[int]) -> float:
    return both_accuracies(model, test.among(classes), classes)[0]


def both_accuracies(model: nn.Module, test: Kept, classes: Sequence[int]) -> tuple[float, float]:
    """Means over these and over the other classes."""
    with undisturbed(model):
        batches = [torch.arange(start, min(start + EVALUATED, len(test))) for start in range(0, len(test), EVALUATED)]
        logits = torch.cat([_logits(model, test.take(batch).inputs).cpu() for batch in batches])
    return means(accuracies(Outputs(logits, None, test.labels.cpu()), logits.shape[1]), classes)


def batchnorm_recall(model: nn.Module, train: Kept, test: Kept, classes: Sequence[int], seed: int) -> Recall:
    """Accuracy of a copy whose batch norms take their statistics from retained training samples alone.

    What it cannot show: the class may be brought back by other means where it does not come back by this one.

    Source: Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, 2016 (re-estimated statistics);
    that this alone can undo unlearning is what was published as CoBRA.
    """
    retain = train.among(classes, inside=False)
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    with undisturbed(model):
        other = copy.deepcopy(model)
        for norm in batch_norms(other).values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for index in order.tensor_split(max(1, round(len(order) / RECALIBRATED))):
            call(other, retain.take(index).inputs)
        other.eval()
        return Recall(*both_accuracies(other, test, classes), len(test))


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    logits = first_tensor(call(model, inputs))
    if logits is None:
        raise ValueError("evaluate: model must give logits, it gave none.")
    return logits.float()


def _cycle(samples: int, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Endless batches, in a new order whenever all samples had their turn."""
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=random)
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))
