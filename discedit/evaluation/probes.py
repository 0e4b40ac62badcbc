"""What is still in the features: linear probe, nearest neighbours, similarity to another model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discedit.evaluation.membership import scikit_learn_at_work
from discedit.evaluation.outputs import Outputs, accuracies, is_among

NEIGHBOURS = 20


@dataclass(frozen=True)
class Probe:
    """A classifier trained on frozen features, on test samples: means over the forgotten and over the other classes."""

    forget: float
    retain: float


@dataclass(frozen=True)
class Similarity:
    """Linear CKA of two models' features, on test samples of the forgotten and of the other classes."""

    forget: float
    retain: float


def linear_probe(train: Outputs, test: Outputs, classes: Sequence[int]) -> Probe:
    """Recall of a logistic regression on standardised penultimate features, trained on all classes.

    What it cannot show: that nothing is left, because another kind of classifier, or an earlier layer, may find it. And
    features that never saw a class tell it from others to some extent too: compare with a retrained model.

    Source: Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier Probes, ICLR workshop 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _probe(make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)), train, test, classes)


def knn(train: Outputs, test: Outputs, classes: Sequence[int]) -> Probe:
    """Recall of the 20 nearest training samples by cosine of penultimate features. No training, no scale.

    What it cannot show: as for `linear_probe`; it also depends on how many training samples there are of each class.

    Source: Cover and Hart, Nearest Neighbor Pattern Classification, 1967; of frozen features, Wu et al., Unsupervised
    Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018 (there with weighted votes).
    """
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(train.labels))
    return _probe(KNeighborsClassifier(count, metric="cosine", algorithm="brute"), train, test, classes)


def _probe(classifier: Any, train: Outputs, test: Outputs, classes: Sequence[int]) -> Probe:
    with scikit_learn_at_work():
        classifier.fit(train.penultimate().numpy(), train.labels.numpy())
        found = torch.from_numpy(classifier.predict(test.penultimate().numpy()))
    num_classes = test.logits.shape[1]
    right = Outputs(torch.nn.functional.one_hot(found, num_classes), None, test.labels)
    forget, retain = means(accuracies(right, num_classes), classes)
    return Probe(forget, retain)


def means(values: Tensor, classes: Sequence[int]) -> tuple[float, float]:
    """The means over these classes and over all others; classes without samples (NaN) do not count."""
    own = is_among(torch.arange(len(values)), classes)
    return float(values[own].nanmean()), float(values[~own].nanmean())


def cka(one: Outputs, other: Outputs, classes: Sequence[int]) -> Similarity:
    """Linear centred kernel alignment of two models' penultimate features of the same test samples.

    1 for features that differ by a rotation and a scale alone. What it cannot show: it weighs directions by their
    variance, so a small direction that tells the class apart hardly counts; and it is biased upwards where there are
    few samples for the width of the features.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    own = is_among(one.labels, classes)
    return Similarity(
        *(linear_cka(one.of(mask).penultimate(), other.of(mask).penultimate()) for mask in (own, ~own)),
    )


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||y'x||^2 / (||x'x|| ||y'y||) in the Frobenius norm, of centred columns, float64; NaN if one side is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same from the samples' Gram matrices
        one, other = x @ x.T, y @ y.T
        cross, own = (one * other).sum(), one.norm() * other.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if float(own) > 0 else float("nan")
