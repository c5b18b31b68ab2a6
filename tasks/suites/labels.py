"""Labels: the classes of a task as numbers, whether the data write them as numbers or as names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storage.errors import InvalidInput, Mismatch
from tasks.data import Rows
from tasks.data.base import column
from tasks.suites.heads import ClassNames

_SHOWN = 12  # names that an error lists


@dataclass(frozen=True)
class Labels:
    """`classes` of them, 0 and up. `names` are theirs in order, if known."""

    classes: int
    names: ClassNames = None

    @property
    def shown(self) -> Sequence[str]:
        """The names, or the numbers as text."""
        return self.names or [str(number) for number in range(self.classes)]

    def number(self, value: Any, where: str = "a label of the data") -> int:
        """Raises Mismatch for what is no class."""
        if isinstance(value, str) and self.names is not None and value in self.names:
            return self.names.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.classes:
            return value
        if isinstance(value, str) and self.names is None:
            raise Mismatch(
                where,
                expected=f"0 to {self.classes - 1}",
                found=repr(value),
                remedy="List the classes in order where the suite or its head names them, or write labels as numbers",
            )
        listed = "" if self.names is None else f" or one of {', '.join(self.names[:_SHOWN])}"
        more = " ..." if self.names is not None and len(self.names) > _SHOWN else ""
        found = value if isinstance(value, int) else repr(value)
        raise Mismatch(where, expected=f"0 to {self.classes - 1}{listed}{more}", found=found)

    def numbers(self, rows: Rows, name: str) -> Tensor:
        """[N]: the labels of all rows."""
        return torch.tensor([self.number(value) for value in column(rows, name)])

    def check(self, rows: Rows, name: str, split: str) -> None:
        """Look at every label, before anything is trained or scored."""
        for number, value in enumerate(column(rows, name)):
            self.number(value, f"labels of the {split} split, row {number}")


def require_columns(rows: Rows, wanted: tuple[str, ...], split: str, remedy: str) -> None:
    """Refuse rows without these columns, by the first one."""
    if len(rows) == 0:
        raise InvalidInput(f"the {split} split is empty", remedy="Check the path and the split names of the data")
    there = rows[0]
    if any(name not in there for name in wanted):
        raise Mismatch(
            f"columns of the {split} split", expected=", ".join(wanted), found=", ".join(sorted(there)), remedy=remedy
        )
