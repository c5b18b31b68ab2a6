"""Held out: which rows are kept from training, by a hash of each row's own content.

The order of the rows, their number and the files they are in do not matter, and equal rows are always on one side. A
row's hash is a number in [0, 1). What lies below the holdout share is the validation split, the same share above that
the test split; a split that has files of its own takes no part in this, and the rest is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.data.base import Split


def require_share(holdout: float) -> None:
    require(0 <= holdout < 0.5, "holdout", "in [0, 0.5)", holdout)


def spec_without_holdout(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without settings of holding out that are not used: what was made before there were any is still found."""
    unset = {"holdout": 0, "validation": [], "validation_split": None}
    return {name: value for name, value in spec.items() if not (name in unset and value == unset[name])}


def content(row: Mapping[str, Any]) -> bytes:
    """The bytes that stand for a row: its columns by name, whatever order or file format they came in."""
    return json.dumps(row, sort_keys=True, default=_plain, separators=(",", ":")).encode()


def part(rows: Iterable[bytes], split: Split, holdout: float, own: Collection[Split]) -> list[int]:
    """The numbers of the rows that belong to `split`, of rows given as their contents. `own`: splits with own files."""
    if split != "train" and not holdout:
        raise InvalidInput(
            f"the data have no {split} split",
            remedy="Name files or a split for it, or set holdout to the share of the training rows that it takes",
        )
    found = [number for number, row in enumerate(rows) if _split_of(row, holdout, own) == split]
    if not found:
        raise InvalidInput(
            f"no row falls into the {split} split at holdout {holdout:g}",
            remedy="Raise holdout, or give more data",
        )
    return found


def _split_of(row: bytes, holdout: float, own: Collection[Split]) -> Split:
    place = int.from_bytes(hashlib.sha256(row).digest()[:6], "big") / 2**48
    if place < holdout and "validation" not in own:
        return "validation"
    if holdout <= place < 2 * holdout and "test" not in own:
        return "test"
    return "train"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    return str(value)  # dates, decimals
