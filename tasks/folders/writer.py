"""A new Hugging Face folder, written tensor by tensor at places known beforehand, that appears whole or not at all.

The sizes of all tensors are known before the first number is: so headers are written first, and any piece of any
tensor, from any thread, goes straight to its place. Nothing waits in memory for its shard to be full.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import torch
from torch import Tensor

from storage.errors import InvalidInput, StoreFull
from storage.files import write_all
from tasks.folders.reader import INDEX, SINGLE, bytes_of
from tasks.tensors import dtype_name


class Form(NamedTuple):
    """What a tensor of the new folder will look like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends, and is removed if the block fails.

    Raises InvalidInput if the place is taken, StoreFull if the disk is.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        what = "not empty" if place.is_dir() else "not a folder"
        raise InvalidInput(f"{place} is {what}", remedy="Name a new folder; nothing is overwritten")
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield work
        work.chmod(0o755)
        work.replace(place)  # atomic on one file system, and replaces an empty folder
    except OSError as error:
        raise StoreFull(f"cannot write {place}: {error}", remedy="Free some space and run again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


class ShardWriter:
    """Writes tensors of these forms into shards of at most `shard_bytes` (a larger tensor has a shard of its own)."""

    def __init__(self, folder: Path, forms: Mapping[str, Form], shard_bytes: int) -> None:
        self._forms = forms
        self._spots: dict[str, tuple[int, int]] = {}  # name -> descriptor, first byte
        self.files: dict[str, int] = {}  # name -> bytes
        self._descriptors: list[int] = []
        _check_room(folder, forms)
        shards = _shards(forms, shard_bytes)
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(folder / file, names)
        if len(shards) > 1:
            self._write_index(folder, dict(zip(self.files, shards, strict=True)))

    def write(self, name: str, start: int, piece: Tensor) -> None:
        """`piece` as the entries of tensor `name` from `start` on, counted in the flattened tensor."""
        assert piece.dtype == self._forms[name].dtype and piece.is_contiguous()
        if not piece.numel():
            return
        descriptor, first = self._spots[name]
        write_all(descriptor, bytes_of(piece.reshape(-1)), first + start * piece.dtype.itemsize)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _begin(self, path: Path, names: list[str]) -> None:
        """The header of one shard. It ends on a multiple of eight bytes, as the format asks."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            form = self._forms[name]
            ends = [offset, offset + form.bytes]
            header[name] = {"dtype": dtype_name(form.dtype), "shape": list(form.shape), "data_offsets": ends}
            offset = ends[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        first = 8 + len(text)
        os.truncate(descriptor, first + offset)  # a last tensor without entries must be within the file too
        for name in names:
            self._spots[name] = (descriptor, first)
            first += self._forms[name].bytes
        self.files[path.name] = 8 + len(text) + offset

    def _write_index(self, folder: Path, shards: Mapping[str, list[str]]) -> None:
        weights = {name: file for file, names in shards.items() for name in names}
        size = sum(form.bytes for form in self._forms.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _shards(forms: Mapping[str, Form], limit: int) -> list[list[str]]:
    """Names by shard, in their order; within a shard wide dtypes first, so that every tensor is aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, form in forms.items():
        if shards[-1] and size + form.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += form.bytes
    return [sorted(names, key=lambda name: -forms[name].dtype.itemsize) for names in shards]


def _check_room(folder: Path, forms: Mapping[str, Form]) -> None:
    needed, free = sum(form.bytes for form in forms.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise StoreFull(f"{folder.parent} has {free / 1e9:.1f} GB free, the model takes {needed / 1e9:.1f} GB")
