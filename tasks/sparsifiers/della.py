"""DELLA (arXiv 2406.11617, MagPrune): drop entries at random, the small ones of a row more often than the large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.choice import Choice, require
from tasks.sparsifiers.base import uniform


@dataclass(frozen=True)
class Della(Choice):
    """`density`: mean share of entries kept. `epsilon`: the smallest entry of a row is kept with probability density
    minus epsilon, the largest with density plus epsilon, linear in the rank between. `seed`: which ones.

    rescale
        probability  each kept entry by 1 / its probability, the paper's rule
        l1           so that the tensor's L1 norm stays, mergekit's rule
    """

    name: Literal["della"] = "della"
    version: Literal[1] = 1
    density: float = 0.3
    epsilon: float = 0.1
    seed: int = 0
    rescale: Literal["probability", "l1"] = "probability"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        inside = 0 <= self.epsilon < min(self.density, 1 - self.density + 1e-12) or self.epsilon == 0
        require(inside, "epsilon", "so that density - epsilon and density + epsilon stay in (0, 1]", self.epsilon)

    def thin(self, delta: Tensor, update: str, tensor: str) -> Tensor:
        probability = self.probability(delta)
        thinned = torch.where(uniform(delta, self.seed, update, tensor) < probability, delta, 0)
        if self.rescale == "probability":
            return thinned / probability
        before, after = (one.abs().sum(dtype=torch.float64) for one in (delta, thinned))
        return thinned * float(before / after) if after > 0 else thinned

    def probability(self, delta: Tensor) -> Tensor:
        """How likely each entry is kept: by the rank of its magnitude in its row (the last dimension)."""
        if delta.ndim == 0 or delta.shape[-1] < 2:
            return torch.full_like(delta, self.density)
        rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        return self.density - self.epsilon + 2 * self.epsilon * rank / (delta.shape[-1] - 1)
