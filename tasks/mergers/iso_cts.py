"""Iso-CTS (arXiv 2502.04959): Iso-C in a common space, beside directions that single tasks have alone.

Of the sum M of the updates the top C left and right singular vectors are common. Each task adds the top N triplets of
what the common space misses of its update, (I - U_C U_C^T) tau_i; C + T N = k. All are whitened together, and all
singular values become one level.

What a task adds depends on the common space, which every newcomer turns. So the method needs all updates at once.
Shapes: tau [R, C] with K = min(R, C); N directions per task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Joint, Target
from tasks.mergers.orthonormal import Level, Project, by_matrix, is_projected, leading_triplets, level_of, whiten


@dataclass(frozen=True)
class IsoCts(Joint):
    """The joint method over all updates of a line.

    common_space_fraction: share of the singular directions that are common; the tasks divide up the rest equally. The
        common space takes what the division leaves, so it is a little more or less; with few directions or many tasks
        it is everything, and Iso-CTS is Iso-C. 0.8 is the default of fusion_bench.
    level: the value that all singular values of a matrix get.
        rms    their root mean square: the norm of what was taken stays. No data needed
        mean   as printed and as in fusion_bench, for agreement with it
    scale: multiplies the whole delta. The paper's figures come from level mean and a scale chosen on validation data.
    project: which parameters are treated as matrices; all others are averaged.
        matrices   everything with two dimensions, embeddings included (fusion_bench)
        linear     weights of linear layers
        The experts of a layer, which are one tensor [E, R, C], are E matrices either way.

    Directions that the updates do not determine are left out; elsewhere fusion_bench 0.2.33 gives the same, except
    that it breaks where rounding gives the tasks more directions than there are.
    """

    source: ClassVar[str] = "arXiv 2502.04959"

    name: Literal["iso_cts"] = "iso_cts"
    version: Literal[1] = 1
    common_space_fraction: float = 0.8
    level: Level = "rms"
    scale: float = 1.0
    project: Project = "matrices"

    def __post_init__(self) -> None:
        fraction = self.common_space_fraction
        require(0 <= fraction <= 1, "common_space_fraction", "in [0, 1]", fraction)
        require(self.scale > 0, "scale", "positive", self.scale)

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        total = deltas[0]
        for tau in deltas[1:]:
            total = total + tau
        if not is_projected(total, target, self.project):
            return total * (self.scale / len(deltas))
        return by_matrix(self._combined, total, *deltas)

    def _combined(self, total_RC: Tensor, *deltas: Tensor) -> Tensor:
        common, each = _shares(min(total_RC.shape), len(deltas), self.common_space_fraction)
        U_RC, s_C, Vh_CC = leading_triplets(total_RC, common)
        frames = [(U_RC, s_C, Vh_CC)]
        for tau in deltas if each else ():
            own = tau - U_RC @ (U_RC.T @ tau)
            frames.append(leading_triplets(own, each, size=torch.linalg.matrix_norm(tau)))
        U_RK, s_K, Vh_KC = (
            torch.cat(some, dim) for some, dim in zip(zip(*frames, strict=True), (1, 0, 0), strict=True)
        )
        merged_RC: Tensor = whiten(U_RK) @ whiten(Vh_KC) * (level_of(s_K, self.level) * self.scale)
        return merged_RC

    def workspace(self, updates: int) -> float:
        """The deltas and their shares of the directions, and a decomposition with its workspace."""
        return 3 * updates + 16


def _shares(directions: int, tasks: int, fraction: float) -> tuple[int, int]:
    """How many directions are common, and how many each task has: together all of them."""
    each = round((directions - int(directions * fraction)) / tasks)
    each = min(each, directions // tasks)  # at small fractions rounding up would ask for more than there are
    return directions - each * tasks, each
