"""LiNeS (arXiv 2410.17146): later blocks of the network take more of the merged delta than earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.choice import Choice, require
from tasks.mergers.base import Facts, Sums
from tasks.scalings.blocks import depths

_BETA = 0.5


@dataclass(frozen=True)
class Lines(Choice):
    """factor of block l of L: alpha + beta * (l - 1) / (L - 1); parameters outside of blocks: alpha.

    Outside are embeddings, the last norm and the head. Two towers, or encoder and decoder, are counted each by itself.

    rule
        multi   alpha = (|sum of tau_i|_1 / |merged|_1) / N over the whole model. With L1 norms, as in the released
                code. N is the number of updates, or the sum of their weights, which then are in the sum too. What the
                merger itself scales by cancels out. One update has nobody to make room for: its beta is 0. The state
                of a sequential merger keeps that sum too, one number more per parameter; of a joint one it is added up
                when the model is written.
        single  alpha is given and beta = 1 - alpha: for one update, to keep what the base could do.
    beta: 0.5 if absent, a choice without data: the last block takes one half more of the sum than the first one.

    Published figures belong to rule multi after `task_arithmetic` (scale 1), `ties` or Consensus, with the best beta on
    validation data of all tasks, from 0.1, 0.2 ... 1.0 (TIES ... 1.5), and to rule single with the best alpha of 0.0,
    0.1 ... 1.0. None is known for a beta that was fixed beforehand.
    """

    name: Literal["lines"] = "lines"
    version: Literal[1] = 1
    rule: Literal["multi", "single"] = "multi"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.rule == "multi":
            require(self.alpha is None, "alpha", "absent with rule multi, which computes it", self.alpha)
            require(self.beta is None or self.beta >= 0, "beta", "zero or more", self.beta)
        else:
            require(self.alpha is not None and 0 <= self.alpha <= 1, "alpha", "in [0, 1] with rule single", self.alpha)
            require(self.beta is None, "beta", "absent with rule single, where it is 1 - alpha", self.beta)

    @property
    def needs_total(self) -> bool:
        return self.rule == "multi"

    def share(self, delta: Tensor, total: Tensor | None) -> Sums:
        return {} if total is None else {"total_l1": _l1(total)}

    def close(self, facts: Facts, sums: Sums, weight: float = 1.0) -> Facts:
        """`total_l1`: |sum of tau_i|_1 of all updates so far. `weight`: sum of their weights."""
        return {**sums, "weight": facts.get("weight", 0.0) + weight}

    def measure(self, merged: Tensor) -> Sums:
        return {"l1": _l1(merged)} if self.rule == "multi" else {}

    def factors(self, names: Sequence[str], count: float, facts: Facts, measured: Sums) -> Mapping[str, float]:
        alpha, beta = self._line(count, facts, measured)
        return {name: alpha + beta * depth for name, depth in depths(names).items()}

    def _line(self, count: float, facts: Facts, measured: Sums) -> tuple[float, float]:
        """alpha and beta."""
        if self.rule == "single":
            assert self.alpha is not None
            return self.alpha, 1 - self.alpha
        size = measured.get("l1", 0.0)
        alpha = facts["total_l1"] / size / facts["weight"] if size else 0.0
        beta = _BETA if self.beta is None else self.beta
        return alpha, beta if count > 1 else 0.0


def _l1(tensor: Tensor) -> float:
    """Sum of magnitudes, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, ord=1, dtype=torch.float64))
