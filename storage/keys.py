"""Keys: the names of objects, and how a listing shows them."""

from __future__ import annotations

import re
from typing import NamedTuple

from storage.errors import InvalidInput

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*(/[A-Za-z0-9_\-][A-Za-z0-9_.\-]*)*")


class Listed(NamedTuple):
    """An object as a listing shows it. `modified`: when it was written, in seconds since 1970, by the store's clock."""

    key: str
    bytes: int
    modified: float


def check_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidInput(f"{key!r} is not an object key")
    return key


def check_prefix(prefix: str) -> str:
    """A prefix is the beginning of a key, or empty."""
    if prefix and not _KEY.fullmatch(f"{prefix}x"):
        raise InvalidInput(f"{prefix!r} is not the beginning of an object key")
    return prefix
