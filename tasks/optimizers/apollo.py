"""APOLLO: the gradient itself, scaled by how AdamW would scale it in a random subspace (arXiv 2412.05270)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from tasks.optimizers.projected import Projected

_GROWTH = 1.01  # of the step's norm from one step to the next at most: the limiter of Fira, arXiv 2410.01623


@dataclass(frozen=True)
class Apollo(Projected):
    """W -= scale G diag(f), where f_j = ||N_j|| / ||R_j|| of column j of R = P G and of N, Adam's step on R.

    P [rank, s] is drawn from the normal distribution by the tuner's `seed`, anew every `every` steps.

    per: which share a factor f
        channel  each column of the longer side has its own
        tensor   the whole matrix has one. APOLLO-Mini: rank 1, per tensor, scale 11.3

    A step is at most 1.01 times as long as the one before it. The defaults of `every` and `scale` are the paper's; a
    matrix that is no larger than `rank` is left to AdamW. The update is as dense as with AdamW.
    """

    source: ClassVar[str] = "arXiv 2412.05270"
    library: ClassVar[str] = "ours"
    steps: ClassVar[str] = "hidden matrices above rank"
    state: ClassVar[str] = "rank (s + 2 l)"

    name: Literal["apollo"] = "apollo"
    version: Literal[1] = 1
    per: Literal["channel", "tensor"] = "channel"

    def basis(self, gradient_SL: Tensor, generator: Generator) -> Tensor:
        drawn_RS: Tensor = torch.randn(self.rank, gradient_SL.shape[0], generator=generator) / self.rank**0.5
        return drawn_RS.to(gradient_SL)

    def direction(self, gradient_SL: Tensor, low_RL: Tensor, adam_RL: Tensor, state: dict[str, Any]) -> Tensor:
        over = 0 if self.per == "channel" else None
        factor: Tensor = torch.linalg.vector_norm(adam_RL, dim=over) / (
            torch.linalg.vector_norm(low_RL, dim=over) + 1e-8
        )
        step_SL: Tensor = gradient_SL * factor
        norm = torch.linalg.vector_norm(step_SL)
        before = state.get("norm", norm)
        # after a step of length 0, for want of a gradient, any length will do
        limiter = torch.where(before > 0, (norm / before).clamp(min=_GROWTH) / _GROWTH, 1.0)
        state["norm"] = norm / limiter
        return step_SL / limiter
