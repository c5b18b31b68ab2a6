"""Average: the mean of the updates, which is the mean of the tuned models (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tasks.mergers.base import Facts, Parts, RunningSum


@dataclass(frozen=True)
class Average(RunningSum):
    """delta_t = (1/t) sum of tau_i. The state is the sum; the division happens when the model is written."""

    name: Literal["average"] = "average"
    version: Literal[1] = 1

    def delta(self, state: Parts, facts: Facts) -> Tensor:
        return state["sum"] / facts["count"]
