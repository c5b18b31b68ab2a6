"""AdaLoRA (arXiv 2303.10512), by peft: low-rank products whose ranks move to the layers that need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tasks.choice import require
from tasks.tuners.adapter import ADAPTER, Adapter, factors
from tasks.tuners.base import Companion, Factors
from tasks.tuners.targets import CONV, LINEAR, TRANSPOSED, Layer, require_rank


@dataclass(frozen=True, kw_only=True)
class AdaLora(Adapter):
    """W + alpha / initial * B diag(E) A. Each layer begins with rank `initial`; on average `rank` is left.

    hold, settle: the shares of the steps before ranks shrink, and after they did
    orthogonal: weight of the loss that keeps the rows of A and the columns of B orthonormal

    alpha is divided by `initial` throughout. With `validate_every`, the best weights may be from before the ranks
    shrank. What is kept are factors, each with as many columns as its layer's rank; a layer left without rank is the
    base's. The learning rate fits small models; E begins at 0 and A, B small, so it has to be larger than with LoRA.
    """

    source: ClassVar[str] = "arXiv 2303.10512"
    trains: ClassVar[str] = "B, E and A beside linear layers and convolutions"
    stored: ClassVar[str] = "factors; whole weights of convolutions"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (*LINEAR, *TRANSPOSED, *CONV)

    name: Literal["adalora"] = "adalora"
    version: Literal[1] = 1
    learning_rate: float = 1e-2
    rank: int = 8
    initial: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    hold: float = 0.1
    settle: float = 0.3
    orthogonal: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.initial > self.rank, "initial", f"more than rank, {self.rank}", self.initial)
        require(self.alpha > 0, "alpha", "positive", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        require(self.orthogonal >= 0, "orthogonal", "0 or more", self.orthogonal)
        require(self.hold >= 0 and self.settle >= 0, "hold and settle", "0 or more", (self.hold, self.settle))
        first, last = round(self.hold * self.steps), round(self.settle * self.steps)
        require(first < self.steps - last, "hold and settle", "less than all steps together", (self.hold, self.settle))

    def check(self, layers: list[Layer]) -> None:
        require_rank("initial", self.initial, layers)

    def config(self, targets: str) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=self.initial,
            target_r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            tinit=round(self.hold * self.steps),
            tfinal=round(self.settle * self.steps),
            total_step=self.steps,
            orth_reg_weight=self.orthogonal,
            target_modules=targets,
        )

    def change(self, layer: Any) -> Tensor | Factors | None:
        E = layer.lora_E[ADAPTER].detach().flatten()
        kept = E.nonzero().flatten()
        if not len(kept):
            return None
        if layer.get_base_layer().weight.ndim != 2:
            return super().change(layer)
        scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5)
        B = layer.lora_B[ADAPTER].detach()[:, kept] * E[kept] * scale
        return factors(layer, B, layer.lora_A[ADAPTER].detach()[kept])

    def companions(self, model: nn.Module) -> list[Companion]:
        if self.orthogonal:
            model.register_forward_hook(self._with_penalty)
        return [Allocation(self.config(""), model)]

    def _with_penalty(self, model: nn.Module, _: Any, output: Any) -> Any:
        """peft adds this in the forward pass of its own wrapper, which is not there: only its layers are."""
        if model.training and output.get("loss") is not None:
            output["loss"] = output["loss"] + self.orthogonal * penalty(model)
        return output


def penalty(model: nn.Module) -> Tensor:
    """How far A A^T and B^T B are from the identity: as peft has it, the mean over all factors of the Frobenius norm.

    Equation 4 of the paper has the sum of its squares.
    """
    terms = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(terms).mean()


class Allocation(Companion):
    """Moves the budget of ranks after every step, by peft's allocator."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        from peft.tuners.adalora import RankAllocator

        self._model, self._allocator = model, RankAllocator(model, config, ADAPTER)
        self._last = config.total_step - config.tfinal  # the step after which ranks stay
        self._pattern: dict[str, list[bool]] | None = None

    def stepped(self, step: int, skipped: bool) -> None:
        model = self._model
        for parameter in model.parameters():
            # a layer that the loss does not reach has no gradient, and one that is too large for float16 says nothing
            if parameter.requires_grad and (parameter.grad is None or skipped):
                parameter.grad = torch.zeros_like(parameter)
        if step <= self._last:
            _, pattern = self._allocator.update_and_allocate(model, step, force_mask=step == self._last)
            self._pattern = pattern or self._pattern
        elif self._pattern is not None:
            self._allocator.mask_using_rank_pattern(model, self._pattern)

    def state(self) -> dict[str, Any]:
        kept = self._allocator
        return {"sensitivity": kept.exp_avg_ipt, "uncertainty": kept.exp_avg_unc, "pattern": self._pattern}

    def load(self, state: dict[str, Any]) -> None:
        there = dict(self._model.named_parameters())
        for name in state["sensitivity"]:
            self._allocator.ipt[name] = torch.zeros_like(there[name])  # allocated anew in every step
            self._allocator.exp_avg_ipt[name] = state["sensitivity"][name].to(there[name].device)
            self._allocator.exp_avg_unc[name] = state["uncertainty"][name].to(there[name].device)
        self._pattern = state["pattern"]
