"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101), the Trainer's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from tasks.choice import Choice
from tasks.optimizers.base import Rates


@dataclass(frozen=True)
class AdamW(Choice):
    """Betas 0.9 and 0.999, as the Trainer sets them; biases and norms do not decay."""

    source: ClassVar[str] = "arXiv 1711.05101"
    library: ClassVar[str] = "transformers Trainer"

    name: Literal["adamw"] = "adamw"
    version: Literal[1] = 1

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        """None: the Trainer makes it."""
        return None
