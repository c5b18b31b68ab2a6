"""Low rank: a matrix as the product of two narrow ones, by its largest singular values.

B = U sqrt(S) and A = sqrt(S) V' of the leading triplets, the form of LoRA's factors: what reads those reads these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, decoder
from tasks.codecs.dense import Dense, dense_parts
from tasks.spectrum import by_lapack

_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class LowRank(Codec):
    """energy: share of a matrix's squared norm that the factors keep, with as few columns as that takes
    rank:   this many columns instead
    values: dtype of the factors, and of tensors that are no matrices

    A matrix whose factors would have as many numbers as itself is written as it is. Updates of LoRA have their factors
    already, and keep them. Full fine-tunings, by reinforcement learning above all, are of nearly full rank
    (arXiv 2505.11711: 99 %): there other codecs do better.
    """

    source: ClassVar[str] = "Eckart and Young 1936"
    keeps_factors: ClassVar[bool] = True

    name: Literal["low_rank"] = "low_rank"
    version: Literal[1] = 1
    energy: float = 0.9
    rank: int | None = None
    values: Literal["bf16", "f32"] = "bf16"

    def __post_init__(self) -> None:
        require(0 < self.energy <= 1, "energy", "in (0, 1]", self.energy)
        require(self.rank is None or self.rank > 0, "rank", "positive, or none to go by energy", self.rank)

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        delta = leaf.delta.detach().to(torch.float32)
        if delta.ndim != 2 or not delta.any():
            return self._as_it_is(leaf, delta)
        U, s, Vh = by_lapack(delta)
        r = min(self.rank or _enough(s, self.energy), len(s))
        if r * sum(delta.shape) >= delta.numel():
            return self._as_it_is(leaf, delta)
        turned = torch.where(U[:, :r].sum(0) < 0, -1.0, 1.0)  # of the two signs of a pair always the same
        root = s[:r].sqrt()
        left, right = U[:, :r] * (turned * root), (turned * root)[:, None] * Vh[:r]
        parts = {f"A.{key}": part for key, part in dense_parts(self._cast(leaf, right)).items()}
        parts |= {f"B.{key}": part for key, part in dense_parts(self._cast(leaf, left)).items()}
        return Coded(parts, decoder(Dense()), rank=r)

    def _as_it_is(self, leaf: Leaf, delta: Tensor) -> Coded:
        return Coded(dense_parts(self._cast(leaf, delta)), decoder(Dense()))

    def _cast(self, leaf: Leaf, tensor: Tensor) -> Tensor:
        found = tensor.to(_DTYPES[self.values]).contiguous()
        beyond = tensor[~torch.isfinite(found)]
        require(not beyond.numel(), leaf.name, f"numbers that fit into {self.values}", beyond[:1].tolist())
        return found


def _enough(s_K: Tensor, energy: float) -> int:
    """The fewest leading values whose squares are this share of all."""
    share_K = s_K.double().square().cumsum(0)
    return int((share_K < energy * share_K[-1]).sum()) + 1
