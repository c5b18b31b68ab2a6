"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101), as the Trainer makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from tasks.optimizers.base import Rates, Stepper


@dataclass(frozen=True)
class AdamW(Stepper):
    """Betas 0.9 and 0.999, epsilon 1e-8; biases and norms do not decay."""

    source: ClassVar[str] = "arXiv 1711.05101"
    library: ClassVar[str] = "torch"
    steps: ClassVar[str] = "everything"
    state: ClassVar[str] = "2 s l"

    name: Literal["adamw"] = "adamw"
    version: Literal[1] = 1

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        return None
