"""What a tuner is: which parameters learn, on what schedule, and what is kept afterwards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from tasks.choice import Choice, require
from tasks.optimizers import AdamW, AnyOptimizer, Rates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.naming import Skeleton


class Factors(NamedTuple):
    """A low-rank change of one weight [m, n]: B [m, r], which includes the scale, times A [r, n]."""

    B: Tensor
    A: Tensor


class Companion:
    """What a tuner does beside the steps. What it has to remember is saved with a training."""

    def stepped(self, step: int, skipped: bool) -> None:
        """After the optimizer's step number `step`, from 1; `skipped` if its gradients were too large for float16."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True, kw_only=True)
class Training(Choice, ABC):
    """The settings that all tuners share.

    `steps` optimizer steps of `batch` examples, `accumulate` times over; `learning_rate` rises from 0 over the share
    `warmup` of the steps, then follows `schedule`; gradients longer than `clip` are cut to it (0: never); `seed`
    decides the order of the examples, dropout, and new parameters.

    `precision` is that of the arithmetic; weights are kept in float32. `gradient_checkpointing` computes activations
    twice instead of keeping them: less memory, more time. Every `save_every` steps the state is saved in the store, so
    that a training that was killed goes on there (0: never).

    Every `validate_every` steps the loss on the data's validation split is measured, and the weights with the lowest
    are the result; with `patience`, the training ends after so many measurements without a lower one.

    `processes` on one machine, a GPU each where the device is one, share every batch; with `sharding` fsdp they share
    the weights and the optimizer's state too. The result is the same up to rounding and dropout.
    """

    # what `deltaworks tuners` tells of each: where the method and the code come from, what learns, what is kept of it
    source: ClassVar[str]
    library: ClassVar[str]
    trains: ClassVar[str]
    stored: ClassVar[str]

    # settings that came later: at their defaults they are no part of the spec, so that earlier trainings are found
    later: ClassVar[tuple[str, ...]] = ("optimizer", "schedule")

    shards: ClassVar[bool] = False  # whether its weights may be spread over processes

    name: str
    version: int
    steps: int = 100
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 500
    validate_every: int = 0
    patience: int = 0
    processes: int = 1
    sharding: Literal["none", "fsdp"] = "none"
    optimizer: AnyOptimizer = field(default_factory=AdamW)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"

    def __post_init__(self) -> None:
        require(self.steps > 0, "steps", "positive", self.steps)
        require(self.batch > 0, "batch", "positive", self.batch)
        require(self.accumulate > 0, "accumulate", "positive", self.accumulate)
        require(0 < self.learning_rate < math.inf, "learning_rate", "positive", self.learning_rate)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        require(self.clip >= 0, "clip", "0 or more", self.clip)
        require(self.save_every >= 0, "save_every", "0 or more", self.save_every)
        require(self.validate_every >= 0, "validate_every", "0 or more", self.validate_every)
        most = "0 or more" if self.validate_every else "0, because validate_every is 0"
        require(self.patience >= 0 and (self.validate_every > 0 or not self.patience), "patience", most, self.patience)
        one_each = f"between 1 and batch, which is {self.batch}: every process takes a share of it"
        require(0 < self.processes <= self.batch, "processes", one_each, self.processes)
        if self.sharding == "fsdp":
            require(self.processes > 1, "processes", "2 or more with sharding: fsdp", self.processes)
            alone = f"none with tuner {self.name!r} and optimizer {self.optimizer.name!r}"
            require(self.shards and self.optimizer.name == "adamw", "sharding", alone, self.sharding)
            not_half = "float32 or bfloat16 with sharding: fsdp"
            require(self.precision != "float16", "precision", not_half, self.precision)

    def spec(self) -> dict[str, Any]:
        """Without what has no influence on the result, so that a training is found again whichever way it was run."""
        how = ("gradient_checkpointing", "save_every", *(() if self.validate_every else ("validate_every", "patience")))
        how = (*how, "processes", "sharding")
        usual = {
            one.name for one in fields(self) if one.name in self.later and getattr(self, one.name) == _default(one)
        }
        return {name: value for name, value in super().spec().items() if name not in how and name not in usual}

    def optimizer_for(self, model: nn.Module) -> Optimizer | None:
        """The optimizer of what learns in `model`; None for the Trainer's own."""
        return self.optimizer.build(model, Rates(self.learning_rate, self.weight_decay, self.seed))

    def companions(self, model: nn.Module) -> list[Companion]:
        """What happens beside the steps. May hang hooks on `model`."""
        return []

    @abstractmethod
    def attach(self, backbone: PreTrainedModel, skeleton: Skeleton) -> None:
        """Make what should learn trainable, and only that; may add modules in place. New numbers come from torch's
        global generator, which the caller has seeded."""

    @abstractmethod
    def collect(self, backbone: PreTrainedModel, skeleton: Skeleton) -> Iterator[tuple[str, Tensor | Factors]]:
        """Canonical name and new value of every parameter that learned. May merge adapters into `backbone`."""


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
