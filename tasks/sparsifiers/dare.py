"""DARE (arXiv 2311.03099): drop entries at random, and rescale what is left so that its expectation stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.sparsifiers.base import Sparsifier, chosen, with_l1_of


@dataclass(frozen=True)
class Dare(Sparsifier):
    """`density`: chance of every entry to be kept; the paper's drop rate p is 1 - density. `seed`: which ones.

    rescale
        expectation  by 1 / density, the paper's rule (section 3.1), fusion_bench's and peft's
        l1           so that the tensor's L1 norm stays, mergekit's rule (`dare_linear`, `dare_ties`)

    The paper drops 90 % and, of large models, 99 %. The default is its 90 %.
    """

    source: ClassVar[str] = "arXiv 2311.03099"

    name: Literal["dare"] = "dare"
    version: Literal[1] = 1
    density: float = 0.1
    seed: int = 0
    rescale: Literal["expectation", "l1"] = "expectation"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)

    @property
    def entrywise(self) -> bool:
        return self.rescale == "expectation" or self.density == 1

    def thin(self, delta: Tensor, update: str, tensor: str, start: int = 0) -> Tensor:
        if self.density == 1:
            return delta
        return self.rescaled(delta, chosen(delta, self.density, self.seed, update, tensor, start))

    def rescaled(self, delta: Tensor, kept: Tensor) -> Tensor:
        """The kept entries of `delta` (booleans of its shape), rescaled; the others zero."""
        thinned = delta * kept.view(torch.uint8).to(delta.dtype)  # as booleans they would be multiplied one by one
        return thinned.div_(self.density) if self.rescale == "expectation" else with_l1_of(delta, thinned)
