"""Data of the console command: image folders, .npz archives and whatever a factory gives, as batches."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from discedit.cli.models import InputError, Preprocessing, called, some
from discedit.model.forward import Quota, chosen, map_tensors
from discedit.moments.calibration import samples_of
from discedit.moments.stream import has_indices, remade

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MOST_CLASSES = 1 << 20
LARGEST = 1 << 13  # height or width
TO_8_BITS = 257  # 65,535 / 255


@dataclass(frozen=True)
class Unreadable:
    """In place of a batch: a worker process hands the message on, where an exception would become its traceback."""

    message: str


class Images(Dataset[Any], ABC):
    """Labelled images. Batches are read as a whole: a tensor (n, channels, height, width), float32, and labels."""

    def __init__(self, spec: str, labels: np.ndarray[Any, Any], class_names: list[str] | None) -> None:
        self.spec = spec
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.class_names = class_names
        self.preprocessing = Preprocessing()
        self._first: tuple[int, ...] | None = None  # shape of the first image

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """One image as the model takes it but for mean and deviation: (channels, height, width), float32.

        Raises:
            InputError: it cannot be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | Unreadable:
        images: list[Tensor] = []
        try:
            for index in indices:
                image = self.pixels(index)
                if images and image.shape != images[0].shape:
                    raise InputError(
                        f"{self.spec}: images must all have one size, or --size be given: {self.name(indices[0])} has "
                        f"{_size(images[0])}, {self.name(index)} {_size(image)}."
                    )
                images.append(image)
            return self._normalised(torch.stack(images)), self.labels[list(indices)]
        except InputError as error:
            return Unreadable(str(error))

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = self.preprocessing.mean, self.preprocessing.std
        if mean is None or std is None:
            return images
        channels = images.shape[1]
        for argument, values in (("--mean", mean), ("--std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    f"{argument}: must be 1 number or {channels}, one for each channel, got {len(values)}."
                )
        shape = (1, -1, 1, 1)
        return images.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))

    def renumbered(self, places: Sequence[int]) -> None:
        """Gives class i the number places[i]."""
        self.labels = torch.tensor(places, dtype=torch.int64)[self.labels]


class Folder(Images):
    """root/CLASS/.../image: the classes are the folders in the root, in sorted order."""

    def __init__(self, root: Path) -> None:
        self._pillow()
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise InputError(f"--data: an image folder must hold a folder for each class, {str(root)!r} holds none.")
        self.files: list[Path] = []
        self.ignored = [entry for entry in root.iterdir() if entry.is_file() and not entry.name.startswith(".")]
        labels: list[int] = []
        for label, name in enumerate(names):
            own = []
            for folder, folders, files in os.walk(root / name):
                folders.sort()
                paths = [Path(folder) / file for file in sorted(files) if not file.startswith(".")]
                own += [path for path in paths if path.suffix.lower() in SUFFIXES]
                self.ignored += [path for path in paths if path.suffix.lower() not in SUFFIXES]
            if not own:
                raise InputError(f"--data: class folder {str(root / name)!r} holds no image ({', '.join(SUFFIXES)}).")
            self.files += own
            labels += [label] * len(own)
        super().__init__(str(root), np.array(labels), names)

    def _pillow(self) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise InputError(
                "image folders need Pillow, which is not installed: pip install 'discedit[cli]'"
            ) from error

    def name(self, index: int) -> str:
        return repr(str(self.files[index]))

    def pixels(self, index: int) -> Tensor:
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as opened:
                opened.load()
                return tensor_of(fitted(converted(opened, self.preprocessing.channels), self.preprocessing))
        except InputError as error:
            raise InputError(f"image {self.name(index)} {error}") from error
        except Exception as error:  # of many kinds, by format and damage
            raise InputError(f"image {self.name(index)} cannot be read: {type(error).__name__}: {error}") from error


class Archive(Images):
    """An .npz file with `images`, uint8 (n, height, width[, channels]) or float (n, channels, height, width), and
    `labels`; `class_names` may be in it too."""

    def __init__(self, path: Path) -> None:
        arrays = _arrays(path)
        for name in ("images", "labels"):
            if name not in arrays:
                raise InputError(f"--data: {str(path)!r} must hold images and labels, it holds {sorted(arrays)}.")
        images, labels = arrays["images"], arrays["labels"]
        self.of_bytes = images.dtype == np.uint8
        right = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)) if self.of_bytes else (
            images.dtype.kind == "f" and images.ndim == 4
        )  # fmt: skip
        if not right or not all(images.shape):
            raise InputError(
                f"--data: images of {str(path)!r} must be uint8 of shape (n, height, width) or (n, height, width, 1 or "
                f"3), or float of shape (n, channels, height, width), not empty; got {images.dtype} {images.shape}."
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise InputError(
                f"--data: labels of {str(path)!r} must be one integer for each of {len(images)} images, got "
                f"{labels.dtype} {labels.shape}."
            )
        if int(labels.min()) < 0 or int(labels.max()) > MOST_CLASSES:
            bad = labels.argmin() if int(labels.min()) < 0 else labels.argmax()
            raise InputError(
                f"--data: labels of {str(path)!r} must lie in 0..{MOST_CLASSES}, got {labels[bad]} at position {bad}."
            )
        names = arrays.get("class_names")
        if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
            raise InputError(f"--data: class_names of {str(path)!r} must be a list of strings, got {names.dtype}.")
        super().__init__(str(path), labels, None if names is None else names.tolist())
        self.images = images[..., None] if images.ndim == 3 else images

    def name(self, index: int) -> str:
        return f"image {index} of {self.spec!r}"

    def pixels(self, index: int) -> Tensor:
        known, image = self.preprocessing, self.images[index]
        channels = image.shape[2] if self.of_bytes else image.shape[0]
        if not self.of_bytes:
            found = torch.from_numpy(image.astype(np.float32))
            if known.size not in (None, tuple(found.shape[1:])):
                raise InputError(
                    f"{self.name(index)} has {_size(found)}, the model takes {_times(known.size)}: float images are "
                    f"taken as they are."
                )
            if not bool(found.isfinite().all()):
                raise InputError(f"{self.name(index)} must be finite, it holds NaN or Inf.")
            return found
        fits = known.size in (None, image.shape[:2]) and known.resize in (None, min(image.shape[:2]))
        if fits and known.channels in (None, channels):
            return torch.from_numpy(image).permute(2, 0, 1).float().div_(255)
        from PIL import Image

        try:
            picture = Image.fromarray(image[..., 0] if channels == 1 else image)
            return tensor_of(fitted(converted(picture, known.channels), known))
        except InputError as error:
            raise InputError(f"{self.name(index)} {error}") from error


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"--data: {str(path)!r} does not exist.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # a damaged zip file raises many kinds
        raise InputError(f"--data: {str(path)!r} is no .npz file that can be read: {error}") from error


def converted(image: Image, channels: int | None) -> Image:
    """The image in grey (1) or red, green and blue (3); None: the one of the two that loses nothing.

    Palettes are looked up, transparency is dropped, 16 bits become 8.

    Raises:
        InputError: pixels without a known range, or another number of channels.
    """
    from PIL import Image as pillow

    if image.mode == "F":
        raise InputError("has pixels of floating-point numbers, whose range is not known.")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / TO_8_BITS
        image = pillow.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA", "La") else 3
    return image.convert("L" if channels == 1 else "RGB")


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


def tensor_of(image: Image) -> Tensor:
    """(channels, height, width), float32, in [0, 1]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).float().div_(255)


def _size(image: Tensor) -> str:
    return _times(tuple(image.shape[1:]))


def _times(size: Iterable[int] | None) -> str:
    return " x ".join(map(str, size or ()))


def open_data(spec: str, argument: str) -> Images | Any:
    """What --data or --test names: `Images`, or the dataset or loader of a factory.

    Raises:
        InputError: nothing that can be read is there. FileNotFoundError: no such file.
    """
    path = Path(spec)
    try:
        if path.is_dir():
            return Folder(path)
        if path.suffix == ".npz":
            return Archive(path)
    except (InputError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("--data:", f"{argument}:", 1)) from error
    if path.exists() or ":" not in spec or os.sep in spec.partition(":")[0]:
        what = "is neither" if path.exists() else "does not exist"
        raise InputError(f"{argument}: must be an image folder, an .npz file or MODULE:FACTORY; {spec!r} {what}.")
    return called(argument, spec)


def number_classes(data: Images, names: list[str] | None, argument: str) -> str:
    """Gives the classes the numbers that the model knows them by.

    Args:
        names: of the model's classes, in order; None: not known, so that the sorted order counts.

    Returns:
        How, for the reader; empty where nothing was decided.

    Raises:
        InputError: a class of the data that is none of the names.
    """
    own = data.class_names
    if own is None or names is None or own == names:
        return ""
    unknown = [name for name in own if name not in names]
    if isinstance(data, Archive):
        raise InputError(f"{argument}: class_names must be those of the model, {some(names)}; got {some(own)}.")
    if unknown == own and all(name.isascii() and name.isdigit() and int(name) < len(names) for name in own):
        data.renumbered([int(name) for name in own])
        data.class_names = names
        return "folders are named by the numbers of the classes"
    if unknown:
        raise InputError(
            f"{argument}: folders must be named as the classes are ({some(names)}) or by their numbers, found "
            f"{some([repr(name) for name in unknown])}."
        )
    data.renumbered([names.index(name) for name in own])
    data.class_names = names
    return "folders are matched with the classes by name"


def check_labels(data: Images, num_classes: int, argument: str) -> None:
    greatest = int(data.labels.max())
    if greatest >= num_classes:
        position = int((data.labels >= num_classes).nonzero()[0])
        raise InputError(
            f"{argument}: labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), "
            f"{data.name(position)} has {int(data.labels[position])}."
        )


class Batches:
    """(inputs, labels) batches that can be gone through again, in the type that the model runs in."""

    def __init__(
        self,
        source: Images | Any,
        *,
        argument: str,
        batch_size: int,
        workers: int,
        dtype: torch.dtype,
        limit_per_class: int | None = None,
        num_classes: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._argument = argument
        self._dtype = dtype
        self._quota = None
        self._rank, self._ranks = rank, ranks
        self.per_class: list[int] | None = None  # samples, where known beforehand
        self.batch_sampler: Iterable[list[int]] | None = None  # indices in each batch of this rank, where there are any
        self._remake: Callable[[Any], Any] | None = None
        if isinstance(source, Images):
            indices = _first_of_each(source.labels, limit_per_class)
            self.per_class = torch.bincount(source.labels[indices], minlength=num_classes).tolist()
            order = indices.tolist()
            whole = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            self._remake = partial(_reading, source, workers)
            self._deal(whole)
            return
        if (
            hasattr(source, "__len__")
            and hasattr(source, "__getitem__")
            and not isinstance(source, (DataLoader, list, tuple, str))
        ):
            source = DataLoader(source, batch_size=batch_size, num_workers=workers)
        if isinstance(source, (Iterator, tuple, str)) or not isinstance(source, Iterable):
            raise InputError(
                f"{argument}: must give a dataset, or a loader that can be gone through again, it gives a "
                f"{type(source).__name__}."
            )
        self._loader: Any = source
        if limit_per_class is not None:
            self._quota = dict.fromkeys(range(num_classes), limit_per_class)
        elif has_indices(source):
            self._remake = partial(remade, source)
            self._deal(source.batch_sampler or ())

    def _deal(self, batches: Iterable[list[int]]) -> None:
        """Whole batches, in turn: so the features do not depend on the number of ranks."""
        assert self._remake is not None
        self.batch_sampler = _Share(batches, self._rank, self._ranks)
        self._loader = self._remake(self.batch_sampler)

    def with_batches(self, batches: Iterable[list[int]]) -> Batches:
        """The same samples in batches of these indices: others are not read."""
        assert self._remake is not None
        other = copy(self)
        other._loader = self._remake(batches)
        return other

    def __iter__(self) -> Iterator[Any]:
        quota = None if self._quota is None else Quota(self._quota)
        for index, batch in enumerate(self._loader):
            if isinstance(batch, Unreadable):
                raise InputError(f"{self._argument}: {batch.message}")
            if quota is not None:
                labels = _labels_of(batch, self._argument)
                batch = chosen(batch, quota.take(labels), len(labels))
            mine = self.batch_sampler is not None or index % self._ranks == self._rank
            if mine and (quota is None or samples_of(self._argument, batch)):
                yield map_tensors(batch, self._cast)
            if quota is not None and quota.full():
                return

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Share:
    """Every so many of the batches."""

    batches: Iterable[list[int]]
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.batches, self.rank, None, self.ranks)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.batches), self.ranks))  # type: ignore[arg-type]


def _reading(images: Images, workers: int, batches: Any) -> DataLoader[Any]:
    return DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def _first_of_each(labels: Tensor, limit: int | None) -> Tensor:
    """Indices of the first samples of each class, in their order."""
    if limit is None:
        return torch.arange(len(labels))
    ordered, order = torch.sort(labels, stable=True)
    rank = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)
    return order[rank < limit].sort().values


def _labels_of(batch: Any, argument: str) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, dict) else batch[1] if len(batch) == 2 else None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--limit-per-class: needs labels, {argument} gives none.") from error
    return found


def parse_size(text: str) -> tuple[int, int]:
    """ "224" or "224x160" (height x width)."""
    parts = text.lower().split("x")
    sizes = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(sizes) != len(parts) or len(sizes) > 2 or not all(1 <= size <= LARGEST for size in sizes):
        raise ValueError(f"must be N or HEIGHTxWIDTH, from 1 to {LARGEST}, got {text!r}")
    return sizes[0], sizes[-1]


def parse_numbers(text: str) -> tuple[float, ...]:
    """ "0.5" or "0.485,0.456,0.406"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"must be finite numbers with commas between, got {text!r}")
    return values
