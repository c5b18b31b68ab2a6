"""Held out: which rows are kept from training, by a hash of each row's own content.

The order of the rows, their number and the files they are in do not matter, and equal rows are always on one side. A
row's hash is a number in [0, 1). Below the holdout share it is validation; where there are no test files, the same
share above that is the test split; the rest is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.data.base import Split


def require_share(holdout: float) -> None:
    require(0 <= holdout < 0.5, "holdout", "in [0, 0.5)", holdout)


def content(row: Mapping[str, Any]) -> bytes:
    """The bytes that stand for a row: its columns by name, whatever order or file format they came in."""
    return json.dumps(row, sort_keys=True, default=_plain, separators=(",", ":")).encode()


def part(rows: Iterable[bytes], split: Split, holdout: float, *, has_test: bool) -> list[int]:
    """The numbers of the rows that belong to `split`, of rows given as their contents."""
    if split != "train" and not holdout:
        raise InvalidInput(
            f"the data have no {split} split",
            remedy=f"Name files or a split for it, or set holdout to a share such as 0.1 (now {holdout:g})",
        )
    begins = {"train": holdout * (1 if has_test else 2), "validation": 0.0, "test": holdout}
    ends = {"train": 1.0, "validation": holdout, "test": 2 * holdout}
    found = [number for number, row in enumerate(rows) if begins[split] <= _place(row) < ends[split]]
    if not found:
        raise InvalidInput(
            f"no row falls into the {split} split at holdout {holdout:g}",
            remedy="Raise holdout, or give more data",
        )
    return found


def _place(row: bytes) -> float:
    return int.from_bytes(hashlib.sha256(row).digest()[:6], "big") / 2**48


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    return str(value)  # dates, decimals
