"""Weights of a Hugging Face folder, read piece by piece: any range of any tensor, without holding the rest.

A safetensors file is eight bytes of length, a JSON header with the place of every tensor, and the tensors. Ranges are
read by position (`pread`) and not mapped: memory holds what is asked for alone, and a file that shrinks under us is
an error instead of a crash. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage.blobs import DTYPES
from storage.errors import InvalidInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SAMPLE = 4096


class Place(NamedTuple):
    """Where a tensor lies: its file, its first byte there, and what the bytes mean."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


class Weights:
    """The tensors of one folder. Use as a context manager: it keeps the files open. Safe to share between threads.

    Raises InvalidInput for pickles, missing shards, unreadable files, and dtypes without arithmetic (8-bit floats).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.places: dict[str, Place] = {}
        for file in self.files:
            for name, place in _header(file).items():
                if name in self.places:
                    raise InvalidInput(f"{folder} has tensor {name!r} twice: in {self.places[name].file} and {file}")
                self.places[name] = place
        _check_index(folder, self.places)
        self._open = {file: os.open(file, os.O_RDONLY) for file in self.files}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` of the flattened tensor, in its own dtype."""
        place = self.places[name]
        found = torch.empty((place.elements if stop is None else stop) - start, dtype=place.dtype)
        if not found.numel():
            return found
        wanted = bytes_of(found)
        at, done = place.offset + start * place.dtype.itemsize, 0
        while done < len(wanted):
            got = os.preadv(self._open[place.file], [wanted[done:]], at + done)
            if not got:
                raise InvalidInput(f"{place.file} ends within tensor {name!r}", remedy="Copy it again")
            done += got
        return found

    def where(self, name: str) -> str:
        """Folder and file of a tensor, for errors."""
        return str(self.places[name].file)

    def fingerprint(self) -> str:
        """A digest of names, shapes and a few bytes of every tensor: the same however the folder is sharded."""
        seen = hashlib.sha256()
        for name in sorted(self.places):
            place = self.places[name]
            seen.update(f"{name}{place.dtype}{place.shape}".encode())
            count = _SAMPLE // place.dtype.itemsize
            for start, stop in ((0, min(count, place.elements)), (max(0, place.elements - count), place.elements)):
                seen.update(bytes_of(self.read(name, start, stop)))
        return seen.hexdigest()


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a flat tensor, to be read into or written from."""
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a single or sharded checkpoint, in the order of their names."""
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", remedy="Name folders with safetensors in them")
    if (folder / INDEX).exists():
        files = sorted({folder / file for file in _weight_map(folder).values()})
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise InvalidInput(f"{folder / INDEX} names shards that are not there: {', '.join(absent)}")
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InvalidInput(
            f"{folder} has weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are read",
            remedy="Load the model where you trust it and save it again: model.save_pretrained(folder)",
        )
    adapter = " (an adapter: merge it into its model first)" if (folder / "adapter_model.safetensors").exists() else ""
    raise InvalidInput(f"{folder} has no {SINGLE} and no {INDEX}{adapter}")


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        if not all(Path(file).name == file for file in found.values()):
            raise ValueError("a shard outside the folder")
        return dict(found)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidInput(f"{index} is not a shard index: {error!r}") from error


def _check_index(folder: Path, places: dict[str, Place]) -> None:
    if not (folder / INDEX).exists():
        return
    for name, file in _weight_map(folder).items():
        if name not in places or places[name].file.name != file:
            raise InvalidInput(f"{folder / file} does not hold {name!r}, as the shard index says")


def _header(file: Path) -> dict[str, Place]:
    try:
        with safe_open(file, framework="pt"):  # the library checks offsets, sizes and overlaps
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{file} is not a readable safetensors file: {error}", remedy="Copy it again") from error
    header.pop("__metadata__", None)
    return {name: _place(file, name, entry, 8 + length) for name, entry in header.items()}


def _place(file: Path, name: str, entry: dict[str, list[int]], start: int) -> Place:
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise InvalidInput(
            f"tensor {name!r} of {file} has dtype {entry['dtype']}, which cannot be merged",
            remedy="Merge the model as it was before quantisation",
        )
    return Place(file, start + entry["data_offsets"][0], dtype, tuple(entry["shape"]))
