"""OPCM (arXiv 2501.09522): sequential merging, each update first made orthogonal to what was merged before.

The published step is N = lambda_{t-1} delta_{t-1} + g_t, lambda_t = |N| / n_t, delta_t = N / lambda_t, with n_t the
running mean of the updates' norms. lambda_{t-1} delta_{t-1} is just the unscaled sum S_{t-1}, and the singular vectors
do not depend on its scale. So the state is S, the rescaling is one number per state, and one pass over the tensors
suffices:
    S_t = S_{t-1} + g_t,    delta_t = S_t * n_t / |S_t|

Shapes: S and tau [R, C]; U [R, K], s [K], Vh [K, C] with K = min(R, C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, counted, squared_norm


@dataclass(frozen=True)
class Opcm(Sequential):
    """`alpha`: share of the sum of singular values whose directions are protected from the newcomer.

    variant
        fixed      every parameter accumulates; the diagonal is removed on the numerical rank only, so that the
                   arbitrary basis of a null space never enters; zero updates and zero states pass through.
        reference  fusion_bench 0.2.33: the diagonal is removed on all of K, so a zero state (whose singular vectors
                   are the unit vectors) costs the newcomer its own diagonal; parameters that belong to no leaf
                   module (role `bare`) are not accumulated: they keep the first update and shrink with each step.
    project: which parameters are projected; all others are summed.
        linear     weights of linear layers, the head included      matrices   also 2-D embeddings
    accumulate: dtype of the state, whatever the dtype of the files.
    """

    source: ClassVar[str] = "arXiv 2501.09522"
    state_size: ClassVar[str] = "1"

    name: Literal["opcm"] = "opcm"
    version: Literal[1] = 1
    alpha: float = 0.5
    variant: Literal["fixed", "reference"] = "fixed"
    project: Literal["linear", "matrices"] = "linear"
    accumulate: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        # at alpha = 1 rounding of the cumulated sum decides between protecting everything and nothing
        require(0 <= self.alpha < 1, "alpha", "in [0, 1)", self.alpha)

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        tau = delta.to(getattr(torch, self.accumulate))
        if state is None:
            merged = tau
        elif self._projected(target, tau):
            merged = state["sum"] + self._orthogonal(state["sum"], tau)
        elif self.variant == "reference" and target.role == "bare":
            merged = state["sum"] * facts["scale"]
        else:
            merged = state["sum"] + tau
        return {"sum": merged}, {"update": squared_norm(tau), "merged": squared_norm(merged)}

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        """`norms`: sum of the updates' norms. `scale`: n_t / |S_t|, which is 1 / lambda_t."""
        count = counted(facts)
        norms = facts.get("norms", 0.0) + math.sqrt(sums["update"])
        merged = math.sqrt(sums["merged"])
        return {"count": count, "norms": norms, "scale": norms / count / merged if merged else 1.0}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["sum"] * facts["scale"]

    def _projected(self, target: Target, tau: Tensor) -> bool:
        roles = ("linear.weight",) if self.project == "linear" else ("linear.weight", "embedding.weight")
        return target.role in roles and tau.ndim == 2

    def _orthogonal(self, merged_RC: Tensor, tau_RC: Tensor) -> Tensor:
        """The part of tau that OPCM adds: no component along the protected block and along u_i v_i^T."""
        if self.variant == "fixed" and not (merged_RC.any() and tau_RC.any()):
            return tau_RC
        U_RK, s_K, Vh_KC = torch.linalg.svd(merged_RC, full_matrices=False)
        share_K = s_K.cumsum(0) / s_K.sum()
        beyond = share_K > self.alpha
        r = int(beyond.int().argmax()) if bool(beyond.any()) else 0
        rank = len(s_K)
        if self.variant == "fixed":
            rank = int((s_K > s_K[0] * max(tau_RC.shape) * torch.finfo(s_K.dtype).eps).sum())
        coefficient_KK = U_RK.T @ tau_RC @ Vh_KC.T
        removed_KK = torch.zeros_like(coefficient_KK)
        removed_KK[:r, :r] = coefficient_KK[:r, :r]
        index = torch.arange(r, rank, device=s_K.device)
        removed_KK[index, index] = coefficient_KK[index, index]
        kept_RC: Tensor = tau_RC - U_RK @ removed_KK @ Vh_KC
        return kept_RC
