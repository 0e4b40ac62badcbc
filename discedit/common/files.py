"""Reading and writing of discedit's own files: safetensors with a JSON header. Pickle is never loaded."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = 1
Source = str | os.PathLike[str]
Tensors = dict[str, Tensor]
Header = dict[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target and rename, so that a crash never leaves half a file under the real name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            # On the disk before it has its name: a crash could else leave the name without the data.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # Makes the rename last, where the system can: not all can, and the file is there either way.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(kind: str, header: Header, tensors: Tensors, *, sealed: bool = True) -> bytes:
    """Safetensors whose metadata says what it is; sealed: with a checksum of all of it."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kind": kind, "version": VERSION, **header}
    seal = {"sha256": _checksum(header, stored)} if sealed else {}
    return bytes(save(stored, metadata={"discedit": json.dumps({**header, **seal})}))


def _checksum(header: Header, tensors: Tensors) -> str:
    found = sha256(json.dumps(header).encode())
    # Sorted, as safetensors gives tensors back in an order of its own.
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def from_bytes(data: bytes, kind: str, source: str) -> tuple[Header, Tensors]:
    """Header and tensors of what `to_bytes` made.

    Raises:
        ValueError: the data is cut short, changed, is no safetensors, or is not one of discedit's `kind`.
    """
    try:
        tensors = load(data)
        # The parse above has checked the lengths; its result leaves the metadata out.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{kind} file {source!r} is damaged, cut short or no safetensors file: {error}") from error
    header = check_header(metadata.get("discedit"), kind, source)
    checksum = header.pop("sha256", None)  # files of discedit 0.1.0 have none
    if checksum is not None and checksum != _checksum(header, tensors):
        raise ValueError(f"{kind} file {source!r} is damaged: its contents do not fit its checksum.")
    return header, tensors


def save_tensors(path: Source, kind: str, header: Header, tensors: Tensors) -> None:
    write_atomically(Path(path), to_bytes(kind, header, tensors))


def load_tensors(path: Source, kind: str) -> tuple[Header, Tensors]:
    """Header and tensors of a file that `save_tensors` wrote. FileNotFoundError; ValueError as `from_bytes`."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{kind} file {str(target)!r} does not exist.")
    return from_bytes(target.read_bytes(), kind, str(target))


def load_json(path: Path, kind: str) -> Header:
    """The object of a JSON file that says what it is. ValueError: no text, or not one of discedit's `kind`."""
    try:
        return check_header(path.read_text(encoding="utf-8"), kind, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} file {str(path)!r} is no text: {error}") from error


def check_header(text: str | None, kind: str, path: str) -> Header:
    header: Any = None
    with suppress(ValueError):
        header = json.loads(text) if text is not None else None
    found = header.get("kind") if isinstance(header, dict) else "a foreign one"
    if not isinstance(header, dict) or found != kind:
        raise ValueError(f"{path!r} is not a discedit {kind} file: it is {found!r}.")
    format_of = header.get("version")
    if format_of != VERSION or isinstance(format_of, bool):
        raise ValueError(f"{kind} file {path!r} has format version {format_of!r}; this discedit reads {VERSION}.")
    return header


def field(header: Header, name: str, kind: type | tuple[type, ...], path: Source) -> Any:
    """A required header field of the right type, or of one of several."""
    value = header.get(name)
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{str(path)!r} is damaged: its header field {name!r} must be {kinds}, got {value!r}.")
    return value


def take(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: torch.dtype, path: Source) -> Tensor:
    """A required tensor of the right shape and type."""
    value = tensors.get(name)
    if value is None or tuple(value.shape) != shape or value.dtype != dtype:
        found = "nothing" if value is None else f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"{str(path)!r} is damaged: tensor {name!r} must have shape {shape}, {dtype}; found {found}.")
    return value


def nothing_else(header: Header, tensors: Tensors, known: tuple[Header, Tensors], path: Source) -> None:
    """Refuses what a file holds beyond `known`, the header and tensors that were read from it: it would be lost."""
    for what, found, own in (("header field", header, known[0]), ("tensor", tensors, known[1])):
        unknown = sorted(map(str, found.keys() - own.keys() - {"kind", "version"}))
        if unknown:
            raise ValueError(f"{str(path)!r} is damaged: it holds the unknown {what} {unknown[0]!r}.")
