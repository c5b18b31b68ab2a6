"""Checked: which blobs a verify has found good so far, so that one that was interrupted goes on where it stopped.

A local file, not an object: it is worth nothing to others, and a copied store must not bring the word of its copier.
It is gone once a verify has come to its end, and what it says counts for a day: bytes decay afterwards too.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import TextIO

from storage.manifest import digest

DAY = 24 * 3600.0
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9]+) ([0-9]+)")


class Checked:
    """Lines `<sha256> <bytes> <seconds since 1970>`; a half line, from a process that was killed, says nothing."""

    def __init__(self, path: Path | None = None, age: float = DAY) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self.blobs: dict[str, int] = {}
        if path is not None and path.exists():
            since, until = time.time() - age, time.time()
            for line in path.read_text(errors="replace").splitlines():
                if (match := _LINE.fullmatch(line)) and since <= int(match[3]) <= until:
                    self.blobs[match[1]] = int(match[2])
        self.found_before = len(self.blobs)

    @classmethod
    def of_store(cls, folder: Path, url: str, age: float = DAY) -> Checked:
        """The file of the store at `url` among those in `folder`."""
        return cls(folder / f"{digest(url.encode())[:16]}.txt", age)

    def __contains__(self, blob: str) -> bool:
        return blob in self.blobs

    def add(self, blob: str, size: int) -> None:
        with self._lock:
            self.blobs[blob] = size
            if self._path is None:
                return
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", buffering=1)
                self._file.write("\n")  # ends the half line of a process that was killed
            self._file.write(f"{blob} {size} {int(time.time())}\n")

    def clear(self) -> None:
        """The verify has come to its end: the next one reads everything again."""
        self.close()
        self.blobs, self.found_before = {}, 0
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
