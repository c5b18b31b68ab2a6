"""DELLA (arXiv 2406.11617, MagPrune): drop entries at random, the small ones of a row more often than the large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.sparsifiers.base import Sparsifier, uniform, with_l1_of


@dataclass(frozen=True)
class Della(Sparsifier):
    """`density`: mean chance of an entry to be kept. `epsilon`: the smallest entry of a row is kept with probability
    density - epsilon, the largest with density + epsilon, linear in the rank between. `seed`: which ones.

    A row is what belongs to one index of the first dimension, all kernels of an output channel together; a vector is
    one row. (mergekit, for tensors of more than two dimensions, ranks along the second one alone.) An entry that is
    alone in its row is kept with probability density. At density 1 nothing is dropped, whatever epsilon is.

    rescale
        probability  each kept entry by 1 / its probability, the paper's rule, which keeps the expectation
        l1           so that the tensor's L1 norm stays, mergekit's rule (`della`, `della_linear`; its epsilon: 0.15)
    """

    source: ClassVar[str] = "arXiv 2406.11617"

    name: Literal["della"] = "della"
    version: Literal[1] = 1
    density: float = 0.3
    epsilon: float = 0.1
    seed: int = 0
    rescale: Literal["probability", "l1"] = "probability"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        require(self.epsilon >= 0, "epsilon", "at least 0", self.epsilon)
        # a sum like 0.9 + 0.1 may round to just above 1; a probability of that size keeps as 1 does
        inside = self.epsilon < self.density and self.density + self.epsilon <= 1 + 1e-12
        expected = "so that density - epsilon and density + epsilon are in (0, 1]"
        require(inside or self.density == 1, "epsilon", expected, self.epsilon)

    def thin(self, delta: Tensor, update: str, tensor: str, start: int = 0) -> Tensor:
        if self.density == 1:
            return delta
        probability = self.probability(delta)
        thinned = torch.where(uniform(delta, self.seed, update, tensor, start) < probability, delta, 0)
        return thinned / probability if self.rescale == "probability" else with_l1_of(delta, thinned)

    def probability(self, delta: Tensor) -> Tensor:
        """How likely each entry is kept, from the rank of its magnitude in its row: [shape of delta], in its dtype."""
        rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 and delta.numel() else delta.reshape(1, -1)
        width = rows.shape[1]
        if width < 2:
            return torch.full_like(delta, self.density)
        order = rows.abs().argsort(dim=1, stable=True)
        ranks = torch.arange(width, dtype=delta.dtype, device=delta.device).expand_as(rows)
        rank = torch.empty_like(rows).scatter_(1, order, ranks)  # float32 counts to 2^24 exactly, beyond to 1e-7
        return (self.density - self.epsilon + rank * (2 * self.epsilon / (width - 1))).reshape(delta.shape)
