"""Files: local ones that have their name once they are whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.errors import InvalidInput, StoreFull

# Larger writes make Linux look for long runs of free pages; in a virtual machine those are the ones that its host took
# back, and a GiB then takes seconds instead of tenths of a second.
_BITE = 256 * 2**10


def write_all(descriptor: int, data: bytes | bytearray | memoryview, at: int | None = None) -> None:
    """Write all of `data`: where the file stands, or from byte `at` on."""
    view, done = memoryview(data), 0
    while done < len(view):
        bite = view[done : done + _BITE]
        done += os.write(descriptor, bite) if at is None else os.pwrite(descriptor, bite, at + done)


@contextmanager
def whole_file(file: Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends without an error. One that is there is an error, or
    is replaced."""
    if file.exists() and not replace:
        raise InvalidInput(f"{file} is there already", remedy="Choose another name, or remove it first")
    written = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with written.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        written.replace(file)
    except OSError as error:
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else InvalidInput
        raise kind(f"cannot write {file}: {error.strerror or error}", remedy="Nothing was left of it") from error
    finally:
        written.unlink(missing_ok=True)
