"""Forget a class, then fine-tune for one epoch on the other classes alone, as the DISCEDIT paper does: seconds."""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import discedit
from discedit import zoo
from discedit.evaluation.evaluate import accuracy_per_class

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--digit", type=int, default=3, choices=range(10), help="the class to forget")
parser.add_argument("--fraction", type=float, default=0.15, help="of the components of the last layers, to be zeroed")
options = parser.parse_args()
digit = options.digit


def report(title, model, data):
    """Accuracy on test images of the class to forget and, as the mean over classes, of the others."""
    accuracy = 100 * accuracy_per_class(model, zoo.batches(data), 10)
    others = accuracy[[cls for cls in range(10) if cls != digit]].mean()
    print(f"{title}: digit {digit} {accuracy[digit]:.1f} %, others {others:.1f} %")


torch.manual_seed(0)
training, test = zoo.digits()
model = zoo.train_digits_net(training)
report("before", model, test)

# The components that tell the digit from the others go. Forward passes only.
scores = discedit.score(discedit.collect_moments(model, zoo.batches(training), num_classes=10))
edited = discedit.unlearn(
    model, scores, classes=[digit], method=discedit.AblateComponents(discedit.TopFraction(options.fraction))
).model
report("after the edit", edited, test)

# One epoch in which the model never sees the digit, by any plain training loop.
x, y = training.tensors
retained = TensorDataset(x[y != digit], y[y != digit])
optimizer = torch.optim.Adam(edited.parameters(), lr=3e-4)
edited.train()
for inputs, labels in DataLoader(retained, batch_size=64, shuffle=True):
    optimizer.zero_grad()
    F.cross_entropy(edited(inputs), labels).backward()
    optimizer.step()
edited.eval()
report("after an epoch on the other digits", edited, test)
