"""Doctor: try out what a store must be able to do, in a place beside the data that is removed afterwards.

For a folder this asks the file system (a network share may have no hard links), for S3 the server: what it does, not
what it says that it does.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import uuid4

from storage.cache import uncached
from storage.conditions import Conditional, examine
from storage.directory import DirectoryObjects
from storage.errors import DeltaworksError, InvalidInput
from storage.objects import MemoryObjects, ObjectStore

_TIMES = 10
_KEYS = ("b/2", "a/10", "a-/1", "a/1", "b/1")
RACES = 6
_JOURNALS = "What is named by its content can be stored here, but no journal: merges into lines are refused"


@dataclass(frozen=True)
class Check:
    """`bad`: a store without this is refused or unsafe. `note`: it works, and something is worth knowing."""

    what: str
    verdict: Literal["good", "note", "bad"]
    said: str


class Ward(Protocol):
    """What is particular to one kind of store."""

    def beside(self) -> AbstractContextManager[ObjectStore]:
        """An empty store in the same place, which is removed when the block ends."""
        ...

    def conditional(self, scratch: ObjectStore) -> Conditional:
        """Whether `create` keeps its promise."""
        ...

    def more(self, scratch: ObjectStore) -> Iterator[Check]:
        """Checks that only this kind has."""
        ...


def diagnose(objects: ObjectStore) -> Iterator[Check]:
    """The checks, one by one as they are made. An error that keeps the others from being made is the last one."""
    objects = uncached(objects)
    ward: Ward = FolderWard(objects)
    if objects.url.startswith("s3:"):
        from storage.s3_doctor import S3Ward  # boto3 takes half a second to import: only for those who need it

        ward = S3Ward(objects)
    try:
        with ward.beside() as scratch:
            yield from _basics(scratch)
            yield _one_winner(ward, scratch)
            yield from ward.more(scratch)
    except DeltaworksError as error:
        yield Check("the other checks", "bad", str(error))


class FolderWard:
    """Folders; and memory, of which there is not much to ask."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    @contextmanager
    def beside(self) -> Iterator[ObjectStore]:
        if not isinstance(self._objects, DirectoryObjects):
            yield MemoryObjects()
            return
        folder = self._objects.root / f".doctor-{uuid4().hex}"
        try:
            yield DirectoryObjects(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def conditional(self, scratch: ObjectStore) -> Conditional:
        return examine(scratch.create, scratch.get, "create-", rounds=RACES)

    def more(self, scratch: ObjectStore) -> Iterator[Check]:
        return iter(())


def _basics(scratch: ObjectStore) -> Iterator[Check]:
    for number, key in enumerate(_KEYS):
        scratch.put(key, f"{number}".encode())
    if [*scratch.list("")] == sorted(_KEYS) and [*scratch.list("a/")] == ["a/1", "a/10"]:
        yield Check("lists", "good", "complete, as soon as something is written")
    else:
        yield Check("lists", "bad", f"{len(_KEYS)} objects were written, and {[*scratch.list('')]} are listed")
    stale = 0
    for number in range(_TIMES):
        scratch.put("again", f"{number}".encode())
        stale += scratch.get("again") != f"{number}".encode()
    if stale:
        yield Check("reads see the last write", "bad", f"{stale} of {_TIMES} reads gave an older version")
    else:
        yield Check("reads see the last write", "good", f"{_TIMES} times of {_TIMES}")
    uses: dict[str, Callable[[], object]] = {
        "put": lambda: scratch.put("small", b"x" * 1000),
        "get": lambda: scratch.get("small"),
        "size": lambda: scratch.size("small"),
    }
    said = ", ".join(f"{name} {1000 * _median(use):.1f} ms" for name, use in uses.items())
    yield Check("time for 1 kB", "good", said)


def _one_winner(ward: Ward, scratch: ObjectStore) -> Check:
    what = "one winner of a create"
    try:
        found = ward.conditional(scratch)
    except InvalidInput as error:  # a server that says that it cannot
        return Check(what, "bad", str(error))
    return Check(what, "good", found.said) if found.holds else Check(what, "bad", f"{found.said}. {_JOURNALS}")


def _median(use: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        use()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
