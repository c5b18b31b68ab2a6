"""Model Breadcrumbs (arXiv 2312.06795): the sum of the updates without their smallest and their largest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, RunningSum, Sums, Target
from tasks.select import largest


@dataclass(frozen=True)
class Breadcrumbs(RunningSum):
    """delta_t = scale * sum of w_i mask(tau_i), masks tensor by tensor.

    density: fraction of a tensor's entries that is kept, int(density n) of n but at least one
    gamma:   fraction of the largest entries that is dropped, int(gamma n); what density then leaves is dropped of the
             smallest. Where both do not fit, fewer of the largest are dropped.
    scale:   of the merged delta, as in task arithmetic

    The names are mergekit's, whose guide suggests 0.9 and 0.01 (its own default of density, 1, drops nothing): the
    paper's two thresholds are the fractions dropped at the top, gamma, and at the bottom, 1 - density - gamma. Where
    int(gamma n) is 0 mergekit zeroes the tensor, by mistake; here nothing is dropped at the top.
    """

    source: ClassVar[str] = "arXiv 2312.06795"

    name: Literal["breadcrumbs"] = "breadcrumbs"
    version: Literal[1] = 1
    density: float = 0.9
    gamma: float = 0.01
    scale: float = 0.3

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        require(0 <= self.gamma < 1, "gamma", "in [0, 1)", self.gamma)
        require(self.scale > 0, "scale", "positive", self.scale)

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        return super().fold(state, self.thinned(delta), target, facts, survey)

    def thinned(self, delta: Tensor) -> Tensor:
        """`delta` with both tails zero."""
        count = delta.numel()
        kept = max(int(self.density * count), min(count, 1))
        top = min(int(self.gamma * count), count - kept)
        return torch.where(largest(delta, top + kept) & ~largest(delta, top), delta, 0)

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["sum"] * self.scale
