"""A local copy of what is read from a remote store, so that a second read is free.

Only objects that never change are kept: those that are named by the sha256 of their content. A copy is held against
its name when a process first uses it, and dropped if it does not fit. Several processes may share the folder: copies
appear whole, and whoever needs room removes those that were used longest ago. The cache never makes a read or a write
fail; what the store acknowledges is in the store.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from storage.errors import InvalidInput
from storage.files import write_all
from storage.keys import Listed
from storage.objects import Known, ObjectStore
from storage.streams import Bytes, Content

_WRITTEN_ONCE = re.compile(r"(blob|checkpoint|update|state|scores)/([0-9a-f]{64})")
_SCRAP = 3600  # seconds after which a half-written copy is that of a process that ended


class CachedObjects:
    """`below`, with copies of what is read and written in `folder`, up to `limit` bytes of them."""

    def __init__(self, below: ObjectStore, folder: Path, limit: int) -> None:
        self.below, self.folder, self.limit = below, folder.expanduser().absolute(), limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"the cache folder {self.folder} cannot be made: {error.strerror}") from error
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, ...]] = {}  # copies that this process has checked, and what they were then
        self._unseen = limit  # bytes that may have been added since somebody counted; so the first one counts

    @property
    def url(self) -> str:
        return self.below.url

    def ready(self) -> None:
        self.below.ready()

    def get(self, key: str) -> bytes:
        if (found := self._copy(key)) is not None:
            return bytes(found)
        data = self.below.get(key)
        self._keep(key, data)
        return data

    def view(self, key: str) -> memoryview:
        if (found := self._copy(key)) is not None:
            return found
        data = self.below.view(key)
        self._keep(key, data)
        return data

    def read(self, key: str) -> Iterator[memoryview]:
        """Past the cache: who reads in pieces checks or copies the store itself, once."""
        return self.below.read(key)

    def put(self, key: str, data: bytes) -> None:
        self.below.put(key, data)
        self._keep(key, data)

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        self.below.write(key, size, pieces)

    def add(self, folder: str, content: Content, known: Known) -> str:
        return self.below.add(folder, content, known)

    def create(self, key: str, data: bytes) -> bool:
        return self.below.create(key, data)

    def size(self, key: str) -> int | None:
        return self.below.size(key)

    def stat(self, key: str) -> Listed | None:
        return self.below.stat(key)

    def list(self, prefix: str) -> Iterator[str]:
        return self.below.list(prefix)

    def listed(self, prefix: str) -> Iterator[Listed]:
        return self.below.listed(prefix)

    def delete(self, key: str) -> None:
        """In the store and here: what was removed must not be read any more."""
        self.below.delete(key)
        if match := _WRITTEN_ONCE.fullmatch(key):
            with suppress(OSError):
                self._path(match[2]).unlink(missing_ok=True)

    def _copy(self, key: str) -> memoryview | None:
        """The copy as a private memory map, if there is one and it is what its name says."""
        if not (match := _WRITTEN_ONCE.fullmatch(key)):
            return None
        path = self._path(match[2])
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._known.get(key) != seen:
                if hashlib.sha256(data).hexdigest() != match[2]:
                    path.unlink(missing_ok=True)
                    return None
                self._known[key] = seen
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))  # used last: whatever the file system thinks of it
        except (OSError, ValueError):  # not there, or empty and so not to be mapped
            return None
        return data

    def _keep(self, key: str, data: Bytes) -> None:
        if not (match := _WRITTEN_ONCE.fullmatch(key)):
            return
        path = self._path(match[2])
        if not data or len(data) > self.limit // 4:  # not to be mapped, or at the cost of too many others
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return
        written = path.with_name(f".{uuid4().hex}.part")
        with suppress(OSError):  # a full disk, for instance
            try:
                self._make_room(len(data))
                path.parent.mkdir(exist_ok=True)
                with written.open("xb", buffering=0) as file:
                    write_all(file.fileno(), data)
                os.replace(written, path)
            finally:
                written.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the copies used longest ago until `size` bytes fit. Counts only when a tenth may have been added."""
        with self._lock:
            self._unseen += size
            if self._unseen <= self.limit // 10:
                return
            self._unseen = 0
            found = []
            for path in self.folder.glob("*/*"):
                with suppress(OSError):
                    stat = path.stat()
                    if path.name.startswith("."):
                        if time.time() - stat.st_mtime > _SCRAP:
                            path.unlink()
                    else:
                        found.append((stat.st_atime_ns, stat.st_size, path))
            held = sum(one for _, one, _ in found)
            for _, one, path in sorted(found):
                if held + size <= self.limit * 9 // 10:
                    break
                with suppress(OSError):
                    path.unlink()
                    held -= one

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name


def uncached(objects: ObjectStore) -> ObjectStore:
    """The store itself: for those who want to know what is there, not what was."""
    return objects.below if isinstance(objects, CachedObjects) else objects
