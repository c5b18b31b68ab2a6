"""What GaLore and APOLLO share: Adam's moments of a matrix are kept in a subspace, which is renewed now and then."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from tasks.choice import require
from tasks.optimizers.base import Rates, Stepper, split, with_adamw

# S: the shorter side of a matrix, L: the longer one, R: the rank of the subspace
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Projected(Stepper):
    """`rank` of the subspace, renewed every `every` steps; `scale` of the step.

    A matrix that is no larger than `rank` is left to AdamW. Memory is saved in training alone: the update is as dense
    as with AdamW.
    """

    rank: int = 64
    every: int = 200
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.every > 0, "every", "positive", self.every)
        require(self.scale > 0, "scale", "positive", self.scale)

    @abstractmethod
    def basis(self, gradient_SL: Tensor, generator: Generator) -> Tensor:
        """P_RS, which projects gradients to [R, L] until it is renewed. `generator` draws on the CPU."""

    @abstractmethod
    def direction(self, gradient_SL: Tensor, low_RL: Tensor, adam_RL: Tensor, state: dict[str, Any]) -> Tensor:
        """The step [S, L] before the learning rate and `scale`, from P G and from what Adam makes of P G.

        `adam_RL` is without Adam's correction of the bias, which is in the learning rate. What is put into `state`,
        numbers and tensors, is there in the matrix's next step.
        """

    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        parts = split(model, self.name)
        large = [one for one in parts.hidden if min(one.shape) > self.rank]
        widest = max(min(one.shape) for one in parts.hidden)
        what = f"less than {widest}, the shorter side of the largest matrix that learns"
        require(bool(large), f"rank of optimizer {self.name}", what, self.rank)
        return with_adamw(SubspaceAdam(large, self, rates), parts, rates)


class SubspaceAdam(Optimizer):
    """Adam with decoupled weight decay, on the gradients of matrices as `method` projects them."""

    def __init__(self, matrices: list[nn.Parameter], method: Projected, rates: Rates) -> None:
        super().__init__(matrices, {"lr": rates.learning_rate, "weight_decay": rates.weight_decay})
        self._method, self._seed = method, rates.seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for number, matrix in enumerate(group["params"]):
                if matrix.grad is not None:
                    self._advance(number, matrix, group["lr"], group["weight_decay"])
        return loss

    def _advance(self, number: int, matrix: nn.Parameter, rate: float, decay: float) -> None:
        method, state = self._method, self.state[matrix]
        assert matrix.grad is not None
        turned = matrix.shape[0] > matrix.shape[1]
        gradient_SL = matrix.grad.T if turned else matrix.grad
        step = state.get("step", 0)
        if step % method.every == 0:
            state["basis"] = method.basis(gradient_SL, _generator(self._seed, number, step))
        low_RL = state["basis"] @ gradient_SL
        if step == 0:
            state["mean"], state["square"] = torch.zeros_like(low_RL), torch.zeros_like(low_RL)
        state["step"] = step + 1
        state["mean"].lerp_(low_RL, 1 - _BETAS[0])
        state["square"].mul_(_BETAS[1]).addcmul_(low_RL, low_RL, value=1 - _BETAS[1])
        adam_RL = state["mean"] / (state["square"].sqrt() + _EPSILON)
        step_SL = method.direction(gradient_SL, low_RL, adam_RL, state)
        unbiased = math.sqrt(1 - _BETAS[1] ** (step + 1)) / (1 - _BETAS[0] ** (step + 1))
        matrix.mul_(1 - rate * decay)
        matrix.add_(step_SL.T if turned else step_SL, alpha=-rate * unbiased * method.scale)


def _generator(seed: int, number: int, step: int) -> Generator:
    """The same draws whatever was drawn before, on any device, in a training that goes on as in one never stopped."""
    key = hashlib.sha256(f"{seed} {number} {step}".encode()).digest()[:8]
    return Generator().manual_seed(int.from_bytes(key, "little") >> 1)
