"""What an edited network still knows, and what the edit cost."""

from discedit.evaluation.evaluate import Accuracy, Evaluation
from discedit.evaluation.membership import Attack, Membership
from discedit.evaluation.outputs import ForgetRetain
from discedit.evaluation.relearning import Recall, Relearning, RelearnTime
from discedit.model.size import accuracy_per_class

__all__ = [
    "Accuracy",
    "Attack",
    "Evaluation",
    "ForgetRetain",
    "Membership",
    "Recall",
    "RelearnTime",
    "Relearning",
    "accuracy_per_class",
]
