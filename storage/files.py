"""Files: local ones that have their name once they are whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.errors import InvalidInput, StoreFull


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
