"""LoRA (arXiv 2106.09685), by peft: frozen weights plus a low-rank product that learns. DoRA, rsLoRA and LoRA+ too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tasks.choice import require
from tasks.tuners.adapter import ADAPTER, Adapter, factors
from tasks.tuners.base import Factors, Training
from tasks.tuners.targets import CONV, LINEAR, TRANSPOSED, Layer, require_rank


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """W + (alpha / rank) B A. `targets`: endings of module names, or `all-linear`, `all-conv`, `all` of both.

    rslora: divide alpha by the root of the rank, so that large ranks learn as fast as small ones (arXiv 2312.03732).
    dora: direction and length of each row learn apart (arXiv 2402.09353). The change is then not low-rank.
    ratio: B learns so many times as fast as A, LoRA+ (arXiv 2402.12354), whose paper takes 16; 1 is LoRA.

    The factors of linear layers are kept as they are: the update costs rank * (m + n) numbers instead of m * n. With
    DoRA, and of convolutions, whole weights are kept.
    """

    source: ClassVar[str] = "arXiv 2106.09685"
    trains: ClassVar[str] = "B and A beside linear layers and convolutions"
    stored: ClassVar[str] = "factors; whole weights with DoRA, of convolutions"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (*LINEAR, *TRANSPOSED, *CONV)
    later: ClassVar[tuple[str, ...]] = (*Training.later, "rslora", "dora", "ratio")

    shards: ClassVar[bool] = True

    name: Literal["lora"] = "lora"
    version: Literal[1] = 1
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.alpha > 0, "alpha", "positive", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        require(self.ratio >= 1, "ratio", "1 or more", self.ratio)
        alone = self.ratio == 1 or self.optimizer.name == "adamw"
        require(alone, "ratio", f"1 with optimizer {self.optimizer.name!r}: LoRA+ sets rates of adamw", self.ratio)

    def check(self, layers: list[Layer]) -> None:
        require_rank("rank", self.rank, layers)

    def config(self, targets: str) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )

    def change(self, layer: Any) -> Tensor | Factors | None:
        if self.dora or layer.get_base_layer().weight.ndim != 2:
            return super().change(layer)
        B = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        return factors(layer, B, layer.lora_A[ADAPTER].weight.detach())

    def optimizer_for(self, model: nn.Module) -> Optimizer | None:
        if self.ratio == 1:
            return super().optimizer_for(model)
        from peft.optimizers import create_loraplus_optimizer

        found: Optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=self.learning_rate,
            loraplus_lr_ratio=self.ratio,
            loraplus_weight_decay=self.weight_decay,
        )
        return found
