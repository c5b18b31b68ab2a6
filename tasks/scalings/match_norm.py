"""Match norm: the merged delta gets a norm that the updates' norms decide; a scale that needs no data."""

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
    """|delta_t| = factor * the updates' common norm, over the whole model.

    norm
        mean        the mean of |tau_i|: the n_t of OPCM (arXiv 2501.09522)
        quadrature  sqrt of the sum of |tau_i|^2: the norm of the sum of updates that are orthogonal to each other. It
                    grows with their number, as what a model has learned does

    It replaces the merger's own scale, whatever that is. Both are weighted where updates are. One update is written
    as it is, up to the factor and to what the merger takes from it; a merged delta of zeros stays one.
    """

    needs_total: ClassVar[bool] = False

    name: Literal["match_norm"] = "match_norm"
    version: Literal[1] = 1
    norm: Literal["mean", "quadrature"] = "mean"
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.factor > 0, "factor", "positive", self.factor)

    def share(self, delta: Tensor, total: Tensor | None) -> Sums:
        return {"squares": squared_norm(delta)}

    def close(self, facts: Facts, sums: Sums, weight: float = 1.0) -> Facts:
        """Over the updates: `norms`, sum of weight times norm; `squares`, of weight times squared norm; `weight`."""
        squares = sums.get("squares", 0.0)
        return {
            "norms": facts.get("norms", 0.0) + weight * math.sqrt(squares),
            "squares": facts.get("squares", 0.0) + weight * squares,
            "weight": facts.get("weight", 0.0) + weight,
        }

    def measure(self, merged: Tensor) -> Sums:
        return {"squares": squared_norm(merged)}

    def factors(self, names: Sequence[str], count: float, facts: Facts, measured: Sums) -> Mapping[str, float]:
        norm, weight = math.sqrt(measured.get("squares", 0.0)), facts["weight"]
        mean = facts["norms"] / weight
        aim = mean if self.norm == "mean" else math.sqrt(facts["squares"] / weight * count)  # weights are ratios
        return dict.fromkeys(names, self.factor * aim / norm if norm else 1.0)
