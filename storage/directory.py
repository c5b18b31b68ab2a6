"""A folder as an object store: a file per object, written beside its place, synced, then moved there in one step."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from uuid import uuid4

from storage.errors import Missing, StoreFull, Unavailable
from storage.files import write_all
from storage.keys import Listed, check_key, check_prefix
from storage.objects import Known, add_once_named
from storage.streams import PIECE, Bytes, Content, exactly

_SYNC_EVERY = 64 * 2**20


class DirectoryObjects:
    """Objects as files below one folder. Written beside their place, synced, then moved there in one step."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._folders = _Folders()

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

    def add(self, folder: str, content: Content, known: Known) -> str:
        """What turns out to be known when it is written is dropped before it costs a sync."""
        if content.size <= PIECE:
            return add_once_named(self, folder, content, known)
        with self._written(self._path(folder), content.size, content.pieces()) as file:
            if not known(content.name()):
                self._settle(file, self._path(f"{folder}/{content.name()}"), os.replace)
        return content.name()

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
        with self._written(place.parent, size, pieces) as file:
            self._settle(file, place, move)

    @contextmanager
    def _written(self, folder: Path, size: int, pieces: Iterable[Bytes]) -> Iterator[FileIO]:
        """A file in `folder` that holds the pieces, to be settled in the block; gone after it if it was not."""
        written = folder / f".{uuid4().hex}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(written, "xb", buffering=0) as file:
                _fill(file.fileno(), exactly(pieces, size))
                yield file
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(
                    f"no room for {size:,} bytes in {folder}: {error.strerror}",
                    remedy="Free some space and run the same command again; nothing half-written was left",
                ) from error
            raise Unavailable(f"cannot write into {folder}: {error}") from error
        finally:
            with suppress(OSError):  # whatever kept it from being written also explains why it is not there
                written.unlink(missing_ok=True)

    def _settle(self, file: FileIO, place: Path, move: Callable[[Path, Path], None]) -> None:
        """Make a file durable, then give it its name, then make the name durable."""
        os.fsync(file.fileno())
        try:
            move(Path(os.fsdecode(file.name)), place)
        except FileExistsError as error:
            raise _Taken from error
        self._folders.sync(place.parent)


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


def _fill(descriptor: int, pieces: Iterable[Bytes]) -> None:
    """Write the pieces. The disk takes what is written while more is, so that little is left to wait for at the end."""
    waiting = 0
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:
        syncing: Future[None] | None = None
        for piece in pieces:
            write_all(descriptor, piece)
            waiting += len(piece)
            if waiting >= _SYNC_EVERY and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()  # the kernel tells of an error only once
                syncing, waiting = pool.submit(os.fdatasync, descriptor), 0
        if syncing is not None:
            syncing.result()


class _Folders:
    """Syncs of folders, shared: a sync makes durable all names that were given before it began, whoever waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun: dict[Path, int] = {}
        self._ended: dict[Path, int] = {}

    def sync(self, folder: Path) -> None:
        """Return when a sync of `folder` that began after this call has succeeded."""
        with self._changed:
            wanted = self._begun.get(folder, 0) + 1
            while self._ended.get(folder, 0) < min(wanted, self._begun.get(folder, 0)):  # one is under way
                self._changed.wait()
            if self._ended.get(folder, 0) >= wanted:
                return
            turn = self._begun[folder] = self._begun.get(folder, 0) + 1
        succeeded = False
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            succeeded = True
        finally:
            with self._changed:
                if succeeded:
                    self._ended[folder] = turn
                else:  # as if it had never begun, so that whoever waits tries again and sees the error too
                    self._begun[folder] = turn - 1
                self._changed.notify_all()
