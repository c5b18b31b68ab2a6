"""Continual TIES: TIES (arXiv 2306.01708) between what is merged already and the newcomer, one newcomer at a time.

A baseline of sequential merging (arXiv 2501.09522 compares with it). Unlike `ties`, which holds the joint method's
sums, it keeps the merged delta alone:
    delta_1 = scale * tau_1,    delta_t = delta_{t-1} + scale * TIES(delta_{t-1}, tau_t)
so that what was merged before is counted again with every update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target
from tasks.mergers.ties import above, balance, sign_of, threshold
from tasks.select import Stream


@dataclass(frozen=True)
class ContinualTies(Sequential):
    """`density`: fraction kept of the merged delta and of the newcomer, each trimmed as a whole model (as `ties` with
    trim model does). `scale`: of what every step adds. `aggregate`: of the one or two values that agree in sign their
    sum, their mean, or the one of the larger magnitude.

    The defaults are fusion_bench's, with which the tables of arXiv 2501.09522 and 2505.11883 were made: 0.2, 0.5, sum.
    Entries whose two values cancel take the majority sign of the step. An update of zeros changes nothing; fusion_bench
    would count the merged delta again.
    """

    source: ClassVar[str] = "arXiv 2306.01708, continual as in arXiv 2501.09522"
    state_size: ClassVar[str] = "1"

    name: Literal["continual_ties"] = "continual_ties"
    version: Literal[1] = 1
    density: float = 0.2
    scale: float = 0.5
    aggregate: Literal["sum", "mean", "max"] = "sum"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        require(self.scale > 0, "scale", "positive", self.scale)

    def survey(self, deltas: Stream, merged: Stream | None) -> Facts:
        """The smallest magnitudes kept of both, the majority of the elected signs, and whether the update is zero."""
        if merged is None:
            return {}
        new, old = threshold(deltas, self.density), threshold(merged, self.density)
        lead, something = 0.0, False
        for tau, before in zip(deltas(), merged(), strict=True):
            something = something or bool(tau.any())
            lead += balance(above(before, old) + above(tau, new))
        return {"threshold": new, "merged_threshold": old, "majority": sign_of(lead), "zero": float(not something)}

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        if state is None:
            return {"merged": delta * self.scale}, {}
        before = state["merged"]
        if survey["zero"]:
            return {"merged": before}, {}
        both = above(before, survey["merged_threshold"]), above(delta, survey["threshold"])
        return {"merged": before + self.scale * self._agreed(*both, survey["majority"])}, {}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["merged"]

    def workspace(self) -> float:
        """Both tensors, both trimmed, both agreeing, the signs, the sum, and masks."""
        return 10

    def _agreed(self, one: Tensor, other: Tensor, majority: float) -> Tensor:
        """Election and disjoint merge of two trimmed tensors."""
        sign = (one + other).sign()
        sign = torch.where(sign == 0, majority, sign)
        agreeing = [torch.where(value.sign() == sign, value, 0) for value in (one, other)]
        if self.aggregate == "max":
            return torch.where(agreeing[0].abs() >= agreeing[1].abs(), agreeing[0], agreeing[1])
        merged = agreeing[0] + agreeing[1]
        if self.aggregate == "mean":
            return torch.where((agreeing[0] != 0) & (agreeing[1] != 0), merged / 2, merged)
        return merged
