"""Average: the weighted mean of the updates, which is that of the tuned models (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tasks.mergers.base import Facts, Parts, PlainSum, Target


@dataclass(frozen=True)
class Average(PlainSum):
    """delta_t = sum of w_i tau_i / sum of w_i. The state is the sum; the division happens when the model is written.

    Without weights it is fusion_bench's average and continual average, with them mergekit's `linear`.
    """

    source: ClassVar[str] = "arXiv 2203.05482"

    name: Literal["average"] = "average"
    version: Literal[1] = 1

    @property
    def entrywise(self) -> bool:
        return True

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["sum"] / facts["weight"]
