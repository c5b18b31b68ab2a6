"""Adapters: the base of tuners by peft. What is adapted, how it is attached, and what is kept of it afterwards.

A tuner by peft is one file: a subclass with its settings, its peft configuration, and what `check` refuses. What is
kept is the merged weight in float32, whatever the method; a method whose change is a product of factors returns them
from `change`. Updates are taken against the base in the store, so it does not matter if a method changes the weights
that it is attached to.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.tuners.base import Factors, Training
from tasks.tuners.targets import LINEAR, Layer, Targets, find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.naming import Skeleton

ADAPTER = "default"  # what peft calls the one adapter that there is


@dataclass(frozen=True, kw_only=True)
class Adapter(Training):
    """Frozen weights, and modules that learn beside them.

    `targets`: `all-linear` but the output head, `all-conv`, `all` of both, or a list of endings of module names.
    """

    library: ClassVar[str] = "peft"
    stored: ClassVar[str] = "whole weights"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = LINEAR

    targets: Targets = "all-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.targets) > 0, "targets", "a word or some names", self.targets)

    @abstractmethod
    def config(self, targets: str) -> Any:
        """peft's configuration. `targets` is a regular expression that fits exactly the layers to adapt."""

    def check(self, layers: list[Layer]) -> None:
        """Refuse settings that do not fit these layers."""

    def change(self, layer: Any) -> Tensor | Factors | None:
        """What a layer learned: its new weight, or factors of what is added to it; None if it is as it was."""
        if not layer.merged:
            layer.merge()
        weight: Tensor = layer.get_base_layer().weight.detach()
        return weight

    def attach(self, backbone: PreTrainedModel, skeleton: Skeleton) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        layers = find(self.targets, skeleton, self.adapts, self.name)
        self.check(layers)
        config = self.config("|".join(re.escape(layer.path) for layer in layers))
        try:
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](backbone, config, ADAPTER)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InvalidInput(
                f"{self.name} cannot be attached to {skeleton.architecture}: {error}",
                remedy="Set targets to layers that it can adapt, or take another tuner: `deltaworks tuners`",
            ) from error

    @torch.no_grad()
    def collect(self, backbone: PreTrainedModel, skeleton: Skeleton) -> Iterator[tuple[str, Tensor | Factors]]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, module in backbone.named_modules():
            if isinstance(module, BaseTunerLayer):
                found = self.change(module)
                if found is not None:
                    yield skeleton.canonical(f"{path}.weight"), found


def factors(layer: Any, B: Tensor, A: Tensor) -> Factors:
    """B A as it is added to the weight of `layer`. Conv1D (GPT-2) holds that transposed: (B A)^T = A^T B^T."""
    if getattr(layer, "fan_in_fan_out", False):
        return Factors(A.T.contiguous(), B.T.contiguous())
    return Factors(B, A)
