"""GaLore: Adam on gradients projected onto their leading singular vectors (arXiv 2403.03507)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from tasks.optimizers.projected import Projected


@dataclass(frozen=True)
class Galore(Projected):
    """P holds the `rank` leading singular vectors of the gradient, found anew every `every` steps: W -= scale P^T N.

    N is Adam's step on P G. The defaults of `every` and `scale` are the paper's; a matrix that is no larger than `rank`
    is left to AdamW. Memory is saved in training alone: the update is as dense as with AdamW.
    """

    source: ClassVar[str] = "arXiv 2403.03507"
    library: ClassVar[str] = "ours"
    steps: ClassVar[str] = "hidden matrices above rank"
    state: ClassVar[str] = "rank (s + 2 l)"

    name: Literal["galore"] = "galore"
    version: Literal[1] = 1
    scale: float = 0.25

    def basis(self, gradient_SL: Tensor, generator: Generator) -> Tensor:
        U_SS: Tensor = torch.linalg.svd(gradient_SL, full_matrices=False).U
        basis_RS = U_SS[:, : self.rank].T
        # a library gives singular vectors of either sign, and the moments outlive a renewal: the largest entry is > 0
        largest_R1 = basis_RS.abs().argmax(dim=1, keepdim=True)
        return (basis_RS * basis_RS.gather(1, largest_R1).sign()).contiguous()

    def direction(self, gradient_SL: Tensor, low_RL: Tensor, adam_RL: Tensor, state: dict[str, Any]) -> Tensor:
        step_SL: Tensor = state["basis"].T @ adam_RL
        return step_SL
