"""Full: the weights themselves learn, by transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from tasks.choice import require
from tasks.tuners.base import Factors, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.naming import Skeleton


@dataclass(frozen=True, kw_only=True)
class Full(Training):
    """`weights`: `all` parameters, or `linear` layers' weights alone, which merges better at equal accuracy."""

    source: ClassVar[str] = "common practice"
    library: ClassVar[str] = "transformers"
    trains: ClassVar[str] = "weights of linear layers, or all parameters"
    stored: ClassVar[str] = "whole weights"

    shards: ClassVar[bool] = True

    name: Literal["full"] = "full"
    version: Literal[1] = 1
    weights: Literal["all", "linear"] = "linear"

    def attach(self, backbone: PreTrainedModel, skeleton: Skeleton) -> None:
        for name, parameter in backbone.named_parameters():
            slot = skeleton.slots.get(skeleton.canonical(name))
            parameter.requires_grad_(self.weights == "all" or (slot is not None and slot.role == "linear.weight"))
        learns = any(parameter.requires_grad for parameter in backbone.parameters())
        require(learns, "weights", "'all', because this architecture has no linear layers", self.weights)

    def collect(self, backbone: PreTrainedModel, skeleton: Skeleton) -> Iterator[tuple[str, Tensor | Factors]]:
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                canonical = skeleton.canonical(name)
                yield skeleton.tied.get(canonical, canonical), parameter.detach()
