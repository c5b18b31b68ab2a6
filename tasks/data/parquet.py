"""Parquet: examples in Parquet files on a disk, one row each."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InvalidInput, Mismatch
from tasks.choice import Choice, require
from tasks.data.base import Rows, Split


@dataclass(frozen=True)
class Parquet(Choice):
    """`train` and `test`: files, or patterns such as `data/train-*.parquet`. They are read in the order of their paths.

    `columns`: the columns to read, all if not given; name them where others are large. `limit` keeps only the first
    rows of a split.
    """

    name: Literal["parquet"] = "parquet"
    version: Literal[1] = 1
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.train), "train", "one or more files or patterns", list(self.train))
        require(bool(self.test), "test", "one or more files or patterns", list(self.test))
        require(self.columns is None or len(self.columns) > 0, "columns", "names, or left out", self.columns)
        require(self.limit is None or self.limit > 0, "limit", "positive", self.limit)

    def fingerprint(self) -> str:
        """Depends on what is in the files and on which rows are taken, not on where the files are."""
        splits: tuple[Split, ...] = ("train", "test")
        files = {split: [_digest(path) for path in self._files(split)] for split in splits}
        selection = {"columns": self.columns, "limit": self.limit}
        return hashlib.sha256(json.dumps([files, selection], sort_keys=True).encode()).hexdigest()

    def rows(self, split: Split) -> Rows:
        files = self._files(split)
        columns = list(self.columns) if self.columns is not None else None
        tables: list[pa.Table] = []
        first: pa.Schema | None = None
        for path in files:
            table = _read(path, columns)
            if first is None:
                first = table.schema
            elif not table.schema.equals(first):
                raise Mismatch(
                    f"columns of {path}",
                    expected=f"those of {files[0]}, {_columns(first)}",
                    found=_columns(table.schema),
                    remedy="Name the columns that all files share in `columns`, or write the files with one schema",
                )
            tables.append(table)
            if self.limit is not None and sum(len(table) for table in tables) >= self.limit:
                break
        whole = pa.concat_tables(tables).slice(0, self.limit)
        if len(whole) == 0:
            raise InvalidInput(
                f"the {split} split is empty: expected rows in {', '.join(map(str, files))}, found none",
                remedy="Check the patterns, or write the files again",
            )
        return TableRows(whole)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names that Hugging Face's writer left in the files; plain Parquet has none."""
        metadata = _schema(self._files("test")[0]).metadata or {}
        try:
            found = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
        except (KeyError, ValueError, TypeError):
            return None
        return tuple(str(name).replace("_", " ") for name in found)

    def _files(self, split: Split) -> list[Path]:
        found: set[Path] = set()
        for pattern in self.train if split == "train" else self.test:
            matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
            if not matches:
                raise InvalidInput(
                    f"no file matches {pattern!r} of the {split} split",
                    remedy="Check the path; a relative one starts from the folder that the command is run in",
                )
            found.update(Path(match) for match in matches)
        folders = sorted(path for path in found if path.is_dir())
        if folders:
            raise InvalidInput(f"{folders[0]} is a folder", remedy=f"Name its files: {folders[0]}/*.parquet")
        return sorted(found)


class TableRows(Sequence[dict[str, Any]]):
    """The rows of a table, made into Python objects one at a time, when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TableRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | TableRows:
        if isinstance(index, slice):
            return TableRows(self._table.take(list(range(*index.indices(len(self))))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row: dict[str, Any] = self._table.slice(place, 1).to_pylist()[0]
        return row


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    missing = [column for column in columns or () if column not in _schema(path).names]
    if missing:
        raise Mismatch(
            f"columns of {path}",
            expected=", ".join(columns or ()),
            found=f"no {', '.join(missing)}; the file has {_columns(_schema(path))}",
            remedy="Correct `columns`",
        )
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> InvalidInput:
    size = path.stat().st_size
    return InvalidInput(
        f"{path}: expected a whole Parquet file, found {size:,} bytes that cannot be read as one ({error})",
        remedy="Copy or download it again",
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of_version(path, state.st_size, state.st_mtime_ns)


@cache
def _digest_of_version(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, once per process as long as the file does not change: it is asked for before every step."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
