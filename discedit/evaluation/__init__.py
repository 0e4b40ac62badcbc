"""What an edited network still knows, and what the edit cost."""

from discedit.evaluation.evaluate import Accuracy, Evaluation
from discedit.evaluation.membership import Attack, Membership
from discedit.evaluation.probes import Probe, Similarity
from discedit.evaluation.relearning import Recall, Relearning
from discedit.model.size import accuracy_per_class

__all__ = [
    "Accuracy",
    "Attack",
    "Evaluation",
    "Membership",
    "Probe",
    "Recall",
    "Relearning",
    "Similarity",
    "accuracy_per_class",
]
