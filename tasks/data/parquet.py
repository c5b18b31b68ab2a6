"""Parquet: examples in Parquet files, on a disk or on S3, one row each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InvalidInput, Mismatch
from tasks.data import places
from tasks.data.base import Rows
from tasks.data.files import Files
from tasks.data.held_out import content

_LARGE = 256 * 2**20  # bytes of a file that is not unpacked into memory
_AT_ONCE = 1000  # rows


@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """`train` and `test`: files, or patterns such as `data/train-*.parquet`; settings are those of all files."""

    name: Literal["parquet"] = "parquet"
    version: Literal[1] = 1

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names that Hugging Face's writer left in the files; plain Parquet has none."""
        metadata = _schema(places.find(self.test or self.train, "test")[0]).metadata or {}
        try:
            found = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
        except (KeyError, ValueError, TypeError):
            return None
        return tuple(str(name).replace("_", " ") for name in found)

    def _read(self, files: list[Path], limit: int | None) -> Rows:
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
            if limit is not None and sum(len(table) for table in tables) >= limit:
                break
        return TableRows(pa.concat_tables(tables).slice(0, limit))

    def _contents(self, rows: Any) -> Iterable[bytes]:
        for batch in rows.table.to_batches(max_chunksize=_AT_ONCE):
            yield from map(content, batch.to_pylist())


class TableRows(Sequence[dict[str, Any]]):
    """The rows of a table, made into Python objects one at a time, when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TableRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | TableRows:
        if isinstance(index, slice):
            return TableRows(self.table.take(list(range(*index.indices(len(self))))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row: dict[str, Any] = self.table.slice(place, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> Iterator[Any]:
        for chunk in self.table.column(name).chunks:
            yield from chunk.to_pylist()


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
        if path.stat().st_size < _LARGE:
            return pq.read_table(path, columns=columns, partitioning=None)
        return _mapped(places.version(path), None if columns is None else tuple(columns))
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


@lru_cache(maxsize=16)
def _mapped(version: tuple[str, int, int], columns: tuple[str, ...] | None) -> pa.Table:
    """The table in a temporary file that is mapped into memory: the system reads and forgets its pages as it likes.

    Rows are asked for in any order, which a Parquet file cannot answer without unpacking a thousand others. The file
    has no name any more when this returns, so it goes when the table goes.
    """
    source = pq.ParquetFile(version[0])
    with tempfile.NamedTemporaryFile(prefix="deltaworks-rows-", suffix=".arrow") as file:
        batches = source.iter_batches(_AT_ONCE, columns=columns and list(columns))
        schema = source.schema_arrow if columns is None else pa.schema([source.schema_arrow.field(c) for c in columns])
        with pa.ipc.new_file(file.name, schema.with_metadata(source.schema_arrow.metadata)) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


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
