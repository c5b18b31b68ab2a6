"""RandLoRA (arXiv 2502.00987), by peft: full-rank changes as learned mixtures of fixed random low-rank products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from tasks.choice import require
from tasks.tuners.adapter import Adapter
from tasks.tuners.targets import LINEAR, TRANSPOSED, Layer, narrow


@dataclass(frozen=True, kw_only=True)
class RandLora(Adapter):
    """W + sum_i B_i diag(lambda_i) A diag(gamma_i): B_i and A are random and shared by all layers, lambda, gamma learn.

    rank: of one product. There are as many as make the change full-rank, so a smaller rank learns more numbers.
    alpha: the size of the change. peft's own 640 with rank 32 is far too large for small models.
    projection_seed: decides the random products. `seed` does not, so tasks share them unless told otherwise.
    sparse: products of -1, 0 and 1, two thirds of them zeros.
    """

    source: ClassVar[str] = "arXiv 2502.00987"
    trains: ClassVar[str] = "the mixture of random products beside linear layers"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (*LINEAR, *TRANSPOSED)

    name: Literal["randlora"] = "randlora"
    version: Literal[1] = 1
    learning_rate: float = 2e-3
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    projection_seed: int = 0
    sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.alpha > 0, "alpha", "positive", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        require(self.projection_seed >= 0, "projection_seed", "0 or more", self.projection_seed)

    def check(self, layers: list[Layer]) -> None:
        least = narrow(layers)
        require(self.rank <= least.side, "rank", f"at most {least.side}, the smaller side of {least.path}", self.rank)

    def config(self, targets: str) -> Any:
        from peft import RandLoraConfig

        with warnings.catch_warnings():  # about products that are not saved: none are, they are drawn from their seed
            warnings.simplefilter("ignore", UserWarning)
            return RandLoraConfig(
                r=self.rank,
                randlora_alpha=self.alpha,
                randlora_dropout=self.dropout,
                projection_prng_key=self.projection_seed,
                save_projection=False,
                sparse=self.sparse,
                target_modules=targets,
            )
