"""Tar: the few things that archives need of it. Plain files only, read as they come, and nothing on a header's word."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from storage.errors import Damaged

_BLOCK = 512
_CHUNK = 1 << 20


def write_member(out: BinaryIO, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644  # no clock, no user: the same line gives the same bytes
    out.write(member.tobuf(tarfile.GNU_FORMAT))
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))


def members_of(archive: BinaryIO) -> Iterator[tuple[str, int]]:
    """Name and size of each member; its bytes are to be read before the next is asked for. Plain files only."""
    while True:
        block = archive.read(_BLOCK)
        if block == bytes(_BLOCK):
            return
        if len(block) < _BLOCK:
            raise Damaged("it ends in the middle")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise Damaged(f"it is not a tar: {error}") from error
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise Damaged(f"{ascii(member.name)[:90]} is not a plain file, but of type {member.type!r}")
        if member.size < 0:
            raise Damaged(f"{ascii(member.name)[:90]} has {member.size} bytes")
        yield member.name, member.size


def read_exactly(archive: BinaryIO, size: int) -> bytes:
    """Exactly `size` bytes and their padding, taken as they come: a header may claim any size."""
    found, left = bytearray(), size
    while left:
        chunk = archive.read(min(left, _CHUNK))
        if not chunk:
            raise Damaged("it ends in the middle")
        found += chunk
        left -= len(chunk)
    if archive.read(-size % _BLOCK) != bytes(-size % _BLOCK):
        raise Damaged("it ends in the middle, or has something between its files")
    return bytes(found)


def end(out: BinaryIO) -> None:
    out.write(bytes(2 * _BLOCK))
