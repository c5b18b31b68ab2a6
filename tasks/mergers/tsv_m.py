"""TSV-M (arXiv 2412.00081), streamed: the strongest directions of every task, made orthogonal.

The joint method gives each of T tasks the top q = floor(k / T) singular triplets of its own update, k = min(R, C),
lays them side by side as U [R, Tq], s [Tq], Vh [Tq, C], and whitens U and Vh against interference between tasks:
    delta = scale * whiten(U) diag(s) whiten(Vh)
q only falls as tasks arrive, and the top q of the top q' >= q are the top q. So the triplets of the last step, cut
down, are exactly those of the next one: the fold loses nothing, and the state stays within the first update's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, counted
from tasks.mergers.orthonormal import Project, by_matrix, is_projected, leading_triplets, whiten

_TRIPLET = ("u", "s", "vh")
_SMALL = 64  # matrices of so few directions also keep their sum: models have some, and lines of more than 64 updates


@dataclass(frozen=True)
class TsvM(Sequential):
    """After every update what the joint method over all updates so far gives, up to rounding.

    scale: multiplies the whole delta. 1 needs no data; the published figures are for a scale that was chosen on
        validation data from 0.1, 0.2 ... 3.0.
    project: which parameters are treated as matrices; all others are averaged.
        matrices   everything with two dimensions, embeddings included (fusion_bench)
        linear     weights of linear layers
        The experts of a layer, which are one tensor [E, R, C], are E matrices either way.
    accumulate: dtype of the state, whatever the dtype of the files.

    A singular value that is numerically zero brings no direction with it. So an update that leaves a tensor as it was
    only makes the others' shares smaller. fusion_bench 0.2.33 whitens with an arbitrary direction there; it gives the
    same wherever every update has floor(k / T) directions and all of them together are linearly independent.

    With more updates than a matrix has directions nothing is left to share out (fusion_bench: a delta of zero).
    Matrices of at most 64 directions, such as patch embeddings and small heads, are averaged from there on; for larger
    ones merging the update is refused.
    """

    source: ClassVar[str] = "arXiv 2412.00081"
    state_size: ClassVar[str] = "at most 2; small matrices 3"

    name: Literal["tsv_m"] = "tsv_m"
    version: Literal[1] = 1
    scale: float = 1.0
    project: Project = "matrices"
    accumulate: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", "positive", self.scale)

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        """Parts: `u` [R, Tq], `s` [Tq], `vh` [Tq, C], tasks in order of merging; `sum` where a mean may be needed. Of
        a stack of E matrices these are stacks.

        Raises InvalidInput for the (k + 1)-th update of a matrix with k > 64 directions.
        """
        tau = delta.to(getattr(torch, self.accumulate))
        parts: Parts = {}
        averaged = True
        if is_projected(tau, target, self.project):
            directions = min(tau.shape[-2:])
            averaged = directions <= _SMALL
            share = directions // int(counted(facts))
            if share == 0 and not averaged:
                raise _too_many(target, directions)
            if share:
                parts = _with_newcomer(state, tau, int(facts.get("count", 0)), share)
        if averaged:
            parts["sum"] = tau if state is None else state["sum"] + tau
        return parts, {}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        if "s" not in state:
            return state["sum"] * (self.scale / facts["count"])
        return by_matrix(self._merged, state["u"], state["s"], state["vh"])

    def _merged(self, u_RN: Tensor, s_N: Tensor, vh_NC: Tensor) -> Tensor:
        return (whiten(u_RN) * (s_N * self.scale)) @ whiten(vh_NC)

    def workspace(self) -> float:
        """A decomposition, its input and its workspace, and the state before and after."""
        return 16 if self.accumulate == "float32" else 30


def _with_newcomer(state: Parts | None, tau_RC: Tensor, tasks: int, share: int) -> Parts:
    """The first `share` triplets of each task: of `tasks` in the state, which lie in blocks, and of the newcomer."""
    if tau_RC.ndim == 3:  # a stack: matrix by matrix
        held = [None if state is None else {key: state[key][one] for key in _TRIPLET} for one in range(len(tau_RC))]
        found = [_with_newcomer(one, tau, tasks, share) for one, tau in zip(held, tau_RC, strict=True)]
        return {key: torch.stack([one[key] for one in found]) for key in _TRIPLET}
    u_RN, s_N, vh_NC = leading_triplets(tau_RC, share)
    if state is None:
        return {"u": u_RN, "s": s_N, "vh": vh_NC}
    u_RTN = state["u"].reshape(len(tau_RC), tasks, -1)[:, :, :share]
    s_TN = state["s"].reshape(tasks, -1)[:, :share]
    vh_TNC = state["vh"].reshape(tasks, -1, tau_RC.shape[1])[:, :share]
    return {
        "u": torch.cat([u_RTN.flatten(1), u_RN], dim=1),
        "s": torch.cat([s_TN.flatten(), s_N]),
        "vh": torch.cat([vh_TNC.flatten(0, 1), vh_NC]),
    }


def _too_many(target: Target, directions: int) -> InvalidInput:
    return InvalidInput(
        f"tensor {target.name!r} has {directions} directions, one update more than that cannot share them in TSV-M",
        remedy="Merge this line with another merger (`deltaworks mergers` lists them, iso_c and opcm have no such "
        "limit), or begin a new line with fewer updates",
    )
