"""Object stores: bytes under keys, in memory or in a directory. The S3 backend is in s3.py, the choice in address.py.

All three promise the same: `put` is atomic (a reader sees all of the bytes or none), `create` succeeds for exactly one
of several writers, and keys are relative paths of letters, digits and `-_./`.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Protocol
from uuid import uuid4

from storage.errors import Missing, StoreFull, Unavailable
from storage.keys import Listed, check_key, check_prefix
from storage.streams import PIECE, Bytes, exactly


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


class DirectoryObjects:
    """Objects as files below one folder. Written beside their place, synced, then moved there in one step."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def ready(self) -> None:
        """A folder is made when something is written; the file system picks the winner of a `create`."""

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Missing(f"{key} is not in {self.root}") from None
        except OSError as error:
            raise Unavailable(f"cannot read {self._path(key)}: {error}") from error

    def view(self, key: str) -> memoryview:
        """A private memory map: pages come from the disk when they are used, and changes never reach it."""
        try:
            with self._path(key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray())
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Missing(f"{key} is not in {self.root}") from None
        except OSError as error:
            raise Unavailable(f"cannot read {self._path(key)}: {error}") from error

    def read(self, key: str) -> Iterator[memoryview]:
        try:
            with self._path(key).open("rb", buffering=0) as file:
                while piece := file.read(PIECE):
                    yield memoryview(piece)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Missing(f"{key} is not in {self.root}") from None
        except OSError as error:
            raise Unavailable(f"cannot read {self._path(key)}: {error}") from error

    def put(self, key: str, data: bytes) -> None:
        self._write(key, len(data), [data], os.replace)

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        self._write(key, size, pieces, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        def link(written: Path, place: Path) -> None:
            os.link(written, place)  # unlike a rename, fails if the name is taken: the file system picks the winner
            written.unlink()

        try:
            self._write(key, len(data), [data], link)
        except _Taken:
            return False
        return True

    def size(self, key: str) -> int | None:
        return None if (found := self.stat(key)) is None else found.bytes

    def stat(self, key: str) -> Listed | None:
        return _listed(key, self._path(key))

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        start = self.root / prefix.rpartition("/")[0]
        found = (path for path in start.rglob("*") if path.is_file() and not path.name.startswith("."))
        keys = (path.relative_to(self.root).as_posix() for path in found)
        return iter(sorted(key for key in keys if key.startswith(prefix)))

    def listed(self, prefix: str) -> Iterator[Listed]:
        found = (_listed(key, self.root / key) for key in self.list(prefix))
        return (one for one in found if one is not None)

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise Unavailable(f"cannot remove {self._path(key)}: {error}") from error

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _write(self, key: str, size: int, pieces: Iterable[Bytes], move: Callable[[Path, Path], None]) -> None:
        place = self._path(key)
        written = place.with_name(f".{uuid4().hex}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(written, "xb") as file:
                for piece in exactly(pieces, size):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            try:
                move(written, place)
            except FileExistsError as error:
                raise _Taken from error
            _sync_folder(place.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(
                    f"no room for {key} ({size:,} bytes) in {self.root}: {error.strerror}",
                    remedy="Free some space and run the same command again; nothing half-written was left",
                ) from error
            raise Unavailable(f"cannot write {place}: {error}") from error
        finally:
            with suppress(OSError):  # whatever kept it from being written also explains why it is not there
                written.unlink(missing_ok=True)


def _listed(key: str, path: Path) -> Listed | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error}") from error
    return Listed(key, found.st_size, found.st_mtime) if S_ISREG(found.st_mode) else None


class _Taken(Exception):
    """The name of a new object is in use."""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
