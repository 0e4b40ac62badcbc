"""Data of the console command: image folders, .npz archives and whatever a factory gives, as batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from discedit.cli.errors import InputError, explained
from discedit.cli.models import Preprocessing, resolve, some
from discedit.model.forward import Quota, index_samples, map_tensors, unpack_batch
from discedit.moments.stream import has_indices, remade

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MOST_CLASSES = 1 << 20
CPU = torch.device("cpu")


@dataclass(eq=False)
class Images(Dataset[Any]):
    """Labelled images: files, or an array of uint8 (height, width, channels) or float (channels, height, width)."""

    argument: str  # that names them, for messages
    spec: str
    items: list[Path] | np.ndarray[Any, Any]
    labels: Tensor
    class_names: list[str] | None = None
    ignored: int = 0  # files that are no images
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return repr(str(self.items[index])) if isinstance(self.items, list) else f"{index} of {self.spec!r}"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image (channels, height, width), float32, and its label."""
        try:
            with explained("cannot be read"):  # Pillow's errors are of many kinds, by format and damage
                return image_tensor(self.items[index], self.preprocessing), int(self.labels[index])
        except InputError as error:
            raise InputError(f"{self.argument}: image {self.name(index)} {error}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        samples = [self[index] for index in indices]
        for index, (image, _) in zip(indices, samples, strict=True):
            if image.shape != samples[0][0].shape:
                raise InputError(
                    f"{self.argument}: images must all have one size, or --size be given: {self.name(indices[0])} has "
                    f"{times(samples[0][0].shape[1:])}, {self.name(index)} {times(image.shape[1:])}."
                )
        return samples

    def first_of_each_class(self, limit: int | None) -> Tensor:
        """Indices of the first samples of each class, in their order."""
        if limit is None:
            return torch.arange(len(self))
        # A sample's rank in its class: its place among all, sorted by class, less that of the first of its class.
        ordered, order = torch.sort(self.labels, stable=True)
        rank = torch.arange(len(self)) - torch.searchsorted(ordered, ordered)
        return order[rank < limit].sort().values


def open_data(spec: str, argument: str) -> Images | Any:
    """What --data or --test names: `Images`, or the dataset or loader of a factory."""
    path = Path(spec)
    if path.is_dir():
        return open_folder(path, argument)
    if path.is_file() and path.suffix == ".npz":
        return open_archive(path, argument)
    if path.exists() or ":" not in spec or os.sep in spec.partition(":")[0]:
        what = "is neither" if path.exists() else "does not exist"
        raise InputError(f"{argument}: must be an image folder, an .npz file or MODULE:FACTORY; {spec!r} {what}.")
    return resolve(argument, spec)


def open_folder(root: Path, argument: str = "--data") -> Images:
    """root/CLASS/.../image: the classes are the folders in the root, in sorted order; what is hidden is left out.

    Read with Pillow alone: torchvision's ImageFolder, from the same layout, wants the one torch that it was built for.
    """
    shown = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    classes = sorted(entry for entry in shown if entry.is_dir())
    if not classes:
        raise InputError(f"{argument}: an image folder must hold a folder for each class, {str(root)!r} holds none.")
    items: list[Path] = []
    labels: list[int] = []
    ignored = sum(entry.is_file() for entry in shown)
    for label, folder in enumerate(classes):
        files = [Path(place) / name for place, _, names in sorted(os.walk(folder)) for name in sorted(names)]
        files = [file for file in files if not file.name.startswith(".")]
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not images:
            raise InputError(f"{argument}: class folder {str(folder)!r} holds no image ({', '.join(SUFFIXES)}).")
        items += images
        labels += [label] * len(images)
        ignored += len(files) - len(images)
    return Images(argument, str(root), items, torch.tensor(labels), [folder.name for folder in classes], ignored)


def open_archive(path: Path, argument: str = "--data") -> Images:
    """An .npz file with `images`, uint8 (n, height, width[, channels]) or float (n, channels, height, width), and
    `labels`; `class_names` may be in it too."""

    def wrong(rule: str) -> InputError:
        return InputError(f"{argument}: {str(path)!r} must hold {rule}.")

    with (
        explained(f"{argument}: {str(path)!r} is no .npz file that can be read"),
        path.open("rb") as file,  # which numpy leaves open where it fails
        np.load(file, allow_pickle=False) as archive,
    ):
        arrays = {name: np.asarray(archive[name]) for name in archive.files}
    if not {"images", "labels"} <= arrays.keys():
        raise wrong(f"images and labels, it holds {sorted(arrays)}")
    images, labels, names = arrays["images"], arrays["labels"], arrays.get("class_names")
    pictures = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
    if not (pictures or (images.dtype.kind == "f" and images.ndim == 4)) or not images.size:
        raise wrong(
            "images, uint8 of shape (n, height, width) or (n, height, width, 1 or 3), or float of shape (n, channels, "
            f"height, width), not empty; got {images.dtype} {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise wrong(f"labels, one integer for each of {len(images)} images; got {labels.dtype} {labels.shape}")
    for place in np.flatnonzero((labels < 0) | (labels > MOST_CLASSES)):
        raise wrong(f"labels in 0..{MOST_CLASSES}, got {labels[place]} at position {place}")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise wrong(f"class_names as a list of strings, got {names.dtype}")
    images = images[..., None] if images.ndim == 3 else images
    class_names = None if names is None else names.tolist()
    return Images(argument, str(path), images, torch.from_numpy(labels.astype(np.int64)), class_names)


def image_tensor(item: Path | np.ndarray[Any, Any], known: Preprocessing) -> Tensor:
    """One image as the model takes it: (channels, height, width), float32."""
    if isinstance(item, np.ndarray) and item.dtype != np.uint8:
        image = torch.from_numpy(item.astype(np.float32))
        if known.size is not None and known.size != item.shape[1:]:
            size = f"{times(item.shape[1:])}, the model takes {times(known.size)}"
            raise InputError(f"has {size}: float images are taken as they are.")
        if not bool(image.isfinite().all()):
            raise InputError("must be finite, it holds NaN or Inf.")
    else:
        pixels = _pixels(item, known)
        image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
        image = image.permute(2, 0, 1).float().div_(255)
    if known.mean is None or known.std is None:
        return image
    for argument, values in (("--mean", known.mean), ("--std", known.std)):
        if len(values) not in (1, len(image)):
            raise InputError(f"has {len(image)} channels: {argument} must be 1 number or {len(image)}, got {values}.")
    return image.sub_(torch.tensor(known.mean).view(-1, 1, 1)).div_(torch.tensor(known.std).view(-1, 1, 1))


def _pixels(item: Path | np.ndarray[Any, Any], known: Preprocessing) -> np.ndarray[Any, Any]:
    """Of the size and the channels that the model takes: (height, width[, channels]), uint8."""
    if isinstance(item, np.ndarray):
        *sides, channels = item.shape
        whole = known.size in (None, tuple(sides)) and known.resize in (None, min(sides))
        if whole and known.channels in (None, channels):
            return item  # Pillow is optional
    from PIL import Image

    if isinstance(item, np.ndarray):
        picture = Image.fromarray(item[..., 0] if channels == 1 else item)
    else:
        picture = Image.open(item)
    with picture:
        return np.array(fitted(converted(picture, known.channels), known))


def converted(image: Image, channels: int | None) -> Image:
    """The image in grey (1) or red, green and blue (3); None: the one of the two that loses nothing.

    Palettes are looked up, transparency is dropped, 16 bits become 8.
    """
    if image.mode == "F":
        raise InputError("has pixels of floating-point numbers, whose range is not known.")
    if image.mode.startswith("I"):
        from PIL import Image as pillow

        values = np.asarray(image).astype(np.float64) / 257  # 65,535 / 255
        image = pillow.fromarray(values.round().clip(0, 255).astype(np.uint8))
    # By way of RGBA, as Pillow warns where a palette has its transparency in bytes.
    if image.mode == "P":
        image = image.convert("RGBA")
    grey = channels == 1 or (channels is None and image.mode in ("1", "L", "LA", "La"))
    return image.convert("L" if grey else "RGB")


def fitted(image: Image, known: Preprocessing) -> Image:
    """Resized so that the shorter side has the length asked for and the crop fits in, then cropped at the centre."""
    from PIL import Image as pillow

    if known.size is None:
        return image
    height, width = known.size
    scale = max((known.resize or 0) / min(image.size), height / image.height, width / image.width)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if pillow.MAX_IMAGE_PIXELS is not None and wide * high > pillow.MAX_IMAGE_PIXELS:
        raise InputError(f"of {image.height} x {image.width} is too elongated: its shorter side cannot be resized.")
    if (wide, high) != image.size:
        image = image.resize((wide, high), getattr(pillow.Resampling, known.interpolation.upper()))
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return image.crop((left, top, left + width, top + height))


def times(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def number_classes(data: Images, names: list[str] | None) -> str:
    """Gives the classes the numbers that the model knows them by, whose names are in order, and says how.

    Where either has no names, the data's own numbers count, and nothing is said.
    """
    own = data.class_names
    if own is None or names is None or own == names:
        return ""
    places = {name: place for place, name in enumerate(names)}
    how = "matched with the classes by name"
    if not places.keys() & set(own):
        places = {str(place): place for place in range(len(names))}
        how = "named by the numbers of the classes"
    unknown = [name for name in own if name not in places]
    if unknown or not isinstance(data.items, list):
        raise InputError(
            f"{data.argument}: classes must be those of the model, {some(names)}, and folders be named so or by their "
            f"numbers; found {some([repr(name) for name in unknown or own])}."
        )
    data.labels = torch.tensor([places[name] for name in own])[data.labels]
    data.class_names = names
    return f"folders are {how}"


def make_loader(
    source: Images | Any,
    *,
    argument: str,
    dtype: torch.dtype,
    batch_size: int = 1,
    workers: int = 0,
    limit_per_class: int | None = None,
    num_classes: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterable[Any]:
    """(inputs, labels) batches that can be gone through again, in the type that the model runs in.

    Of several ranks, each takes whole batches in turn: so the features do not depend on their number.
    """
    if isinstance(source, Images):
        source, limit_per_class = Subset(source, source.first_of_each_class(limit_per_class).tolist()), None
    indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if indexed and not isinstance(source, (DataLoader, list, tuple, str)):
        source = DataLoader(source, batch_size, num_workers=workers)
    if isinstance(source, (Iterator, tuple, str)) or not isinstance(source, Iterable):
        raise InputError(
            f"{argument}: must give a dataset, or a loader that can be gone through again, it gives a "
            f"{type(source).__name__}."
        )
    if limit_per_class is None and has_indices(source):
        batches = source.batch_sampler if ranks == 1 else list(source.batch_sampler or ())[rank::ranks]
        loader = remade(source, batches)
        loader.collate_fn = partial(_collated, source.collate_fn, dtype)
        return loader
    quota = None if limit_per_class is None else dict.fromkeys(range(num_classes), limit_per_class)
    return _Batches(source, argument, dtype, quota, rank, ranks)


def _collated(collate: Callable[[Any], Any], dtype: torch.dtype, samples: Any) -> Any:
    return _cast(collate(samples), dtype)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@dataclass(frozen=True)
class _Batches:
    """The batches of a loader that has no indices, or of whose samples so many of each class are wanted."""

    loader: Iterable[Any]
    argument: str
    dtype: torch.dtype
    per_class: dict[int, int] | None
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[Any]:
        quota = None if self.per_class is None else Quota(self.per_class)
        for index, batch in enumerate(self.loader):
            samples = 1
            if quota is not None:
                with explained(f"--limit-per-class: needs labels, {self.argument} gives none"):
                    labels = torch.as_tensor(unpack_batch(self.argument, batch, index, CPU, labels_needed=True)[1])
                places = quota.take(labels)
                batch, samples = index_samples(batch, places, len(labels)), len(places)
            if index % self.ranks == self.rank and samples:
                yield _cast(batch, self.dtype)
            if quota is not None and quota.full():
                return
