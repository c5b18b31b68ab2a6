"""Task arithmetic (arXiv 2212.04089): the sum of the updates, scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, PlainSum, Target


@dataclass(frozen=True)
class TaskArithmetic(PlainSum):
    """delta_t = scale * sum of w_i tau_i; the paper has no weights.

    `scale`: 0.3 is usual for many tasks, and fusion_bench's default, also of its continual variant, which is the same.
    """

    source: ClassVar[str] = "arXiv 2212.04089"

    name: Literal["task_arithmetic"] = "task_arithmetic"
    version: Literal[1] = 1
    scale: float = 0.3

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", "positive", self.scale)

    @property
    def entrywise(self) -> bool:
        return True

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["sum"] * self.scale
