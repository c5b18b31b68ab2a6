"""DARE (arXiv 2311.03099): drop entries at random, and rescale what is left so that its expectation stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.choice import Choice, require
from tasks.sparsifiers.base import uniform


@dataclass(frozen=True)
class Dare(Choice):
    """`density`: share of entries kept; the paper's drop rate is 1 - density. `seed`: which ones.

    rescale
        expectation  by 1 / density, the paper's rule       l1  so that the tensor's L1 norm stays, mergekit's rule
    """

    name: Literal["dare"] = "dare"
    version: Literal[1] = 1
    density: float = 0.1
    seed: int = 0
    rescale: Literal["expectation", "l1"] = "expectation"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)

    def thin(self, delta: Tensor, update: str, tensor: str) -> Tensor:
        kept = uniform(delta, self.seed, update, tensor) < self.density
        return self.rescaled(delta, kept)

    def rescaled(self, delta: Tensor, kept: Tensor) -> Tensor:
        """The kept entries of `delta`, rescaled."""
        thinned = torch.where(kept, delta, 0)
        if self.rescale == "expectation":
            return thinned / self.density
        before, after = (one.abs().sum(dtype=torch.float64) for one in (delta, thinned))
        return thinned * float(before / after) if after > 0 else thinned
