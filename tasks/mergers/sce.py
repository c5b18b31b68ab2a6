"""SCE (FuseChat, arXiv 2408.07990): select what the updates differ in, calculate their weights, erase minorities.

Per tensor, with K deltas of one shape:
    select     the entries of the largest variance over the deltas
    calculate  w_j = mean of the squares of delta_j's selected entries, divided by their sum over j
    erase      entries whose sign is not that of the sum over all deltas (+ where it is zero)
    merged     weighted mean of what is left, entry by entry: sum of w_j e_j delta_j over sum of w_j e_j
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Joint, Target
from tasks.mergers.vectors import in_fixed_order
from tasks.select import kth_magnitude

_FEEBLE = 1e-6  # mergekit's bound for sums of weights and of mean squares


@dataclass(frozen=True)
class Sce(Joint):
    """`select_topk`: which part of the entries with any variance is selected, in each tensor; 1 selects all entries.

    FuseChat-7B was merged with 0.1 and FuseO1 with 1.0, both by the code that `fuseai` follows; that code and mergekit
    have 1.0 as default, so their recipes must say 0.1.

    variant
        paper     Only selected entries are merged, all others stay those of the base. At least one entry is selected.
                  Entries that tie with the last selected one are selected too: compressed updates have few distinct
                  values, and which of the equal ones come first means nothing. Where the deltas are all equal, a
                  single one included, nothing differs and nothing can be chosen: they merge to themselves.
        fuseai    FuseAI's code: the selection counts for the weights alone, and all entries are merged.
        mergekit  mergekit 0.1.4: entries as in `paper`, but the weights are equal whenever the mean squares add up to
                  less than 1e-6, as they do for updates of usual size; the sum of the weights counts as 1e-6 at least.
                  A tensor with fewer than 1 / select_topk varying entries is not merged, nor is a single update.
    `fuseai` and `mergekit` select exactly int(count * select_topk) entries, of equal ones the first. mergekit takes
    the updates in an order that changes from process to process; here no variant depends on their order.
    """

    source: ClassVar[str] = "arXiv 2408.07990"

    name: Literal["sce"] = "sce"
    version: Literal[1] = 1
    select_topk: float = 0.1
    variant: Literal["paper", "fuseai", "mergekit"] = "paper"

    def __post_init__(self) -> None:
        require(0 < self.select_topk <= 1, "select_topk", "in (0, 1]", self.select_topk)

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        if not base.numel():
            return torch.zeros_like(deltas[0])
        deltas, _ = in_fixed_order(deltas, weights)
        selected = self._selected(deltas) if self.select_topk < 1 else None

        def of(delta: Tensor) -> Tensor:
            return delta.double() if selected is None else torch.where(selected, delta.double(), 0.0)

        shares = self._shares([float(of(delta).square().mean()) for delta in deltas])
        if self.variant == "fuseai":
            selected = None
        total = torch.zeros_like(base, dtype=torch.float64)
        for delta in deltas:
            total += of(delta)
        sign = torch.where(total >= 0, 1.0, -1.0)
        merged, divisor = total.zero_(), torch.zeros_like(total)
        for share, delta in zip(shares, deltas, strict=True):
            entries = of(delta)
            agreeing = entries.sign() == sign
            merged += torch.where(agreeing, entries, 0.0) * share
            divisor += agreeing.double() * share
        divisor = divisor.clamp(min=_FEEBLE) if self.variant == "mergekit" else divisor.where(divisor != 0, 1.0)
        return (merged / divisor).to(deltas[0].dtype)

    def workspace(self, updates: int) -> float:
        """The deltas, and at most seven tensors in float64."""
        return updates + 16

    def _selected(self, deltas: Sequence[Tensor]) -> Tensor:
        """Which entries are selected, as booleans of the shape of a delta."""
        variance = _variance(deltas)
        varying = variance.count_nonzero()
        count = int(varying * self.select_topk)  # in float32, as both implementations round it
        if self.variant == "paper":
            if not varying:
                return torch.ones_like(variance, dtype=torch.bool)
            last = _largest(variance, max(count, 1))
            return variance >= last
        if not count:
            return torch.zeros_like(variance, dtype=torch.bool)
        last = _largest(variance, count)
        chosen = variance > last
        ties = (variance.flatten() == last).nonzero().flatten()[: count - int(chosen.sum())]
        chosen.view(-1)[ties] = True
        return chosen

    def _shares(self, squares: Sequence[float]) -> list[float]:
        """The weights of the deltas; equal where there is nothing to weigh."""
        total = math.fsum(squares)
        if total < _FEEBLE if self.variant == "mergekit" else total == 0:
            return [1 / len(squares)] * len(squares)
        return [one / total for one in squares]


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """The biased variance of every entry over the deltas, in float64; exactly 0 where they are equal."""
    first = deltas[0].double()  # around the first one, so that equal values leave no rounding behind
    mean = torch.zeros_like(first)
    for delta in deltas[1:]:
        mean += delta.double() - first
    mean /= len(deltas)
    squares = torch.zeros_like(first)
    for delta in deltas:
        squares += (delta.double() - first - mean).square()
    return squares / len(deltas)


def _largest(values: Tensor, k: int) -> float:
    """The k-th largest of values that are zero or more."""
    return kth_magnitude(lambda: [values], values.numel() - k + 1)
