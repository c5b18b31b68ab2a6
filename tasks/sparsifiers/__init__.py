"""Sparsifiers: steps before a merge that thin an update out. `AnySparsifier` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.sparsifiers.base import Sparsifier
from tasks.sparsifiers.dare import Dare
from tasks.sparsifiers.della import Della

AnySparsifier = Annotated[Dare | Della, BY_NAME]

SPARSIFIERS: dict[str, type[AnySparsifier]] = choices(AnySparsifier)

__all__ = ["SPARSIFIERS", "AnySparsifier", "Dare", "Della", "Sparsifier"]
