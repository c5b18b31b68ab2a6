"""Muon: momentum of hidden matrices, orthogonalised by Newton-Schulz (arXiv 2502.16982); AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from tasks.choice import Choice, require
from tasks.optimizers.base import Paired, Rates, split


@dataclass(frozen=True)
class Muon(Choice):
    """Embeddings, the output head, biases and norms are left to AdamW at the same learning rate.

    adjust: how large a step is
        match_rms_adamw  as large as one of AdamW, so that its learning rates fit (arXiv 2502.16982)
        original         sqrt(max(1, rows / columns)), as first released; it wants rates ten times as large
    Updates by Muon have about three times the stable rank of AdamW's: they compress and merge less well by SVD.
    """

    source: ClassVar[str] = "arXiv 2502.16982; Jordan 2024"
    library: ClassVar[str] = "torch.optim"

    name: Literal["muon"] = "muon"
    version: Literal[1] = 1
    momentum: float = 0.95
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        parts, rate, decay = split(model, self.name), rates.learning_rate, rates.weight_decay
        muon = torch.optim.Muon(
            parts.hidden, lr=rate, weight_decay=decay, momentum=self.momentum, adjust_lr_fn=self.adjust
        )
        rest = [{"params": parts.other, "weight_decay": decay}, {"params": parts.vectors, "weight_decay": 0.0}]
        groups = [group for group in rest if group["params"]]
        return Paired(muon, torch.optim.AdamW(groups, lr=rate)) if groups else muon
