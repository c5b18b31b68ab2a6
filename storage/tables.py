"""Tables: rows of scores as Parquet bytes, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import Damaged


def write_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Parquet bytes of `rows`, which all have the same columns. Equal rows give equal bytes for one pyarrow version."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(data: bytes) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"scores are not a Parquet table: {error}") from error
    return rows
