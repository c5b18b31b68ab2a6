"""Dense: every number as it is. Also the form of checkpoints, and the yardstick of the other codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.choice import Choice
from tasks.codecs.base import Facts, Parts
from tasks.select import Stream


@dataclass(frozen=True)
class Dense(Choice):
    """One part, `tensor`. A tensor of zeros has no part at all: frozen layers of an update cost nothing."""

    name: Literal["dense"] = "dense"
    version: Literal[1] = 1

    def survey(self, deltas: Stream) -> Facts:
        return {}

    def encode(self, delta: Tensor, facts: Facts) -> Parts:
        return {"tensor": delta} if delta.any() or not delta.numel() else {}

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["tensor"].reshape(shape) if parts else torch.zeros(shape)
