"""VaRM (FuseChat, arXiv 2402.16107, equation 7): a mean whose weights follow how much each update changed a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, squared_norm


@dataclass(frozen=True)
class Varm(Sequential):
    """delta_t = sum of W_i tau_i with W_i = E[tau_i^2] / sum of E[tau_j^2], the means over one tensor.

    The paper's granularity "matrix", the best of its four (MT-Bench 8.22), which here is every parameter, vectors
    too. The state is the mean so far and the sum of its weights, one number per tensor in float64: the sum of
    E[tau^2] tau itself would leave the range of float32 for small updates. A tensor that no update changed stays zero.
    """

    source: ClassVar[str] = "arXiv 2402.16107"
    state_size: ClassVar[str] = "1"

    name: Literal["varm"] = "varm"
    version: Literal[1] = 1

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        weight = torch.tensor([squared_norm(delta) / max(delta.numel(), 1)], dtype=torch.float64, device=delta.device)
        if state is None:
            return {"mean": delta, "weight": weight}, {}
        total = state["weight"] + weight
        share = float(weight / total) if total > 0 else 0.0
        return {"mean": state["mean"] * (1 - share) + delta * share, "weight": total}, {}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        return state["mean"]
