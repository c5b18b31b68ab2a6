"""What GaLore and APOLLO share: gradients of hidden matrices in a subspace, by pytorch-optimizer (an extra)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from storage.errors import InvalidInput
from tasks.choice import Choice, require
from tasks.optimizers.base import Rates, split


@dataclass(frozen=True)
class Projected(Choice, ABC):
    """`rank` of the subspace, renewed every `every` steps; `scale` of what comes back from it.

    The moments take rank * max(m, n) numbers of a matrix [m, n] instead of m * n. A matrix that is no larger than
    `rank` is not projected. It does not thin the update: that is as dense as with AdamW.
    """

    rank: int = 64
    every: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.every > 0, "every", "positive", self.every)
        require(self.scale > 0, "scale", "positive", self.scale)

    @abstractmethod
    def make(self, library: Any, groups: list[dict[str, Any]], rate: float) -> Optimizer:
        """The library's optimizer over these groups."""

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise InvalidInput(
                f"optimizer {str(getattr(self, 'name', ''))!r} needs the package pytorch-optimizer",
                remedy="pip install 'deltaworks[optimizers]', or set optimizer to {name: adamw}",
            ) from error
        parts = split(model, str(getattr(self, "name", "")))
        large = [one for one in parts.hidden if min(one.shape) > self.rank]
        if not large:
            widest = max(min(one.shape) for one in parts.hidden)
            require(
                False, "the optimizer's rank", f"less than {widest}, the smaller side of the largest matrix", self.rank
            )
        held = {id(one) for one in large}
        small = [*(one for one in parts.hidden if id(one) not in held), *parts.other]
        settings = {"rank": self.rank, "update_proj_gap": self.every, "scale": self.scale, "projection_type": "std"}
        groups: list[dict[str, Any]] = [
            {"params": large, "weight_decay": rates.weight_decay, **settings},
            {"params": small, "weight_decay": rates.weight_decay},
            {"params": parts.vectors, "weight_decay": 0.0},
        ]
        optimizer = self.make(pytorch_optimizer, [one for one in groups if one["params"]], rates.learning_rate)
        optimizer.register_state_dict_post_hook(_plain)
        optimizer.register_load_state_dict_pre_hook(_rebuilt)
        return optimizer


def _plain(optimizer: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
    """The state with projectors as their numbers: a save holds no objects."""
    states = {}
    for key, state in found["state"].items():
        projector = state.get("projector")
        kept = {} if projector is None else {"projector": [projector.ortho_matrix, projector.last_svd_step]}
        states[key] = {**state, **kept}
    return {**found, "state": states}


def _rebuilt(optimizer: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
    """The inverse."""
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    group = found["param_groups"][0]
    states = {}
    for key, state in found["state"].items():
        states[key] = dict(state)
        if isinstance(state.get("projector"), list):
            projector = GaLoreProjector(
                rank=group["rank"],
                update_proj_gap=group["update_proj_gap"],
                scale=group["scale"],
                projection_type=group["projection_type"],
            )
            projector.ortho_matrix, projector.last_svd_step = state["projector"]
            states[key]["projector"] = projector
    return {**found, "state": states}
