"""LoRA (arXiv 2106.09685), by peft: frozen weights plus a low-rank product that learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from storage.errors import InvalidInput
from tasks.choice import require
from tasks.naming import Skeleton
from tasks.tuners.base import Factors, Training

_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Lora(Training):
    """W + (alpha / rank) B A. `targets`: endings of module names, or all linear layers of the backbone.

    The factors are kept as they are: the update costs rank * (m + n) numbers instead of m * n.
    """

    name: Literal["lora"] = "lora"
    version: Literal[1] = 1
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.alpha > 0, "alpha", "positive", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)

    def attach(self, backbone: PreTrainedModel, skeleton: Skeleton) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        if targets == "all-linear":
            linear = [slot.memory for slot in skeleton.slots.values() if slot.role == "linear.weight"]
            targets = [memory.removesuffix(".weight") for memory in linear if not memory.startswith("lm_head.")]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)
        try:
            inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)
        except ValueError as error:
            raise InvalidInput(f"LoRA targets {self.targets!r} fit no layer of {skeleton.architecture}") from error
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def collect(self, backbone: PreTrainedModel, skeleton: Skeleton) -> Iterator[tuple[str, Tensor | Factors]]:
        from peft.tuners.lora import LoraLayer

        for path, module in backbone.named_modules():
            if isinstance(module, LoraLayer):
                B = module.lora_B[_ADAPTER].weight.detach() * module.scaling[_ADAPTER]
                A = module.lora_A[_ADAPTER].weight.detach()
                # Conv1D (GPT-2) holds its weight transposed, so what is added to it is (B A)^T
                transposed = getattr(module, "fan_in_fan_out", False)
                yield skeleton.canonical(f"{path}.weight"), Factors(A.T, B.T) if transposed else Factors(B, A)
