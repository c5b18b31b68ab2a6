"""What a merger is: a fold over updates, one tensor at a time, in constant memory.

For every update, in order: `survey` the whole update; `fold` each of its tensors into the state's parts; add up the
`Sums` that the folds return; `close` turns them into the facts of the new state. `delta` then gives merged minus base,
tensor by tensor. A fold never needs the tensors of earlier updates, so memory does not grow with their number, and
tensors may be folded anywhere in any order as long as their sums are added in the order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tasks.choice import Choice
from tasks.select import Stream

Parts = dict[str, Tensor]
Facts = Mapping[str, float]  # whole-model numbers of a state
Sums = Mapping[str, float]  # one tensor's share of them


@dataclass(frozen=True)
class Target:
    """Which parameter is folded: its name, and its role in its module (`linear.weight`, `norm.bias`, `bare` ...)."""

    name: str
    role: str


class Merger(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def survey(self, deltas: Stream) -> Facts:
        """Numbers of the whole incoming update that `fold` needs, such as a threshold."""
        ...

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        """The parts after merging `delta` [shape of the parameter] into `state`; None before the first update.

        `facts` belong to the state before (empty at the first update), `survey` to the update.
        """
        ...

    def close(self, facts: Facts, sums: Sums) -> Facts:
        """The facts of the new state from those of the old one and the sums over all tensors."""
        ...

    def delta(self, state: Parts, facts: Facts) -> Tensor:
        """Merged minus base for one tensor, in the dtype of the state."""
        ...


@dataclass(frozen=True)
class RunningSum(Choice):
    """What mergers share whose state is the sum of the updates, and which differ only in what they make of it."""

    def survey(self, deltas: Stream) -> Facts:
        return {}

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        return {"sum": delta if state is None else state["sum"] + delta}, {}

    def close(self, facts: Facts, sums: Sums) -> Facts:
        return {"count": counted(facts)}


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def counted(facts: Facts) -> float:
    """The number of updates after one more."""
    return facts.get("count", 0) + 1
