"""Iso-C (arXiv 2502.04959): the sum of the updates with all its singular values made equal.

The method is a function of the sum M = sum of tau_i alone, M = U diag(sigma) Vh:
    delta = scale * level(sigma) * U Vh
so a running sum streams it exactly; the decomposition happens when the model is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, RunningSum, Sums, Target
from tasks.mergers.orthonormal import Level, Project, by_matrix, is_projected, leading_triplets, level_of


@dataclass(frozen=True)
class IsoC(RunningSum):
    """After every update what the joint method over all updates so far gives.

    level: the value that all singular values of a matrix get.
        rms    their root mean square: the merged matrix keeps the norm of the sum. No data needed; on the digits it
               is better than the mean (README)
        mean   as printed and as in fusion_bench, for agreement with it
    scale: multiplies the whole delta. The paper's figures come from level mean and a scale chosen on validation data.
    project: which parameters are treated as matrices; all others are averaged.
        matrices   everything with two dimensions, embeddings included (fusion_bench)
        linear     weights of linear layers
        The experts of a layer, which are one tensor [E, R, C], are E matrices either way.
    accumulate: dtype of the state, whatever the dtype of the files.

    Weights are ratios: M = T * sum of w_i tau_i / sum of w_i. The level is taken over all min(R, C) singular values.
    In the numerical null space of the sum U and Vh are arbitrary, and nothing is written there: on every direction
    that the updates determine this agrees with fusion_bench 0.2.33, which fills the rest by chance. Directions that
    are merely weak are made as strong as all others: noise of the updates is amplified, which is the method.
    """

    source: ClassVar[str] = "arXiv 2502.04959"

    name: Literal["iso_c"] = "iso_c"
    version: Literal[1] = 1
    level: Level = "rms"
    scale: float = 1.0
    project: Project = "matrices"
    accumulate: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", "positive", self.scale)

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        return super().fold(state, delta.to(getattr(torch, self.accumulate)), target, facts, survey)

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        total = state["sum"]
        if not is_projected(total, target, self.project):
            return total * (self.scale / facts["weight"])
        ratio = facts["count"] / facts["weight"]
        return by_matrix(lambda total_RC: self._flat(total_RC, ratio), total)

    def _flat(self, total_RC: Tensor, ratio: float) -> Tensor:
        U_RK, s_K, Vh_KC = leading_triplets(total_RC, min(total_RC.shape))
        return U_RK @ Vh_KC * (level_of(s_K, self.level) * ratio * self.scale)

    def workspace(self) -> float:
        """A decomposition, its input and its workspace."""
        return 14 if self.accumulate == "float32" else 26
