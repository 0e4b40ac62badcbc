"""Membership inference without shadow models: can training samples be told from samples never seen?

What each attack shows and what it cannot: docs/evaluation.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from discedit.evaluation.outputs import EvaluationData, Outputs, is_among

FOLDS = 5
LEAST = 10  # members and non-members of each class
RATE = 0.01  # false positives allowed
MOST_FITTED = 5000  # non-members that a quantile regression is fitted to
BOOSTING: dict[str, Any] = {"loss": "quantile", "quantile": 0.5, "early_stopping": False}
BOOSTING |= {"max_iter": 60, "max_leaf_nodes": 8, "min_samples_leaf": 20}
WIDTH = 64  # wider features are projected, for the quantile regression alone


@contextmanager
def quiet_scikit_learn() -> Iterator[None]:
    """One OpenMP thread, and no word of an optimiser that stopped at its limit of iterations: that is good enough here.

    The fits are small: several threads mostly wait for each other, on a busy machine several times as long.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1, user_api="openmp"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@dataclass(frozen=True)
class Attack:
    """How well one attack tells members (training samples) from non-members (test samples) of the forgotten classes.

    `auc`: probability that a member scores higher than a non-member; 0.5 is chance. `standard_error`: of `auc`.
    `tpr`: share of members found when at most 1 % of non-members, which are `false_positives` of them, may be taken
    for members.
    """

    auc: float
    standard_error: float
    tpr: float
    false_positives: int
    members: int
    non_members: int


@dataclass(frozen=True)
class Membership:
    """All attacks on one model."""

    loss: Attack
    entropy: Attack
    quantile: Attack
    learned: Attack


def membership(data: EvaluationData) -> dict[str, Membership]:
    """All attacks: members are the training samples of the forgotten classes, non-members their test samples."""
    found = {}
    for name in data.models:
        train, test = data.sets(name)
        members, others = (one.of(is_among(one.labels, data.classes)) for one in (train, test))
        found[name] = Membership(
            loss=loss_attack(members, others),
            entropy=entropy_attack(members, others, data.classes),
            quantile=quantile_attack(members, test, data.classes, data.seed),
            learned=learned_attack(members, others, data.seed),
        )
    return found


def loss_attack(members: Outputs, others: Outputs) -> Attack:
    """One threshold on the loss: members have the lower one.

    Source: Yeom et al., Privacy Risk in Machine Learning, CSF 2018.
    """
    return attack_of(-_loss(members), -_loss(others))


def entropy_attack(members: Outputs, others: Outputs, classes: Sequence[int]) -> Attack:
    """A threshold for each class on the modified entropy, which knows the true label: members have the lower one.

    Figures are means over the classes.

    Source: Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021.
    """
    found = [attack_of(*(-modified_entropy(one.of(one.labels == cls)) for one in (members, others))) for cls in classes]
    auc, tpr = (sum(values) / len(found) for values in ([one.auc for one in found], [one.tpr for one in found]))
    error = sum(one.standard_error**2 for one in found) ** 0.5 / len(found)
    return Attack(auc, error, tpr, sum(one.false_positives for one in found), len(members.labels), len(others.labels))


@quiet_scikit_learn()
def quantile_attack(members: Outputs, test: Outputs, classes: Sequence[int], seed: int) -> Attack:
    """How far a sample's margin lies above what a non-member like it would have.

    A regression (gradient-boosted trees) learns the median of the margin given features and class, from test samples of
    all classes. Samples to be judged are dealt to folds, and each is judged by a regression that has not seen it.

    Source: Bertran et al., Scalable Membership Inference Attacks via Quantile Regression, NeurIPS 2023.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    random = np.random.default_rng(seed)
    own = is_among(test.labels, classes)
    rest = (~own).nonzero()[:, 0]
    if len(rest) > MOST_FITTED:
        rest = rest[torch.from_numpy(random.permutation(len(rest))[:MOST_FITTED])]
    judged = int(own.sum())
    sets = (test.of(torch.cat([own.nonzero()[:, 0], rest])), members)
    project = _projection(sets[0].penultimate())
    features = [project(one.penultimate()).numpy() for one in sets]
    margins = [margin(one).numpy() for one in sets]
    labels = [one.labels.numpy() for one in sets]
    folds = [random.permutation(len(labels[0])) % FOLDS]
    # Dealt apart from the rest, so that every fold has as many of those that are judged.
    folds[0][:judged] = random.permutation(judged) % FOLDS
    folds.append(random.permutation(len(labels[1])) % FOLDS)
    above = [np.zeros(len(one)) for one in labels]
    for fold in range(FOLDS):
        fitted = folds[0] != fold
        typical = _class_medians(margins[0][fitted], labels[0][fitted], test.logits.shape[1])
        inputs = [np.c_[x, typical[y]] for x, y in zip(features, labels, strict=True)]
        regression = HistGradientBoostingRegressor(**BOOSTING, random_state=seed)
        regression.fit(inputs[0][fitted], margins[0][fitted])
        for which in range(2):
            here = folds[which] == fold
            above[which][here] = margins[which][here] - regression.predict(inputs[which][here])
    return attack_of(torch.from_numpy(above[1]), torch.from_numpy(above[0][:judged]))


@quiet_scikit_learn()
def learned_attack(members: Outputs, others: Outputs, seed: int) -> Attack:
    """A classifier that is told who is a member: logistic regression on loss, margin, logits and features.

    Each sample is judged by a classifier that was trained on the other four fifths.

    Source: Nasr et al., Comprehensive Privacy Analysis of Deep Learning, S&P 2019 (an attacker who knows some members,
    there a network that also reads gradients); Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs = [
        torch.cat([_loss(one)[:, None], margin(one)[:, None], one.logits.double(), one.penultimate()], 1)
        for one in (members, others)
    ]
    is_member = np.repeat([1, 0], [len(inputs[0]), len(inputs[1])])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    score = cross_val_predict(classifier, torch.cat(inputs).numpy(), is_member, cv=folds, method="decision_function")
    found = torch.from_numpy(np.asarray(score, dtype=np.float64))
    return attack_of(found[: len(inputs[0])], found[len(inputs[0]) :])


def attack_of(members: Tensor, others: Tensor) -> Attack:
    """The figures of an attack that gives members the higher score.

    The standard error is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988). It counts the chance in who was
    judged, not that in how an attack was trained. A threshold is never set between equal scores.
    """
    allowed = int(RATE * len(others))
    # So that no more than the allowed number lie above it, whatever scores are equal.
    threshold = others.sort(descending=True).values[allowed]
    wins, lost = _wins(members, others), 1 - _wins(others, members)
    error = (wins.var() / len(members) + lost.var() / len(others)).clamp_min(0).sqrt()
    tpr = (members > threshold).double().mean()
    return Attack(float(wins.mean()), float(error), float(tpr), allowed, len(members), len(others))


def _wins(ones: Tensor, others: Tensor) -> Tensor:
    """For each of the ones, the share of the others below it; equal ones count half."""
    ordered, ones = others.double().sort().values, ones.double()
    below, not_above = (torch.searchsorted(ordered, ones, right=right) for right in (False, True))
    return (below + not_above).double() / (2 * len(others))


def _loss(outputs: Outputs) -> Tensor:
    return F.cross_entropy(outputs.logits.double(), outputs.labels, reduction="none")


def margin(outputs: Outputs) -> Tensor:
    """The logit of the true class less the highest of the others."""
    logits, own = outputs.logits.double(), outputs.labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)


def modified_entropy(outputs: Outputs) -> Tensor:
    """-(1 - p_y) log p_y - sum over the other classes of p_i log(1 - p_i), for probabilities p and the true class y."""
    logs, own = F.log_softmax(outputs.logits.double(), 1), outputs.labels[:, None]
    # log(1 - p) keeps its digits where p is near 1: the sum over all the others.
    logs_of_rest = torch.log(-torch.expm1(logs.clamp_max(-1e-300)))
    others = (logs.exp() * logs_of_rest).scatter(1, own, 0.0).sum(1)
    log_own = logs.gather(1, own)[:, 0]
    return log_own.expm1() * log_own - others


def _class_medians(values: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """The median of each class's values, by class index; that of all values for a class without any."""
    medians = np.full(num_classes, np.median(values))
    for cls in np.unique(labels):
        medians[cls] = np.median(values[labels == cls])
    return medians


def _projection(features: Tensor) -> Any:
    """To the leading principal components, where features are wide."""
    if features.shape[1] <= WIDTH:
        return lambda x: x
    mean = features.mean(0)
    centred = features - mean
    leading = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -WIDTH:]
    return lambda x: (x - mean) @ leading
