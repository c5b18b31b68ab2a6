"""Muon: momentum of hidden matrices, orthogonalised by Newton-Schulz (Jordan 2024, arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from tasks.choice import require
from tasks.optimizers.base import Rates, Stepper, split, with_adamw


@dataclass(frozen=True)
class Muon(Stepper):
    """Embeddings, the output head, biases and norms are left to AdamW at the same learning rate.

    momentum: of the gradient's running average, with Nesterov's look ahead
    adjust: how large a step is
        match_rms_adamw  as large as one of AdamW, so that its learning rates fit (arXiv 2502.16982)
        original         sqrt(max(1, rows / columns)), as first released; it wants rates ten times as large

    Updates by Muon have about three times the stable rank of AdamW's: they compress and merge less well by SVD.
    """

    source: ClassVar[str] = "arXiv 2502.16982, Jordan 2024"
    library: ClassVar[str] = "torch"
    steps: ClassVar[str] = "hidden matrices"
    state: ClassVar[str] = "s l"

    name: Literal["muon"] = "muon"
    version: Literal[1] = 1
    momentum: float = 0.95
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        parts = split(model, self.name)
        muon = torch.optim.Muon(
            parts.hidden,
            lr=rates.learning_rate,
            weight_decay=rates.weight_decay,
            momentum=self.momentum,
            adjust_lr_fn=self.adjust,
        )
        return with_adamw(muon, parts, rates)
