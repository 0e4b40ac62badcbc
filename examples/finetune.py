"""Prune a trained network, then train what is left for an epoch: by labels, or by what the original answers.

The digits' network, in seconds; with --images a ResNet20, on the training images of CIFAR-10 (benchmarks/finetune.md).
"""

import argparse
import math

import torch
import torch.nn.functional as F

import discedit
from discedit import zoo
from discedit.evaluation.evaluate import accuracy_per_class

RECIPE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def train(model, optimizer, images, labels, inputs_of, teacher=None):
    """An epoch in which the learning rate falls to zero as a cosine; a teacher takes the place of the labels."""
    batches = torch.randperm(len(images)).split(128)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / len(batches))) / 2)
    model.train()
    for rows in batches:
        x = inputs_of(images[rows])
        if teacher is None:
            loss = F.cross_entropy(model(x), labels[rows])
        else:  # at temperature 4
            loss = 16 * F.cross_entropy(model(x) / 4, (teacher(x) / 4).softmax(1).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
    model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="file of arrays, uint8: `images` (n, 32, 32, 3) and `labels`")
    parser.add_argument("--parameters", type=float, default=0.4, help="share that is left")
    parser.add_argument("--distill", action="store_true", help="by the original's answers, not by labels")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.images:
        (images, labels), test = zoo.cifar10_images(options.images), zoo.cifar10("test")
        model, inputs_of = zoo.cifar_resnet("resnet20"), zoo.cifar10_augmented
        data = zoo.cifar10_inputs(images[:2500]).split(256)
    else:
        (training, test), inputs_of = zoo.digits(), torch.clone
        model, (images, labels) = zoo.train_digits_net(training), training.tensors
        data = images.split(256)
    optimizer = torch.optim.SGD(model.parameters(), **RECIPE)
    edit = discedit.prune(model, example_inputs=data[0][:1], data=data, parameters=options.parameters)
    print(edit.summary())
    accuracies = [accuracy_per_class(network, zoo.batches(test), 10).mean() for network in (model, edit.model)]
    # The optimizer holds the whole model's parameters; that of the edit what is left of them, and of its averages.
    train(edit.model, edit.optimizer(optimizer), images, labels, inputs_of, teacher=model if options.distill else None)
    accuracies.append(accuracy_per_class(edit.model, zoo.batches(test), 10).mean())
    print("before: {:.1%}, pruned: {:.1%}, trained for an epoch: {:.1%}".format(*accuracies))
