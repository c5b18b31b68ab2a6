"""APOLLO: AdamW's step sizes, estimated in a random subspace (arXiv 2412.05270)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from tasks.optimizers.projected import Projected


@dataclass(frozen=True)
class Apollo(Projected):
    """`rank` of the random subspace, drawn anew every `every` steps; `scale` of the step.

    per: whether each `channel` or each `tensor` has a step size of its own. The seed of the tuner decides the draws.
    Needs `pip install 'deltaworks[optimizers]'`.
    """

    source: ClassVar[str] = "arXiv 2412.05270"
    library: ClassVar[str] = "pytorch-optimizer"

    name: Literal["apollo"] = "apollo"
    version: Literal[1] = 1
    scale: float = 1.0
    per: Literal["channel", "tensor"] = "channel"

    def make(self, library: Any, groups: list[dict[str, Any]], rate: float) -> Optimizer:
        found: Optimizer = library.APOLLO(groups, lr=rate, eps=1e-8, scale_type=self.per)
        return found
