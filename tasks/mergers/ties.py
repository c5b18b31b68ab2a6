"""TIES (arXiv 2306.01708): trim each update, elect a sign per entry, merge the values that agree with it.

All three steps stream exactly. Trimming needs one threshold per update. The elected sign is the sign of the sum of
all trimmed values, and the agreeing values are either all positive or all negative ones: so four running tensors, the
sums and the counts of the positive and of the negative values, hold all that the joint method over all updates needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.choice import require
from tasks.mergers.base import Facts, Parts, Sequential, Sums, Target, counted
from tasks.select import Stream, kth_magnitude


@dataclass(frozen=True)
class Ties(Sequential):
    """`density`: fraction kept per update, over the whole model. `aggregate`: of the values that agree in sign.

    Entries whose sum is exactly zero take the majority sign of the model, as the released code does
    (`resolve_zero_signs`). The paper averages with scale 1; fusion_bench sums with scale 0.3.
    """

    source: ClassVar[str] = "arXiv 2306.01708"
    state_size: ClassVar[str] = "4"

    name: Literal["ties"] = "ties"
    version: Literal[1] = 1
    density: float = 0.2
    scale: float = 1.0
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)
        require(self.scale > 0, "scale", "positive", self.scale)

    def survey(self, deltas: Stream, merged: Stream | None) -> Facts:
        count = sum(delta.numel() for delta in deltas())
        dropped = count - int(count * self.density)
        return {"threshold": kth_magnitude(deltas, dropped) if dropped else 0.0}

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        trimmed = torch.where(delta.abs() >= survey["threshold"], delta, 0)
        parts = {
            "positive": trimmed.clamp(min=0),
            "negative": trimmed.clamp(max=0),
            "positive_count": (trimmed > 0).int(),
            "negative_count": (trimmed < 0).int(),
        }
        if state is not None:
            parts = {key: part.add_(state[key]) for key, part in parts.items()}  # in place: these are ours
        return parts, {"majority": float((parts["positive"] + parts["negative"]).sign().sum(dtype=torch.float64))}

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        majority = sums["majority"]
        return {"count": counted(facts), "majority": float((majority > 0) - (majority < 0))}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        sign = (state["positive"] + state["negative"]).sign()
        sign = torch.where(sign == 0, facts["majority"], sign)
        chosen = torch.where(sign > 0, state["positive"], torch.where(sign < 0, state["negative"], 0))
        if self.aggregate == "mean":
            count = torch.where(sign > 0, state["positive_count"], state["negative_count"])
            chosen = chosen / count.clamp(min=1)
        return chosen * self.scale
