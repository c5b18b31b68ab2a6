"""Histories: a journal carried from one store into another, where it may only grow.

Journals are named by the folder that their entries lie in: `line/main`, `series/policy`.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage.errors import Conflict, Missing
from storage.objects import ObjectStore


def read_entries(objects: ObjectStore, journal: str, count: int) -> list[bytes]:
    """The first entries of a journal as they are stored."""
    return [objects.get(_key(journal, number)) for number in range(count)]


def check_same_history(objects: ObjectStore, journal: str, entries: Sequence[bytes]) -> None:
    """Conflict unless the journal in `objects` begins with `entries`, or they with it, or it is not there."""
    for number, entry in enumerate(entries):
        try:
            there = objects.get(_key(journal, number))
        except Missing:
            return
        if there != entry:
            raise Conflict(
                f"{_shown(journal)} has another history in {objects.url}: entry {number} differs",
                remedy=f"Nothing was changed there. Compare {_log(journal)} of both stores",
            )


def append_entries(objects: ObjectStore, journal: str, entries: Sequence[bytes]) -> int:
    """Add what the journal in `objects` lacks of `entries`, oldest first. Returns how many."""
    added = 0
    for number, entry in enumerate(entries):
        key = _key(journal, number)
        if objects.size(key) is None and objects.create(key, entry):
            added += 1
        elif objects.get(key) != entry:
            raise Conflict(
                f"{_shown(journal)} got another entry {number} in {objects.url} meanwhile",
                remedy=f"Nothing of it was lost. Compare {_log(journal)} of both stores",
            )
    return added


def _key(journal: str, number: int) -> str:
    return f"{journal}/{number:08d}"


def _shown(journal: str) -> str:
    folder, _, name = journal.partition("/")
    return f"{folder} {name!r}"


def _log(journal: str) -> str:
    return f"`deltaworks {journal.replace('/', ' log ')}`"
