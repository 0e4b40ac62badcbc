"""Prune in the middle of training, and go on with the same optimizer: 8 x 8 digits, seconds on one core."""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import discedit
from discedit import zoo


def train(model, optimizer, loader):
    """One epoch of any plain training loop."""
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


def accuracy(model, data):
    x, y = data.tensors
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=12, help="of training before pruning")
epochs = parser.parse_args().epochs

torch.manual_seed(0)
training, test = zoo.digits()
loader = DataLoader(training, batch_size=64, shuffle=True)
model = zoo.train_digits_net(training, epochs=epochs - 1)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
train(model, optimizer, loader)
print(f"before pruning: {accuracy(model, test):.1f} % of the test digits right")

# Half of the components of each layer go: those that tell the digits apart least.
scores = discedit.score(discedit.collect_moments(model, loader, num_classes=10))
edit = discedit.prune(
    model, scores, ratio=0.5, example_inputs=training.tensors[0][:1], data=loader, repair="least_squares"
)
print(f"after pruning: {accuracy(edit.model, test):.1f} %")

# The optimizer still holds the whole model's parameters. This one holds what is left of them, and of its own averages.
optimizer = edit.optimizer(optimizer)
train(edit.model, optimizer, loader)
print(f"after an epoch of fine-tuning: {accuracy(edit.model, test):.1f} %")
print(edit.summary())
