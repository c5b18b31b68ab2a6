"""Scalings: how large the merged delta is written. `AnyScaling` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.scalings.base import Scaling
from tasks.scalings.lines import Lines
from tasks.scalings.match_norm import MatchNorm

AnyScaling = Annotated[MatchNorm | Lines, BY_NAME]

SCALINGS: dict[str, type[AnyScaling]] = choices(AnyScaling)

__all__ = ["SCALINGS", "AnyScaling", "Lines", "MatchNorm", "Scaling"]
