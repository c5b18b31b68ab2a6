"""Streams: bytes that pass by in pieces, so that an object's size does not matter to memory.

    store.write(key, size, checked(pieces_of(path), name, what="model.safetensors"))

An error that the pieces raise, such as a digest that does not fit, reaches `write` before anything became visible.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from storage.errors import Damaged, InvalidInput, Missing

if TYPE_CHECKING:
    from storage.objects import ObjectStore

Bytes = bytes | bytearray | memoryview
PIECE = 4 * 2**20


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
    for piece in pieces:
        found.update(piece)
        size += len(piece)
        yield piece
    if found.hexdigest() != name:
        raise Damaged(
            f"{what} is damaged: its {size:,} bytes have sha256 {found.hexdigest()[:12]}…, its name says {name[:12]}…",
            remedy=remedy,
        )


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
        with written.open("xb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
