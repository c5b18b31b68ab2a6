"""LiNeS (arXiv 2410.17146): later blocks of the network take more of the merged delta than earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tasks.choice import Choice, require
from tasks.mergers.base import Facts, Sums
from tasks.scalings.blocks import depths


@dataclass(frozen=True)
class Lines(Choice):
    """factor of block l of L: alpha + beta * (l - 1) / (L - 1); parameters outside of blocks: alpha.

    rule
        multi   alpha = (|sum of tau_i|_1 / |merged|_1) / count; beta is tuned on validation data in the paper
        single  alpha is given, beta = 1 - alpha: for one update, to keep what the base could do
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

    def close(self, facts: Facts, sums: Sums) -> Facts:
        return dict(sums)

    def measure(self, merged: Tensor) -> Sums:
        return {"l1": _l1(merged)} if self.rule == "multi" else {}

    def factors(self, names: Sequence[str], count: float, facts: Facts, measured: Sums) -> Mapping[str, float]:
        if self.rule == "multi":
            alpha = facts["total_l1"] / measured["l1"] / count if measured["l1"] else 0.0
            beta = 0.5 if self.beta is None else self.beta
        else:
            assert self.alpha is not None
            alpha, beta = self.alpha, 1 - self.alpha
        return {name: alpha + beta * depth for name, depth in depths(names).items()}


def _l1(tensor: Tensor) -> float:
    return float(tensor.double().abs().sum())
