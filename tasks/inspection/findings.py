"""Findings: everything that an inspection found, tensor by tensor, and put together by kind of module and by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import get_args

from storage.refs import UpdateRef
from tasks.inspection.costs import CodecCost
from tasks.inspection.measure import Moments, Ranks
from tasks.kinds import FineKind
from tasks.scalings.blocks import Block, blocks_of


@dataclass(frozen=True)
class Measured:
    """One tensor. See measure.py for what the numbers are.

    changed:      numbers that differ from the base's: in a bit if `by_bits`, else those whose delta is not zero
    beyond:       numbers whose delta is larger than each of the tolerances
    base_squares: squared norm of the base's tensor, if that is there
    ranks:        of matrices other than zero, up to the size that was asked for
    ternary_bits, step_bits: of all numbers together
    factors:      whether it is stored as low-rank factors
    """

    name: str
    kind: FineKind
    shape: tuple[int, ...]
    changed: int
    by_bits: bool
    beyond: tuple[int, ...]
    moments: Moments
    base_squares: float | None
    ranks: Ranks | None
    ternary_bits: float
    step_bits: float | None
    factors: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Tensors taken together: of one kind, of one layer, or all. Shares are of their numbers."""

    label: str
    members: tuple[Measured, ...]

    @property
    def elements(self) -> int:
        return sum(one.elements for one in self.members)

    @property
    def changed(self) -> float:
        return self._share(lambda one: one.changed)

    def beyond(self, place: int) -> float:
        """The share changed by more than the tolerance at this place."""
        return self._share(lambda one: one.beyond[place])

    @property
    def moments(self) -> Moments:
        return reduce(add, (one.moments for one in self.members), Moments())

    @property
    def norm(self) -> float:
        return math.sqrt(sum(one.moments.squares for one in self.members))

    @property
    def relative(self) -> float | None:
        """The norm over that of the base; None without a base, or where it is zeros."""
        squares = [one.base_squares for one in self.members if one.base_squares is not None]
        base = math.sqrt(sum(squares))
        return self.norm / base if len(squares) == len(self.members) and base else None

    @property
    def rank(self) -> float | None:
        """Numerical rank over the smaller side, a mean over the matrices."""
        return self._mean(lambda ranks: ranks.rank / ranks.side)

    @property
    def effective(self) -> float | None:
        """Effective rank over the smaller side, a mean over the matrices."""
        return self._mean(lambda ranks: ranks.effective / ranks.side)

    @property
    def stable(self) -> float | None:
        """Stable rank, a mean over the matrices."""
        return self._mean(lambda ranks: ranks.stable)

    @property
    def ternary_bits(self) -> float | None:
        """Bits each of places and signs of what changed."""
        return sum(one.ternary_bits for one in self.members) / self.elements if self.elements else None

    @property
    def step_bits(self) -> float | None:
        """Bits each of the steps; None unless every tensor has them."""
        bits = [one.step_bits for one in self.members if one.step_bits is not None]
        return sum(bits) / self.elements if self.elements and len(bits) == len(self.members) else None

    @property
    def kinds(self) -> tuple[Group, ...]:
        """Its tensors by kind."""
        return _grouped(get_args(FineKind), lambda one: one.kind, self.members)

    def only(self, *kinds: FineKind) -> Group:
        return Group(self.label, tuple(one for one in self.members if one.kind in kinds))

    def without(self, *kinds: FineKind) -> Group:
        return Group(self.label, tuple(one for one in self.members if one.kind not in kinds))

    def _share(self, count: Callable[[Measured], int]) -> float:
        return sum(map(count, self.members)) / self.elements if self.elements else 0.0

    def _mean(self, of: Callable[[Ranks], float]) -> float | None:
        found = [of(one.ranks) for one in self.members if one.ranks is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Inspection:
    """
    tolerances:   what `beyond` is counted for, ascending
    tensors:      all but heads, which are stored with an update but never compressed or merged
    stored:       bytes of the update's files as they are, heads included
    bf16:         bytes of the same tensors in bfloat16
    costs:        what each codec would make of it; empty if none was tried
    lossy:        whether some numbers were already changed by a codec, as far as the store knows
    notes:        what could not be measured, and why
    """

    update: UpdateRef
    tolerances: tuple[float, ...]
    tensors: tuple[Measured, ...]
    stored: int
    bf16: int
    costs: tuple[CodecCost, ...]
    lossy: bool
    notes: tuple[str, ...]

    @property
    def by_bits(self) -> bool:
        return all(one.by_bits for one in self.tensors)

    @property
    def total(self) -> Group:
        return Group("all", self.tensors)

    @property
    def kinds(self) -> tuple[Group, ...]:
        """Of every kind that there is."""
        return self.total.kinds

    @property
    def layers(self) -> tuple[Group, ...]:
        """The blocks of the network in their order; what is in none comes last."""
        blocks = blocks_of(one.name for one in self.tensors)
        labels = _labels(blocks.values())
        order = [*dict.fromkeys(labels.values()), OUTSIDE]
        return _grouped(order, lambda one: labels[blocks[one.name]] if one.name in blocks else OUTSIDE, self.tensors)


OUTSIDE = "outside"


def _labels(blocks: Iterable[Block]) -> dict[Block, str]:
    """Numbers, in order; with the block's place where stages hold several, with the stack's name where there are
    several stacks."""
    found = sorted(set(blocks))
    stacks, staged = {one.stack for one in found}, {one.stack for one in found if one.number}
    return {
        one: (f"{one.stack}." if len(stacks) > 1 else "")
        + (f"{one.stage}.{one.number}" if one.stack in staged else f"{one.stage}")
        for one in found
    }


def _grouped(
    labels: Iterable[str], label_of: Callable[[Measured], str], tensors: Sequence[Measured]
) -> tuple[Group, ...]:
    groups: dict[str, list[Measured]] = {label: [] for label in labels}
    for one in tensors:
        groups[label_of(one)].append(one)
    return tuple(Group(label, tuple(members)) for label, members in groups.items() if members)
