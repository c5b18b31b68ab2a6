"""SHiRA (arXiv 2406.13175), by peft: a fixed few of the weights' own entries learn, all others stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tasks.choice import require
from tasks.tuners.adapter import Adapter
from tasks.tuners.targets import Layer


@dataclass(frozen=True, kw_only=True)
class Shira(Adapter):
    """rank * (m + n) entries of a weight [m, n] learn: as many numbers as LoRA of that rank has.

    mask: which entries
        random     drawn for each layer by `seed`
        magnitude  the largest of the base, SHiRA-WM of the paper: the same for every task

    What is kept is the whole weight, of which all other entries are the base's: the update is zero there, and codecs
    that spend nothing on zeros (`exact`, `ternary`) write it small.
    """

    source: ClassVar[str] = "arXiv 2406.13175"
    trains: ClassVar[str] = "a few entries of linear layers' weights"

    name: Literal["shira"] = "shira"
    version: Literal[1] = 1
    learning_rate: float = 2e-3
    rank: int = 4
    mask: Literal["random", "magnitude"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank > 0, "rank", "positive", self.rank)
        usual = self.optimizer.name == "adamw"
        require(usual, "optimizer", "adamw: entries that learn are no matrices", self.optimizer.name)

    def check(self, layers: list[Layer]) -> None:
        least = min(layers, key=lambda one: one.rows * one.columns / (one.rows + one.columns))
        most = least.rows * least.columns // (least.rows + least.columns)
        what = f"at most {most}, with which nearly every entry of {least.path} [{least.rows}, {least.columns}] learns"
        require(self.rank <= most, "rank", what, self.rank)

    def config(self, targets: str) -> Any:
        from peft import ShiraConfig

        # as it is by default; torch warns where it is not said
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        config = ShiraConfig(r=self.rank, target_modules=targets)
        config.mask_fn = largest if self.mask == "magnitude" else drawn
        return config


def drawn(layer: nn.Module, rank: int, **_: Any) -> Tensor:
    """A mask from the global generator. peft's own is the same for all layers of one shape, whatever the seed."""
    weight: Any = layer.weight
    return _mask(weight, torch.randperm(weight.numel())[: rank * sum(weight.shape)])


def largest(layer: nn.Module, rank: int, **_: Any) -> Tensor:
    """A mask of the largest entries; of equal ones, the first."""
    weight: Any = layer.weight
    order = weight.detach().abs().flatten().sort(descending=True, stable=True).indices
    return _mask(weight, order[: rank * sum(weight.shape)])


def _mask(weight: Tensor, places: Tensor) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[places.cpu()] = True
    return mask.reshape(weight.shape).to(weight.device)
