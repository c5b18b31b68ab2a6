"""Slerp: the point between two models on the arc between them, each tensor of weights as one vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.mergers.base import Joint, Target
from tasks.mergers.vectors import gram, mixture

_COLINEAR = 0.9995  # mergekit's bound for |cosine|; above it the arc is a straight line


@dataclass(frozen=True)
class Slerp(Joint):
    """`t`: how far from the first model (0) to the second (1), the first being the one that was merged first.

    It works on the weights, base plus update, as mergekit 0.1.4 does:
        (sin((1 - t) a) / sin a) w_0 + (sin(t a) / sin a) w_1,    a = angle between w_0 and w_1
    Models that were tuned from one base are so close that |cos a| > 0.9995 in most tensors, where slerp is the straight
    line: at t = 0.5 the mean. The line is taken too where one of the models is zero and has no direction; mergekit
    takes 90 degrees there.

    Two models are its limit; a line that begins with it holds the first model as it is. For more take `karcher`.
    """

    source: ClassVar[str] = "Shoemake 1985, mergekit"
    limit: ClassVar[int | None] = 2

    name: Literal["slerp"] = "slerp"
    version: Literal[1] = 1
    t: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.t <= 1, "t", "in [0, 1]", self.t)

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        if len(deltas) > 2:
            raise InvalidInput(
                f"merger 'slerp' merges two updates, found {len(deltas)}",
                remedy="Take `karcher`, its form for any number of models, or end the line after two updates",
            )
        if len(deltas) == 1:
            return deltas[0]
        if not any(bool(delta.any()) for delta in deltas):
            return torch.zeros_like(deltas[0])
        products = gram(deltas, onto=base)
        lengths = float(products[0, 0].sqrt()), float(products[1, 1].sqrt())
        cosine = float(products[0, 1]) / math.prod(lengths) if all(lengths) else 1.0
        if abs(cosine) > _COLINEAR:
            return mixture(deltas, [1 - self.t, self.t])
        angle = math.acos(cosine)
        first = math.sin(angle - angle * self.t) / math.sin(angle)
        second = math.sin(angle * self.t) / math.sin(angle)
        return mixture([*deltas, base], [first, second, first + second - 1])

    def workspace(self, updates: int) -> float:
        """The deltas, the base, and at most three tensors in float64."""
        return updates + 8
