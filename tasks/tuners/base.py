"""What a tuner is: which parameters learn, on what schedule, and what is kept afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from tasks.choice import Choice, require
from tasks.naming import Skeleton


class Factors(NamedTuple):
    """A low-rank change of one weight [m, n]: B [m, r], which includes the scale, times A [r, n]."""

    B: Tensor
    A: Tensor


@dataclass(frozen=True, kw_only=True)
class Training(Choice):
    """The schedule that all tuners share: AdamW with linear warm-up and cosine decay to zero.

    `steps` optimiser steps of `batch` examples; `warmup` is a share of the steps; `seed` decides the order of the
    examples, dropout, and new parameters.
    """

    steps: int = 100
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps > 0, "steps", "positive", self.steps)
        require(self.batch > 0, "batch", "positive", self.batch)
        require(self.accumulate > 0, "accumulate", "positive", self.accumulate)
        require(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)


class Tuner(Protocol):
    @property
    def name(self) -> str: ...

    def attach(self, backbone: PreTrainedModel, skeleton: Skeleton) -> None:
        """Make what should learn trainable, and only that; may add modules in place."""
        ...

    def collect(self, backbone: PreTrainedModel, skeleton: Skeleton) -> Iterator[tuple[str, Tensor | Factors]]:
        """Canonical name and new value of every parameter that learned."""
        ...
