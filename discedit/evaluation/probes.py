"""What is still in the features: linear probe, nearest neighbours, similarity to another model's.

What each shows and what it cannot: docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from discedit.evaluation.membership import quiet_scikit_learn
from discedit.evaluation.outputs import EvaluationData, ForgetRetain, is_among, means

NEIGHBOURS = 20


def linear_probe(data: EvaluationData) -> dict[str, ForgetRetain]:
    """Recall of a logistic regression on standardised penultimate features, trained on all classes.

    Source: Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier Probes, ICLR workshop 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _recalls(make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)), data)


def knn(data: EvaluationData) -> dict[str, ForgetRetain]:
    """Recall of the 20 nearest training samples by cosine of penultimate features. No training, no scale.

    Source: Cover and Hart, Nearest Neighbor Pattern Classification, 1967; of frozen features, Wu et al., Unsupervised
    Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018 (there with weighted votes).
    """
    from sklearn.neighbors import KNeighborsClassifier

    train = next(iter(data.outputs["train"].values()))
    count = min(NEIGHBOURS, len(train.labels))
    # Cosines are no metric, which scikit-learn's trees need.
    return _recalls(KNeighborsClassifier(count, metric="cosine", algorithm="brute"), data)


@quiet_scikit_learn()
def _recalls(classifier: Any, data: EvaluationData) -> dict[str, ForgetRetain]:
    found = {}
    for name in data.models:
        train, test = data.sets(name)
        classifier.fit(train.penultimate().numpy(), train.labels.numpy())
        answers = torch.from_numpy(classifier.predict(test.penultimate().numpy()))
        found[name] = means(replace(test, logits=one_hot(answers, test.logits.shape[1])).recall(), data.classes)
    return found


def cka(data: EvaluationData) -> dict[str, ForgetRetain]:
    """Linear centred kernel alignment of two models' penultimate features of the same test samples.

    1 for features that differ by a rotation and a scale alone.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    found = {}
    for one, other in combinations(data.models, 2):  # which are in this order: edited, original, retrained
        x, y = data.outputs["test"][one], data.outputs["test"][other]
        own = is_among(x.labels, data.classes)
        similar = (linear_cka(x.of(mask).penultimate(), y.of(mask).penultimate()) for mask in (own, ~own))
        found[f"{one}-{other}"] = ForgetRetain(*similar)
    return found


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||y'x||^2 / (||x'x|| ||y'y||) in the Frobenius norm, of centred columns, float64; NaN if one side is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same from the samples' Gram matrices
        one, other = x @ x.T, y @ y.T
        cross, own = (one * other).sum(), one.norm() * other.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if float(own) > 0 else float("nan")
