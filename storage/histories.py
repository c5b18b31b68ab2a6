"""Histories: the journal of a line carried from one store into another, where it may only grow."""

from __future__ import annotations

from collections.abc import Sequence

from storage.errors import Conflict, Missing
from storage.objects import ObjectStore


def read_entries(objects: ObjectStore, name: str, count: int) -> list[bytes]:
    """The first entries of a line as they are stored."""
    return [objects.get(_key(name, number)) for number in range(count)]


def check_same_history(objects: ObjectStore, name: str, entries: Sequence[bytes]) -> None:
    """Conflict unless the line in `objects` begins with `entries`, or they with it, or it is not there."""
    for number, entry in enumerate(entries):
        try:
            there = objects.get(_key(name, number))
        except Missing:
            return
        if there != entry:
            raise Conflict(
                f"line {name!r} has another history in {objects.url}: entry {number} differs",
                remedy=f"Nothing was changed there. Compare `deltaworks line log {name}` of both stores",
            )


def append_entries(objects: ObjectStore, name: str, entries: Sequence[bytes]) -> int:
    """Add what the line in `objects` lacks of `entries`, oldest first. Returns how many."""
    added = 0
    for number, entry in enumerate(entries):
        key = _key(name, number)
        if objects.size(key) is None and objects.create(key, entry):
            added += 1
        elif objects.get(key) != entry:
            raise Conflict(
                f"line {name!r} got another entry {number} in {objects.url} meanwhile",
                remedy=f"Nothing of it was lost. Compare `deltaworks line log {name}` of both stores",
            )
    return added


def _key(name: str, number: int) -> str:
    return f"line/{name}/{number:08d}"
