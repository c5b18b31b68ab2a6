"""Data sources: where a task's examples come from. `AnyData` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME
from tasks.data.base import Rows, Source, Split
from tasks.data.digits import Digits
from tasks.data.hub import Hub
from tasks.data.jsonl import Jsonl
from tasks.data.parquet import Parquet

AnyData = Annotated[Digits | Parquet | Jsonl | Hub, BY_NAME]

__all__ = ["AnyData", "Digits", "Hub", "Jsonl", "Parquet", "Rows", "Source", "Split"]
