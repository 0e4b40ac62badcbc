"""Membership inference without shadow models: can training samples be told from samples never seen?"""

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

from discedit.evaluation.outputs import Outputs, is_among

FOLDS = 5
LEAST = 10  # members and non-members of each class
RATE = 0.01  # false positives allowed
MOST_FITTED = 5000  # non-members that a quantile regression is fitted to
WIDTH = 64  # wider features are projected, for the quantile regression alone


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


def membership(train: Outputs, test: Outputs, classes: Sequence[int], seed: int) -> Membership:
    """All attacks: members are the training samples of the classes, non-members their test samples."""
    own_train, own_test = train.of(is_among(train.labels, classes)), test.of(is_among(test.labels, classes))
    with scikit_learn_at_work():
        return Membership(
            loss=loss_attack(own_train, own_test),
            entropy=entropy_attack(own_train, own_test, classes),
            quantile=quantile_attack(own_train, test, classes, seed),
            learned=learned_attack(own_train, own_test, seed),
        )


def loss_attack(members: Outputs, others: Outputs) -> Attack:
    """One threshold on the loss: members have the lower one.

    What it cannot show: a sample that is easy for every model has a low loss, member or not.

    Source: Yeom et al., Privacy Risk in Machine Learning, CSF 2018.
    """
    return measured(-_loss(members), -_loss(others))


def entropy_attack(members: Outputs, others: Outputs, classes: Sequence[int]) -> Attack:
    """A threshold for each class on the modified entropy, which knows the true label: members have the lower one.

    Figures are means over the classes. What it cannot show: as for `loss_attack`.

    Source: Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021.
    """
    found = [
        measured(
            -modified_entropy(members.of(members.labels == cls)), -modified_entropy(others.of(others.labels == cls))
        )
        for cls in classes
    ]
    return Attack(
        auc=sum(attack.auc for attack in found) / len(found),
        standard_error=sum(attack.standard_error**2 for attack in found) ** 0.5 / len(found),
        tpr=sum(attack.tpr for attack in found) / len(found),
        false_positives=sum(attack.false_positives for attack in found),
        members=len(members.labels),
        non_members=len(others.labels),
    )


def quantile_attack(members: Outputs, test: Outputs, classes: Sequence[int], seed: int) -> Attack:
    """How far a sample's margin lies above what a non-member like it would have.

    The margin is the logit of the true class less the highest other one. A regression (gradient-boosted trees) learns,
    from test samples of all classes alone, the median of the margin given the sample's features and class. Samples to
    be judged, members or not, are dealt to folds, and each is judged by a regression that has not seen it. In the
    publication one quantile stands for one false positive rate, and a network reads the input; here one regression of
    the median serves all rates, and the features stand for the input.

    What it cannot show: leaks that do not lift the margin. Features are the attacked model's own and may leak too.

    Source: Bertran et al., Scalable Membership Inference Attacks via Quantile Regression, NeurIPS 2023.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    random = np.random.default_rng(seed)
    own = is_among(test.labels, classes)
    rest = (~own).nonzero()[:, 0]
    if len(rest) > MOST_FITTED:
        rest = rest[torch.from_numpy(random.permutation(len(rest))[:MOST_FITTED])]
    known = test.of(torch.cat([own.nonzero()[:, 0], rest]))
    judged = int(own.sum())
    project = _projection(known.penultimate())
    fits, targets = [], []
    for outputs in (known, members):
        fits.append(project(outputs.penultimate()).numpy())
        targets.append(margin(outputs).numpy())
    known_fold = random.permutation(len(known.labels)) % FOLDS
    known_fold[:judged] = random.permutation(judged) % FOLDS
    member_fold = random.permutation(len(members.labels)) % FOLDS
    above_other, above_member = np.zeros(judged), np.zeros(len(members.labels))
    for fold in range(FOLDS):
        seen = known_fold != fold
        typical = _class_medians(targets[0][seen], known.labels.numpy()[seen], test.logits.shape[1])
        regression = HistGradientBoostingRegressor(
            loss="quantile",
            quantile=0.5,
            max_iter=60,
            max_leaf_nodes=8,
            min_samples_leaf=20,
            early_stopping=False,
            random_state=seed,
        )
        regression.fit(np.c_[fits[0][seen], typical[known.labels.numpy()[seen]]], targets[0][seen])
        here = (~seen[:judged]).nonzero()[0]
        inputs = np.c_[fits[0][here], typical[known.labels.numpy()[here]]]
        above_other[here] = targets[0][here] - (regression.predict(inputs) if len(here) else 0.0)
        here = (member_fold == fold).nonzero()[0]
        inputs = np.c_[fits[1][here], typical[members.labels.numpy()[here]]]
        above_member[here] = targets[1][here] - (regression.predict(inputs) if len(here) else 0.0)
    return measured(torch.from_numpy(above_member), torch.from_numpy(above_other))


def learned_attack(members: Outputs, others: Outputs, seed: int) -> Attack:
    """A classifier that is told who is a member: logistic regression on loss, margin, logits and features.

    Each sample is judged by a classifier that was trained on the other four fifths. An attacker rarely knows that much,
    so this looks for any linear difference between the two sets, of either direction.

    What it cannot show: with few samples a classifier finds little; and a difference need not come from training, as
    training and test samples may have been drawn differently. The same attack on the original and a retrained model
    says how much.

    Source: Nasr et al., Comprehensive Privacy Analysis of Deep Learning, S&P 2019 (an attacker who knows some members,
    there a network that also reads gradients); Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = [
        torch.cat([_loss(one)[:, None], margin(one)[:, None], one.logits.double(), one.penultimate()], 1)
        for one in (members, others)
    ]
    inputs = torch.cat(columns).numpy()
    is_member = np.r_[np.ones(len(columns[0]), dtype=np.int64), np.zeros(len(columns[1]), dtype=np.int64)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with scikit_learn_at_work():
        score = cross_val_predict(classifier, inputs, is_member, cv=folds, method="decision_function")
    found = torch.from_numpy(np.asarray(score, dtype=np.float64))
    return measured(found[: len(columns[0])], found[len(columns[0]) :])


def measured(members: Tensor, others: Tensor) -> Attack:
    """The figures of an attack that gives members the higher score.

    The standard error is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988). It counts the chance in who was
    judged, not that in how an attack was trained. A threshold is never set between equal scores.
    """
    allowed = int(RATE * len(others))
    threshold = others.sort(descending=True).values[allowed]
    wins, lost = _wins(members, others), 1 - _wins(others, members)
    variance = wins.var() / len(members) + lost.var() / len(others)
    return Attack(
        auc=float(wins.mean()),
        standard_error=float(variance.clamp_min(0).sqrt()),
        tpr=float((members > threshold).double().mean()),
        false_positives=allowed,
        members=len(members),
        non_members=len(others),
    )


def _wins(ones: Tensor, others: Tensor) -> Tensor:
    """For each of the ones, the share of the others below it; equal ones count half."""
    ordered = others.double().sort().values
    below = torch.searchsorted(ordered, ones.double(), right=False)
    not_above = torch.searchsorted(ordered, ones.double(), right=True)
    return (below + not_above).double() / (2 * len(others))


def _loss(outputs: Outputs) -> Tensor:
    return F.cross_entropy(outputs.logits.double(), outputs.labels, reduction="none")


def margin(outputs: Outputs) -> Tensor:
    """The logit of the true class less the highest of the others."""
    logits, own = outputs.logits.double(), outputs.labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)


def modified_entropy(outputs: Outputs) -> Tensor:
    """-(1 - p_y) log p_y - sum over the other classes of p_i log(1 - p_i), for probabilities p and the true class y."""
    logs = F.log_softmax(outputs.logits.double(), 1)
    own = outputs.labels[:, None]
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
    _, axes = torch.linalg.eigh(centred.T @ centred)
    leading = axes[:, -WIDTH:]
    return lambda x: (x - mean) @ leading


@contextmanager
def scikit_learn_at_work() -> Iterator[None]:
    """One OpenMP thread, and no word of an optimiser that stopped at its limit of iterations: that is good enough here.

    The fits are small: several threads mostly wait for each other, on a busy machine several times as long.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1, user_api="openmp"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
