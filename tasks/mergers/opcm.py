"""OPCM (arXiv 2501.09522): sequential merging, each update first made orthogonal to what was merged before.

The published step is N = lambda_{t-1} delta_{t-1} + g_t, lambda_t = |N| / n_t, delta_t = N / lambda_t, with n_t the
running mean of the updates' norms. lambda_{t-1} delta_{t-1} is just the unscaled sum S_{t-1}, and the singular vectors
do not depend on its scale. So the state is S, the rescaling is one number per state, and one pass over the tensors
suffices:
    S_t = S_{t-1} + g_t,    delta_t = S_t * n_t / |S_t|

Shapes: S and tau [R, C]; U [R, K], s [K], Vh [K, C] with K = min(R, C); of these the first r are protected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.kinds import is_expert_stack
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, counted, squared_norm
from tasks.mergers.orthonormal import by_matrix
from tasks.spectrum import Thin, leading, numerical_rank, protected, thin_svd


@dataclass(frozen=True)
class Opcm(Sequential):
    """`alpha`: share of the sum of singular values (not of their squares) whose directions are protected.

    g is the newcomer tau without what it has, in the singular bases U, V of S, in the protected part of U' tau V and
    on its diagonal. With 0-based i, j:

    variant
        fixed      protected are the r directions whose sum does not exceed alpha, and of the newcomer its block
                   i, j < r. Every parameter accumulates; the diagonal is removed on the numerical rank only, so that
                   the arbitrary basis of a null space never enters; zero updates and zero states pass through.
        reference  fusion_bench 0.2.33: as fixed, but the diagonal is removed on all of K, so a zero state (whose
                   singular vectors are the unit vectors) costs the newcomer its own diagonal; and parameters that
                   belong to no leaf module (role `bare`) are not accumulated: they keep the first update and shrink
                   with each step.
        paper      the projection as printed: r is the least number of directions whose sum reaches alpha, one more,
                   and all of the newcomer with i < r or j < r goes, on both sides. The rest as in fixed.
    diagonal
        remove     u_i' tau v_i is removed for every i, which alone makes g orthogonal to S.
        leave      only the protected part is removed. A few in ten thousand of a newcomer's energy stay that would
                   have gone, <g, S> is no longer zero, and only the leading vectors are needed: the fast setting.
    project: which parameters are projected; all others are summed.
        linear     weights of linear layers, the head included      matrices   also 2-D embeddings
        A tensor that holds the experts of a layer is a stack of matrices [E, R, C], and they are projected one by one.
    accumulate: dtype of the state and of the projection, whatever the dtype of the files.

    Published figures: the paper's tables come from the code of its own repository (tanganke/opcm, January 2025), which
    is variant `reference` with diagonal `leave`; fusion_bench has removed the diagonal since March 2025, which is
    `reference` with `remove`. Both with alpha 0.5. No published figure is known to belong to `paper`.
    """

    source: ClassVar[str] = "arXiv 2501.09522"
    state_size: ClassVar[str] = "1"

    name: Literal["opcm"] = "opcm"
    version: Literal[2] = 2
    alpha: float = 0.5
    variant: Literal["fixed", "reference", "paper"] = "fixed"
    diagonal: Literal["remove", "leave"] = "remove"
    project: Literal["linear", "matrices"] = "linear"
    accumulate: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        # at alpha = 1 rounding of the cumulated sum decides between protecting everything and nothing
        require(0 <= self.alpha < 1, "alpha", "in [0, 1)", self.alpha)

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        tau = delta.to(getattr(torch, self.accumulate))
        power = squared_norm(tau)
        if state is None:
            merged = tau
        elif not power and self.variant != "reference":
            merged = state["sum"]
        elif self._projected(target, tau):
            merged = by_matrix(self._orthogonal, state["sum"], tau).add_(state["sum"])
        elif self.variant == "reference" and target.role == "bare":
            merged = state["sum"] * facts["scale"]
        else:
            merged = state["sum"] + tau
        return {"sum": merged}, {"update": power, "merged": squared_norm(merged)}

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        """`norms`: sum of the updates' norms. `scale`: n_t / |S_t|, which is 1 / lambda_t."""
        count = counted(facts)
        norms = facts.get("norms", 0.0) + math.sqrt(sums["update"])
        merged = math.sqrt(sums["merged"])
        return {"count": count, "norms": norms, "scale": norms / count / merged if merged else 1.0}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["sum"] * facts["scale"]

    def workspace(self) -> float:
        """A decomposition in float64, its input and its workspace, and the state before and after."""
        return 15 if self.accumulate == "float32" else 26

    def _projected(self, target: Target, tau: Tensor) -> bool:
        roles = ("linear.weight",) if self.project == "linear" else ("linear.weight", "embedding.weight")
        stack = is_expert_stack(target.name, target.role, tau.ndim) and tau.numel() > 0
        return stack or (target.role in roles and tau.ndim == 2)

    def _orthogonal(self, merged_RC: Tensor, tau_RC: Tensor) -> Tensor:
        """g: the part of tau that is added. Wide matrices are turned: then U is the large factor, and V the small."""
        wide = merged_RC.shape[0] < merged_RC.shape[1]
        tall, tau = (merged_RC.T, tau_RC.T) if wide else (merged_RC, tau_RC)
        sided = self.variant == "paper"
        if self.diagonal == "leave":
            found = leading(tall, self.alpha, reach=sided)
            r, rank = len(found.s), 0
        else:
            found = thin_svd(tall)
            r, rank = protected(found.s, self.alpha, reach=sided), len(found.s)
            if self.variant != "reference":
                rank = numerical_rank(found.s, *tall.shape)
        kept = tau_RC
        for left, right in (_cross if sided else _block)(found, tau, r, rank):
            kept = torch.addmm(kept, *((right.T, left.T) if wide else (left, right)), alpha=-1)
        return kept


def _block(found: Thin, tau_RC: Tensor, r: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of what goes of tau if the protected part is the block i, j < r; the diagonal goes up to `rank`.

    Of the products of size R * C * K there are two: U' tau, and the one that is left to the caller.
    """
    end = max(r, rank)
    U_Rk, Vh_kC = found.U[:, :end], found.Vh[:end]
    right_kC = U_Rk.T @ tau_RC
    yield U_Rk, torch.cat([right_kC[:r] @ Vh_kC[:r].T @ Vh_kC[:r], _diagonal(right_kC[r:], Vh_kC[r:])])


def _cross(found: Thin, tau_RC: Tensor, r: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of what goes of tau if all of i < r or j < r is protected; the diagonal goes up to `rank`.

    The full bases of the paper are not needed: with U_r U_r' = P and V_r V_r' = Q, what stays before the diagonal is
    (I - P) tau (I - Q), so what goes is P tau + (tau - P tau) Q.
    """
    end = max(r, rank)
    U_Rk, Vh_kC = found.U[:, :end], found.Vh[:end]
    right_kC = U_Rk.T @ tau_RC
    yield U_Rk, torch.cat([right_kC[:r], _diagonal(right_kC[r:], Vh_kC[r:])])
    yield tau_RC @ Vh_kC[:r].T - U_Rk[:, :r] @ (right_kC[:r] @ Vh_kC[:r].T), Vh_kC[:r]


def _diagonal(right_kC: Tensor, Vh_kC: Tensor) -> Tensor:
    """(u_i' tau v_i) v_i', row by row, from u_i' tau."""
    return (right_kC * Vh_kC).sum(1, keepdim=True) * Vh_kC
