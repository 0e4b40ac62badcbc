"""Models and data of the demo, the tests and the benchmarks: CIFAR ResNets, and a small network for 8 x 8 digits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RESNET_BLOCKS = {"resnet20": 3, "resnet56": 9}
HOW_TO_GET_DATA = """\
Put these files in one folder and name it in the environment variable DISCEDIT_DATA (now: {folder}):
  cifar10_train_batch1.npz      `images` uint8 (n, 32, 32, 3) and `labels` uint8, e.g. the first 10,000 training images
  cifar10_test_first5000.npz    the same for test images
                                (torchvision.datasets.CIFAR10(root, download=True) has both as .data and .targets)
  resnet20_cifar10.safetensors, resnet56_cifar10.safetensors
                                state dicts of the public CIFAR ResNets of Y. Idelbayev ("Proper ResNet Implementation
                                for CIFAR10/CIFAR100 in PyTorch"), without the "module." prefix"""


class DigitsNet(nn.Module):
    """A small convolutional network for 8 x 8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.fc1(x.mean((2, 3))))
        out: Tensor = self.fc2(x)
        return out


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a parameter-free shortcut (option A of He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """The ResNet of He et al. 2016, section 4.2: 6n + 2 layers for 32 x 32 images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for width_in, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            first = BasicBlock(width_in, width, stride)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def data_folder() -> Path:
    """Where the images and weights are: DISCEDIT_DATA, by default ../shared/data from the working directory."""
    return Path(os.environ.get("DISCEDIT_DATA", "../shared/data"))


def _file(name: str) -> Path:
    path = data_folder() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in {data_folder()}.\n" + HOW_TO_GET_DATA.format(folder=data_folder().resolve())
        )
    return path


def cifar_resnet(name: str) -> CifarResNet:
    """A CIFAR ResNet ("resnet20", "resnet56") with its trained weights, in eval mode."""
    if name not in RESNET_BLOCKS:
        raise ValueError(f"cifar_resnet: name must be one of {list(RESNET_BLOCKS)}, got {name!r}.")
    model = CifarResNet(RESNET_BLOCKS[name])
    model.load_state_dict(load_file(_file(f"{name}_cifar10.safetensors")))  # which need no batch norms' counters
    return model.eval()


def cifar10(part: str, *, limit: int | None = None) -> TensorDataset:
    """CIFAR-10 images, normalised as the ResNets expect, with labels; part is "train" or "test"."""
    names = {"train": "cifar10_train_batch1.npz", "test": "cifar10_test_first5000.npz"}
    if part not in names:
        raise ValueError(f"cifar10: part must be 'train' or 'test', got {part!r}.")
    images, labels = cifar10_images(_file(names[part]))
    return TensorDataset(cifar10_inputs(images[:limit]), labels[:limit])


def cifar10_images(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images, uint8 (n, 32, 32, 3), and labels, int64, of a file of arrays that has them as `images` and `labels`."""
    with np.load(path, allow_pickle=False) as archive:
        return torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"].astype(np.int64))


def cifar10_augmented(images: Tensor) -> Tensor:
    """`cifar10_inputs` of images that are mirrored, or not, and moved by up to four pixels each way, black behind."""
    number = len(images)
    there = torch.arange(32).expand(number, 32)
    rows = torch.randint(9, (number, 1)) + there
    columns = torch.randint(9, (number, 1)) + torch.where(torch.rand(number, 1) < 0.5, there, there.flip(1))
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    return cifar10_inputs(padded[torch.arange(number)[:, None, None], rows[:, :, None], columns[:, None]])


def cifar10_inputs(images: Tensor) -> Tensor:
    """What the ResNets expect of images (n, 32, 32, 3), uint8: normalised, (n, 3, 32, 32), float32."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return x.sub_(mean).div_(std).contiguous()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits that ship with scikit-learn: 1,200 images for training, 597 for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def batches(data: TensorDataset, size: int = 256) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data, batch_size=size)


def train_digits_net(data: TensorDataset, *, epochs: int = 12, seed: int = 0) -> DigitsNet:
    """Train `DigitsNet` with Adam: seconds on one core. The caller's random state is left alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = DigitsNet()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        loader = DataLoader(data, batch_size=64, shuffle=True)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval()
