"""What a data source is: rows of up to three splits, and a fingerprint of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]
Rows = Sequence[dict[str, Any]]  # column -> value; which columns a suite needs, the suite says


class Source(Protocol):
    def fingerprint(self) -> str:
        """A digest of the examples themselves: the same settings over changed files give another one."""
        ...

    def rows(self, split: Split) -> Rows:
        """Raises InvalidInput if there is no such split, or nothing in it."""
        ...

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """What the integers of a label column stand for, in order, if the source knows."""
        ...


class Selected(Sequence[dict[str, Any]]):
    """Some of the rows, by their numbers."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selected(self._rows, self._numbers[index])
        return self._rows[self._numbers[index]]

    def column(self, name: str) -> Iterator[Any]:
        whole = list(column(self._rows, name))
        return (whole[number] for number in self._numbers)


def column(rows: Any, name: str) -> Iterator[Any]:
    """The values of one column, without reading the others where the rows can: images are slow to decode."""
    if hasattr(rows, "column"):
        yield from rows.column(name)
    elif hasattr(rows, "column_names"):  # a data set of the hub
        yield from rows[name]
    else:
        for number in range(len(rows)):
            yield rows[number].get(name)
