"""GaLore: Adam on gradients projected onto their leading singular vectors (arXiv 2403.03507)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from tasks.optimizers.projected import Projected


@dataclass(frozen=True)
class Galore(Projected):
    """`rank` of the subspace, renewed by an SVD every `every` steps; `scale` of what comes back from it.

    The defaults of `every` and `scale` are the paper's. Needs `pip install 'deltaworks[optimizers]'`.
    """

    source: ClassVar[str] = "arXiv 2403.03507"
    library: ClassVar[str] = "pytorch-optimizer"

    name: Literal["galore"] = "galore"
    version: Literal[1] = 1

    def make(self, library: Any, groups: list[dict[str, Any]], rate: float) -> Optimizer:
        found: Optimizer = library.GaLore(groups, lr=rate, eps=1e-8)
        return found
