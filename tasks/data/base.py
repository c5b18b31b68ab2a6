"""What a data source is: rows of two splits, and a fingerprint of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]
Rows = Sequence[dict[str, Any]]  # column -> value; which columns a suite needs, the suite says


class Source(Protocol):
    def fingerprint(self) -> str:
        """A digest of the examples themselves: the same settings over changed files give another one."""
        ...

    def rows(self, split: Split) -> Rows: ...

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """What the integers of a label column stand for, in order, if the source knows."""
        ...
