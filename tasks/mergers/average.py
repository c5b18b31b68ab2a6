"""Average: the mean of the updates, which is the mean of the tuned models (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tasks.choice import Choice
from tasks.mergers.base import Facts, Parts, Sums, Target, counted
from tasks.select import Stream


@dataclass(frozen=True)
class Average(Choice):
    """delta_t = (1/t) sum of tau_i. The state is the sum; the division happens when the model is written."""

    name: Literal["average"] = "average"
    version: Literal[1] = 1

    def survey(self, deltas: Stream) -> Facts:
        return {}

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        return {"sum": delta if state is None else state["sum"] + delta}, {}

    def close(self, facts: Facts, sums: Sums) -> Facts:
        return {"count": counted(facts)}

    def delta(self, state: Parts, facts: Facts) -> Tensor:
        return state["sum"] / facts["count"]
