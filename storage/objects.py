"""Object stores: bytes under keys, and the one in memory. Folders are in directory.py, S3 in s3.py, the choice in
address.py.

All three promise the same: `put` is atomic (a reader sees all of the bytes or none), `create` succeeds for exactly one
of several writers, and keys are relative paths of letters, digits and `-_./`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from storage.errors import Missing
from storage.keys import Listed, check_key, check_prefix
from storage.streams import PIECE, Bytes, Content, exactly

Known = Callable[[str], bool]


class ObjectStore(Protocol):
    """What every backend offers. Errors are Missing, Unavailable, StoreFull or InvalidInput, never a foreign one."""

    @property
    def url(self) -> str:
        """The address that `open_objects` turns into this store again."""
        ...

    def ready(self) -> None:
        """Raises if the store cannot be reached, or cannot keep the promise of `create`."""
        ...

    def get(self, key: str) -> bytes:
        """All bytes of `key`. Missing if there is none."""
        ...

    def view(self, key: str) -> memoryview:
        """Like `get`, as writable memory that is the caller's alone; without a copy where the backend can."""
        ...

    def read(self, key: str) -> Iterator[memoryview]:
        """Like `get`, piece by piece: a few MiB at a time, however large it is."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write `data`, replacing what was there. Returns when it is durable."""
        ...

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        """Like `put`, of `size` bytes that come piece by piece. Nothing is visible if fewer come, or they raise."""
        ...

    def add(self, folder: str, content: Content, known: Known) -> str:
        """Write `content` as `folder`/<its sha256>, unless that name is `known`; the sha256."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` if `key` is free; False if it was taken.

        Of several writers of different data exactly one gets True. Writers of equal data may all get it, because a
        lost answer to one's own write cannot be told from a twin's success.
        """
        ...

    def size(self, key: str) -> int | None:
        """Bytes of `key`, None if there is none."""
        ...

    def stat(self, key: str) -> Listed | None:
        """Bytes and time of `key`, None if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`, sorted."""
        ...

    def listed(self, prefix: str) -> Iterator[Listed]:
        """Like `list`, with sizes and times; what is removed meanwhile may be among them or not."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key` if it is there. Only for what no manifest and no journal names: see storage/sweep.py."""
        ...


class MemoryObjects:
    """Objects in a dictionary: for tests and for merges that need no persistence."""

    url = "memory:"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._written: dict[str, float] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise Missing(f"{key} is not in the memory store") from None

    def ready(self) -> None:
        """A dictionary is."""

    def view(self, key: str) -> memoryview:
        return memoryview(bytearray(self.get(key)))

    def read(self, key: str) -> Iterator[memoryview]:
        data = memoryview(self.get(key))
        return (data[start : start + PIECE] for start in range(0, len(data), PIECE))

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[check_key(key)] = bytes(data)
            self._written[key] = time.time()

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        self.put(key, b"".join(exactly(pieces, size)))

    def add(self, folder: str, content: Content, known: Known) -> str:
        return add_once_named(self, folder, content, known)

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = bytes(data)
            self._written[key] = time.time()
            return True

    def size(self, key: str) -> int | None:
        found = self._objects.get(check_key(key))
        return None if found is None else len(found)

    def stat(self, key: str) -> Listed | None:
        with self._lock:
            found = self._objects.get(check_key(key))
            return None if found is None else Listed(key, len(found), self._written[key])

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._lock:
            return iter(sorted(key for key in self._objects if key.startswith(prefix)))

    def listed(self, prefix: str) -> Iterator[Listed]:
        with self._lock:
            found = [Listed(key, len(data), self._written[key]) for key, data in self._objects.items()]
        return iter(sorted(one for one in found if one.key.startswith(check_prefix(prefix))))

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)
            self._written.pop(key, None)


def add_once_named(store: ObjectStore, folder: str, content: Content, known: Known) -> str:
    """`ObjectStore.add` for a store that must know the name of what it is about to take."""
    if not known(content.name()):
        store.write(f"{folder}/{content.name()}", content.size, content.pieces())
    return content.name()
