"""Streams: bytes that pass by in pieces, so that an object's size does not matter to memory.

    store.write(key, size, checked(pieces_of(path), name, what="model.safetensors"))

An error that the pieces raise, such as a digest that does not fit, reaches `write` before anything became visible.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from storage.errors import Damaged, InvalidInput, Missing
from storage.files import write_all

if TYPE_CHECKING:
    from storage.objects import ObjectStore

Bytes = bytes | bytearray | memoryview
PIECE = 4 * 2**20
_WORTH_A_THREAD = 2**18


def pieces_of(path: Path) -> Iterator[memoryview]:
    """The content of a file."""
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                yield memoryview(piece)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def digest_of(pieces: Iterable[Bytes]) -> tuple[str, int]:
    """sha256 and size of what passes by."""
    found, size = hashlib.sha256(), 0
    for piece in pieces:
        found.update(piece)
        size += len(piece)
    return found.hexdigest(), size


def checked(pieces: Iterable[Bytes], name: str, *, what: str, remedy: str = "") -> Iterator[Bytes]:
    """The pieces again. After the last one, Damaged unless their sha256 is `name`."""
    found, size = hashlib.sha256(), 0
    for piece in _hashed(pieces, found.update):
        size += len(piece)
        yield piece
    if found.hexdigest() != name:
        raise Damaged(
            f"{what} is damaged: its {size:,} bytes have sha256 {found.hexdigest()[:12]}…, its name says {name[:12]}…",
            remedy=remedy,
        )


def _hashed(pieces: Iterable[Bytes], update: Callable[[Bytes], None]) -> Iterator[Bytes]:
    """The pieces again, each hashed beside whoever takes it, if it is large enough for that to be worth a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        for piece in pieces:
            if len(piece) < _WORTH_A_THREAD:
                update(piece)
                yield piece
            else:
                hashed = pool.submit(update, piece)
                yield piece
                hashed.result()  # so that no more than one piece waits, and in order


class Content(Protocol):
    """Bytes to be stored under their sha256. A store that must know the name first asks for it first; one that need
    not asks afterwards, and has it found beside its writing."""

    size: int

    def name(self) -> str:
        """Their sha256."""
        ...

    def pieces(self) -> Iterator[Bytes]:
        """Them, piece by piece."""
        ...


class Held:
    """Content that is in memory."""

    def __init__(self, data: Bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)
        self._name: str | None = None

    def name(self) -> str:
        self._name = self._name or hashlib.sha256(self._data).hexdigest()
        return self._name

    def pieces(self) -> Iterator[Bytes]:
        if self._name or self.size <= PIECE:
            yield self._data
            return
        with ThreadPoolExecutor(1, thread_name_prefix="naming") as pool:
            naming = pool.submit(self.name)
            yield from (self._data[start : start + PIECE] for start in range(0, self.size, PIECE))
            naming.result()


class Filed:
    """Content of a file, which is read once where the name may be found afterwards, and else twice; Damaged if it is
    changed in between."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name: str | None = None
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error

    def name(self) -> str:
        self._name = self._name or digest_of(pieces_of(self._path))[0]
        return self._name

    def pieces(self) -> Iterator[Bytes]:
        if self._name:
            yield from checked(pieces_of(self._path), self._name, what=str(self._path))
            return
        found = hashlib.sha256()
        yield from _hashed(pieces_of(self._path), found.update)
        self._name = found.hexdigest()


def exactly(pieces: Iterable[Bytes], size: int) -> Iterator[Bytes]:
    """The pieces again. InvalidInput unless they are `size` bytes together."""
    left = size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        found = "more" if left < 0 else f"{size - left:,}"
        raise InvalidInput(
            f"{size:,} bytes were announced, {found} came", remedy="Was a file written to while it was read? Run again"
        )


def regrouped(pieces: Iterable[Bytes], size: int, part: int) -> Iterator[bytes | bytearray]:
    """The same `size` bytes in pieces of `part` bytes; only the last may be shorter."""
    gathered, filled, left = bytearray(min(part, size)), 0, size
    for piece in exactly(pieces, size):
        view = memoryview(piece)
        while view:
            take = min(len(view), len(gathered) - filled)
            gathered[filled : filled + take] = view[:take]
            view, filled = view[take:], filled + take
            if filled == len(gathered):
                left -= filled
                yield gathered
                gathered, filled = bytearray(min(part, left)), 0


def copy(source: ObjectStore, target: ObjectStore, key: str) -> int:
    """Copy an object that is named by its sha256, checked on its way; its size. Whole in `target`, or absent."""
    size = source.size(key)
    if size is None:
        raise Missing(f"{key} is not in {source.url}")
    target.write(key, size, checked(source.read(key), key.rpartition("/")[2], what=f"{key} of {source.url}"))
    return size


def save(pieces: Iterable[Bytes], path: Path) -> None:
    """Write a file that is whole or absent."""
    written = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with written.open("xb", buffering=0) as file:
            for piece in pieces:
                write_all(file.fileno(), piece)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
