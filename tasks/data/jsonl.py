"""JSON lines: examples in text files, one JSON object a line, each with the columns of one row.

A file is read through once: every line is parsed, so that a broken one is found before anything is trained, and its
place is noted. After that rows are read from the disk when they are asked for, and are never in memory together.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from storage.errors import InvalidInput, Mismatch
from tasks.data import places
from tasks.data.base import Rows
from tasks.data.files import Files
from tasks.data.held_out import content

_SHOWN = 60  # characters of a line that an error quotes


@dataclass(frozen=True, kw_only=True)
class Jsonl(Files):
    """Settings are those of all files; the suite names the columns. Lines may lack columns that nothing asks for."""

    name: Literal["jsonl"] = "jsonl"
    version: Literal[1] = 1

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return None

    def _read(self, files: list[Path], limit: int | None) -> Rows:
        indices = [_index(*places.version(path)) for path in files]
        if self.columns is not None:
            for path, index in zip(files, indices, strict=True):
                missing = [name for name in self.columns if index.first is not None and name not in index.first]
                if missing:
                    raise Mismatch(
                        f"columns of {path}",
                        expected=", ".join(self.columns),
                        found=f"no {', '.join(missing)}; its first line has {', '.join(sorted(index.first or ()))}",
                        remedy="Correct `columns`",
                    )
        return Lines(indices, self.columns, limit)

    def _contents(self, rows: Any) -> Iterable[bytes]:
        return (content(row) for row in rows)


class _Index:
    """An open file and where its lines begin. `first`: the columns of the first line."""

    def __init__(self, path: Path) -> None:
        self.first: list[str] | None = None
        self.starts = array("Q")
        self.path = path
        with open(path, "rb") as file:
            begin = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = _parse(line, f"{path} line {number}")
                    self.first = self.first if self.first is not None else list(row)
                    self.starts.append(begin)
                begin += len(line)
            self.end = begin
        self._descriptor = os.open(path, os.O_RDONLY)  # the file that was looked at, whatever takes its name later

    def read(self, number: int) -> dict[str, Any]:
        begin = self.starts[number]
        end = self.starts[number + 1] if number + 1 < len(self.starts) else self.end
        return _parse(os.pread(self._descriptor, end - begin, begin), f"{self.path}, {begin:,} bytes in")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Lines(Sequence[dict[str, Any]]):
    """The lines of several files as rows."""

    def __init__(self, indices: Sequence[_Index], columns: tuple[str, ...] | None, limit: int | None) -> None:
        self._indices, self._columns = indices, columns
        self._before = [0]
        for index in indices:
            self._before.append(self._before[-1] + len(index.starts))
        self._length = self._before[-1] if limit is None else min(limit, self._before[-1])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file = bisect_right(self._before, place) - 1
        row = self._indices[file].read(place - self._before[file])
        return row if self._columns is None else {name: row.get(name) for name in self._columns}


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidInput(
            f"{where}: expected a JSON object, found {_quoted(line)} ({error})", remedy="Correct the line"
        ) from error
    if not isinstance(row, dict):
        raise InvalidInput(
            f"{where}: expected a JSON object, found {_quoted(line)}", remedy="Write one object a line, as {...}"
        )
    return row


def _quoted(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip()[:_SHOWN])


@lru_cache(maxsize=32)
def _index(path: str, size: int, mtime_ns: int) -> _Index:
    return _Index(Path(path))
