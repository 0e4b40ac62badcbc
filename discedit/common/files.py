"""Reading and writing of discedit's own files: safetensors with a JSON header. Pickle is never loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target and rename, so that a crash never leaves half a file under the real name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system can: not all can, and the file is there either way."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_bytes(kind: str, header: dict[str, Any], tensors: dict[str, Tensor], *, sealed: bool = True) -> bytes:
    """Safetensors whose metadata says what it is; sealed: with a checksum of all of it."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kind": kind, "version": VERSION, **header}
    seal = {"sha256": _checksum(header, stored)} if sealed else {}
    return bytes(save(stored, metadata={"discedit": json.dumps({**header, **seal})}))


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    found = sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def from_bytes(data: bytes, kind: str, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def save_tensors(path: str | os.PathLike[str], kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    write_atomically(Path(path), to_bytes(kind, header, tensors))


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file. ValueError: as `from_bytes`.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{kind} file {str(target)!r} does not exist.")
    return from_bytes(target.read_bytes(), kind, str(target))


def load_json(path: Path, kind: str) -> dict[str, Any]:
    """The object of a JSON file that says what it is.

    Raises:
        ValueError: no text, or not one of discedit's `kind`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} file {str(path)!r} is no text: {error}") from error
    return check_header(text, kind, str(path))


def check_header(text: str | None, kind: str, path: str) -> dict[str, Any]:
    try:
        header = json.loads(text) if text is not None else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else "a foreign one"
        raise ValueError(f"{path!r} is not a discedit {kind} file: it is {found!r}.")
    if header.get("version") != VERSION or isinstance(header["version"], bool):
        raise ValueError(
            f"{kind} file {path!r} has format version {header.get('version')!r}; this discedit reads {VERSION}."
        )
    return header


def field(header: dict[str, Any], name: str, kind: type | tuple[type, ...], path: str | os.PathLike[str]) -> Any:
    """A required header field of the right type, or of one of several."""
    value = header.get(name)
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{str(path)!r} is damaged: its header field {name!r} must be {kinds}, got {value!r}.")
    return value


def nothing_else(
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    known: tuple[dict[str, Any], dict[str, Tensor]],
    path: str | os.PathLike[str],
) -> None:
    """Refuses what a file holds beyond `known`, the header and tensors that were read from it: it would be lost."""
    for what, found, own in (("header field", header, known[0]), ("tensor", tensors, known[1])):
        unknown = sorted(map(str, found.keys() - own.keys() - {"kind", "version"}))
        if unknown:
            raise ValueError(f"{str(path)!r} is damaged: it holds the unknown {what} {unknown[0]!r}.")


def take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, path: str | os.PathLike[str]
) -> Tensor:
    """A required tensor of the right shape and type."""
    value = tensors.get(name)
    if value is None or tuple(value.shape) != shape or value.dtype != dtype:
        found = "nothing" if value is None else f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"{str(path)!r} is damaged: tensor {name!r} must have shape {shape}, {dtype}; found {found}.")
    return value
