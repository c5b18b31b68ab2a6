"""MagMax (arXiv 2407.06322): of all updates, the one with the largest magnitude, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target


@dataclass(frozen=True)
class Magmax(Sequential):
    """delta_t = scale * tau_j with j = argmax_i |tau_i| for every entry (section 4 of the paper). Of equal magnitudes
    the later update's counts, as in the released code.

    `scale`: 0.5 is what that code uses for eight independently tuned models, and fusion_bench's default.
    """

    source: ClassVar[str] = "arXiv 2407.06322"
    state_size: ClassVar[str] = "1"

    name: Literal["magmax"] = "magmax"
    version: Literal[1] = 1
    scale: float = 0.5

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", "positive", self.scale)

    @property
    def entrywise(self) -> bool:
        return True

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        if state is None:
            return {"largest": delta}, {}
        before = state["largest"]
        return {"largest": torch.where(delta.abs() >= before.abs(), delta, before)}, {}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["largest"] * self.scale
