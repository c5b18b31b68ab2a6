"""Match norm: the merged delta gets the mean norm of the updates, as OPCM does; a scale that needs no data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tasks.choice import Choice, require
from tasks.mergers.base import Facts, Sums, squared_norm


@dataclass(frozen=True)
class MatchNorm(Choice):
    """|delta_t| = factor * mean of |tau_i|, over the whole model (the n_t of OPCM, arXiv 2501.09522, with factor 1).

    It replaces the merger's own scale, whatever that is.
    """

    needs_total: ClassVar[bool] = False

    name: Literal["match_norm"] = "match_norm"
    version: Literal[1] = 1
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.factor > 0, "factor", "positive", self.factor)

    def share(self, delta: Tensor, total: Tensor | None) -> Sums:
        return {"squares": squared_norm(delta)}

    def close(self, facts: Facts, sums: Sums) -> Facts:
        return {"norms": facts.get("norms", 0.0) + math.sqrt(sums["squares"])}

    def measure(self, merged: Tensor) -> Sums:
        return {"squares": squared_norm(merged)}

    def factors(self, names: Sequence[str], count: float, facts: Facts, measured: Sums) -> Mapping[str, float]:
        norm = math.sqrt(measured["squares"])
        factor = self.factor * facts["norms"] / count / norm if norm else 1.0
        return dict.fromkeys(names, factor)
