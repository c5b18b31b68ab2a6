"""TIES (arXiv 2306.01708): trim each update, elect a sign per entry, merge the values that agree with it.

All three steps stream exactly. Trimming looks at one update alone. The elected sign is the sign of the sum of all
trimmed values, and the agreeing values are either all positive or all negative ones: so four running tensors, the sums
of the positive and of the negative values, and how many there are of each, hold all that the joint method over all
updates needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.cuts import cut, keep
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, counted, weight_of
from tasks.select import Stream, kth_magnitude


@dataclass(frozen=True)
class Ties(Sequential):
    """`density`: fraction of entries kept per update. `scale`: of the merged delta.

    trim: among which entries the fraction is counted
        model   all of the update: magnitudes from the (d - k)-th smallest of d on, k = int(density d), as the released
                code does, which keeps k + 1 entries and all that are equal to the last; an update of more zeros than
                1 - density is kept whole
        tensor  one tensor: exactly int(density n) of its n entries, of equal ones the earlier; a tensor of fewer than
                1 / density entries loses all of them
    tie: the sign of an entry whose trimmed values sum to exactly zero
        majority  that of most elected entries of the whole model (the released code's `resolve_zero_signs`); where
                  the model is undecided too, the entry stays zero (that code takes the negative values of it)
        positive  +
    aggregate: of the values that agree in sign: their mean, weighted if the updates are, their sum, or the one of the
        largest magnitude (max). An update's weight multiplies its values after trimming and before the election.

    The paper and its released code average with scale 1; that code also has sum and max. fusion_bench sums with scale
    0.3. mergekit's `ties` is trim tensor, tie positive, mean, with its `lambda` as the scale (or sum, for
    `normalize: false`).
    """

    source: ClassVar[str] = "arXiv 2306.01708"
    state_size: ClassVar[str] = "4"
    weighted: ClassVar[bool] = True

    name: Literal["ties"] = "ties"
    version: Literal[1] = 1
    density: float = 0.2
    scale: float = 1.0
    aggregate: Literal["mean", "sum", "max"] = "mean"
    trim: Literal["model", "tensor"] = "model"
    tie: Literal["majority", "positive"] = "majority"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        require(self.scale > 0, "scale", "positive", self.scale)

    def survey(self, deltas: Stream, merged: Stream | None) -> Facts:
        """`threshold`: the smallest magnitude kept, if it is one for the whole update."""
        return {"threshold": threshold(deltas, self.density)} if self.trim == "model" else {}

    def look(self, delta: Stream) -> Facts:
        """`threshold` and `until`, if they are of every tensor its own: see `select.cut`."""
        if self.trim == "model":
            return {}
        bound, until = cut(delta, lambda count: int(self.density * count))
        return {"threshold": bound, "until": until}

    @property
    def entrywise(self) -> bool:
        return True

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        known = survey if "threshold" in survey else self.look(lambda: [delta])
        trimmed = keep(delta, known["threshold"], known.get("until", math.inf), int(known.get("start", 0)))
        weight = weight_of(survey)
        share = trimmed if weight == 1 else trimmed * weight
        parts = {"positive": share.clamp(min=0), "negative": share.clamp(max=0)}
        if self.aggregate == "max":
            parts |= {"highest": share.clamp(min=0), "lowest": share.clamp(max=0)}
        else:
            sign = trimmed.sign()
            parts |= {"positive_count": _count(sign, weight), "negative_count": _count(sign.neg_(), weight)}
        if state is not None:
            parts = {key: _JOINED.get(key, _added)(part, state[key]) for key, part in parts.items()}
        if self.tie == "positive":
            return parts, {}
        return parts, {"majority": balance(parts["positive"] + parts["negative"])}

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        """`majority`: -1, 0 or 1, the sign of most entries."""
        found = {"count": counted(facts)}
        return found if self.tie == "positive" else {**found, "majority": sign_of(sums["majority"])}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        sign = (state["positive"] + state["negative"]).sign_()
        tie = facts["majority"] if self.tie == "majority" else 1.0
        ends = ("highest", "lowest") if self.aggregate == "max" else ("positive", "negative")
        chosen = _elected(state[ends[0]], state[ends[1]], sign, tie)
        if self.aggregate == "mean":
            count = _elected(state["positive_count"], state["negative_count"], sign, tie)
            chosen /= count.clamp_(min=torch.finfo(count.dtype).tiny)  # 0 of 0 agree: 0
        return chosen if self.scale == 1 else chosen * self.scale

    def workspace(self) -> float:
        """Parts before, after and as they are written, the update, and what it is trimmed with."""
        return 16


def threshold(deltas: Stream, density: float) -> float:
    """The smallest magnitude that trimming a whole model keeps: the (d - int(density d))-th of d; 0 for all of them."""
    return kth_magnitude(deltas, lambda count: count - int(count * density))


def above(delta: Tensor, bound: float) -> Tensor:
    """The entries from this magnitude on; the others zero."""
    return keep(delta, bound)


def balance(elected: Tensor) -> float:
    """How many more entries are positive than negative."""
    return float(elected.sign().sum(dtype=torch.float64))


def sign_of(number: float) -> float:
    return float((number > 0) - (number < 0))


def _elected(up: Tensor, down: Tensor, sign: Tensor, tie: float) -> Tensor:
    """Of every entry `up` where the sign is positive and `down` where it is negative; `tie` is the sign of zeros.

    By products with signs and not `where`: these are vectorised, and exact all the same; so is `lerp` from end to end.
    """
    if tie > 0:
        return torch.lerp(up, down, sign.clamp(max=0).neg_())
    if tie < 0:
        return torch.lerp(down, up, sign.clamp(min=0))
    return (up * sign.clamp(min=0)).sub_(down * sign.clamp(max=0))


def _count(sign: Tensor, weight: float) -> Tensor:
    """The update's weight for the entries that agree. Exact up to 2^24 updates of weight 1."""
    agreeing = sign.clamp(min=0)
    return agreeing if weight == 1 else agreeing * weight


def _added(ours: Tensor, other: Tensor) -> Tensor:
    """The sum, in the wider dtype; in the place of `ours`, which nobody else holds, if that has it."""
    return ours.add_(other) if torch.result_type(ours, other) == ours.dtype else ours + other


_JOINED = {"highest": torch.maximum, "lowest": torch.minimum}  # how a part of the newcomer and the state's become one
