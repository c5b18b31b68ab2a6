"""SCE (FuseChat, arXiv 2408.07990): select what the updates differ in, calculate their weights, erase minorities.

Per tensor, with K deltas of one shape:
    select     the entries of the largest variance over the deltas
    calculate  w_j = mean of the squares of delta_j's selected entries, divided by their sum over j
    erase      entries whose sign is not that of the sum over all deltas (+ where it is zero)
    merged     weighted mean of what is left, entry by entry: sum of w_j e_j delta_j over sum of w_j e_j
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tasks.choice import require
from tasks.cuts import cut, places
from tasks.mergers.base import Columns, Joint, Mix, Target
from tasks.mergers.vectors import fixed_order, kept
from tasks.select import Stream, count_equal, kth_magnitude

_PIECE = 1 << 18
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
    version: Literal[2] = 2
    select_topk: float = 0.1
    variant: Literal["paper", "fuseai", "mergekit"] = "paper"

    def __post_init__(self) -> None:
        require(0 < self.select_topk <= 1, "select_topk", "in (0, 1]", self.select_topk)

    @property
    def entrywise(self) -> bool:
        return True

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        return self.mix(lambda: [deltas], weights)(deltas, 0)

    def mix(self, deltas: Columns, weights: Sequence[float], hold: bool = True) -> Mix:
        order = fixed_order(deltas, weights)

        def columns() -> Iterator[list[Tensor]]:
            return (one for piece in deltas() for one in _small([piece[index] for index in order]))

        variances = kept(hold, lambda: (_variance(piece) for piece in columns()))
        selected = self._selection(variances)
        known: dict[int, Tensor | None] = {}  # first entry of a small piece -> where its selected entries lie
        shares = self._shares(columns, variances, selected, known if hold else None)
        everything = self.variant == "fuseai"

        def merged(piece: Sequence[Tensor], start: int) -> Tensor:
            found = []
            for ordered in _small([piece[index] for index in order]):
                if everything:
                    where = None
                else:
                    where = known[start] if start in known else selected.places(_variance(ordered), start)
                found.append(_spread(self._merged(_at(where, ordered), shares), where, ordered[0]))
                start += ordered[0].numel()
            return torch.cat(found).reshape(piece[0].shape)

        return merged

    def workspace(self, updates: int) -> float:
        """The deltas, and at most nine tensors in float64."""
        return updates + 18

    def _merged(self, deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        """The weighted mean, entry by entry, of those that have the elected sign."""
        # products with 0, 1 and signs and not `where`: these are vectorised, and exact all the same
        entries = [delta.double() for delta in deltas]
        total = entries[0].clone()
        for one in entries[1:]:
            total += one
        sign = total.sign_()
        sign += 1 - sign.abs()
        merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for share, one in zip(shares, entries, strict=True):
            agreeing = one.sign().mul_(sign).clamp_(min=0)
            merged += (one * agreeing).mul_(share)
            divisor += agreeing.mul_(share)
        divisor.clamp_(min=_FEEBLE if self.variant == "mergekit" else torch.finfo(divisor.dtype).tiny)
        return merged.div_(divisor).to(deltas[0].dtype)

    def _selection(self, variances: Stream) -> _Selection:
        """Which entries are selected."""
        if self.select_topk == 1:
            return _EVERYTHING

        varying = total = 0
        for one in variances():
            varying += one.numel() - count_equal(one, 0.0)
            total += one.numel()
        count = int(torch.tensor(varying) * self.select_topk)  # in float32, as both implementations round it
        if self.variant == "paper":
            if not varying:
                return _EVERYTHING
            return _Selection(kth_magnitude(variances, total - max(count, 1) + 1))
        return _Selection(*cut(variances, count))

    def _shares(
        self, columns: Columns, variances: Stream, selected: _Selection, known: dict[int, Tensor | None] | None
    ) -> list[float]:
        """The weights of the deltas; equal where there is nothing to weigh. `known` learns what is selected."""
        squares: list[list[float]] = []
        total = 0
        for piece, variance in zip(columns(), variances(), strict=True):
            where = selected.places(variance, total)
            if known is not None:
                known[total] = where
            of = [one.double() for one in _at(where, piece)]
            squares.append([float(torch.dot(one, one)) for one in of])
            total += piece[0].numel()
        means = [math.fsum(some) / max(total, 1) for some in zip(*squares, strict=True)]
        whole = math.fsum(means)
        if whole < _FEEBLE if self.variant == "mergekit" else whole == 0:
            return [1 / len(means)] * len(means)
        return [one / whole for one in means]


class _Selection(NamedTuple):
    """The entries whose variance a `select.Cut` keeps."""

    bound: float
    until: float = math.inf

    def places(self, variance: Tensor, start: int) -> Tensor | None:
        """Where the selected entries lie; None: everywhere. What does not vary is never selected by its variance."""
        return None if self == _EVERYTHING else places(variance, self.bound, self.until, start)


_EVERYTHING = _Selection(0.0)


def _at(where: Tensor | None, deltas: Sequence[Tensor]) -> Sequence[Tensor]:
    """The entries at these places alone: a tenth of the work, where a tenth is selected."""
    return deltas if where is None else [delta.index_select(0, where) for delta in deltas]


def _spread(merged: Tensor, where: Tensor | None, like: Tensor) -> Tensor:
    """The inverse: what was merged at its places, and zero elsewhere."""
    return merged if where is None else torch.zeros_like(like).scatter_(0, where, merged)


def _small(deltas: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The deltas flat, in pieces whose float64 numbers stay in a core's cache."""
    rows = [delta.flatten() for delta in deltas]
    size = _PIECE if rows[0].device.type == "cpu" else max(rows[0].numel(), 1)
    for start in range(0, max(rows[0].numel(), 1), size):
        yield [row[start : start + size] for row in rows]


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """The biased variance of every entry over the deltas, in float64; exactly 0 where they are equal.

    (K * sum of x^2 - (sum of x)^2) / K^2 with x = delta_j - delta_0, so that nothing cancels. Unlike squares around a
    mean, which a division has rounded, it is exact for numbers of few digits: entries that one of three updates moved
    by the same step vary alike whichever it was, and tie.
    """
    first = deltas[0].double()
    if len(deltas) == 2:  # a^2 / 4, to the bit what the sums below come to, in half the time
        return (deltas[1].double() - first).square_().mul_(0.25)
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in deltas[1:]:
        apart = delta.double() - first
        total += apart
        squares.addcmul_(apart, apart)
    return squares.mul_(len(deltas)).sub_(total.square_()).div_(len(deltas) ** 2)
