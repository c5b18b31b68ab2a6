"""What an optimizer is, which parameters are hidden matrices, and how two optimizers work as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from storage.errors import InvalidInput
from tasks.choice import Choice


@dataclass(frozen=True)
class Rates:
    """What a tuner says of its steps, whichever optimizer takes them. `seed` decides what an optimizer draws."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Stepper(Choice, ABC):
    """What `deltaworks tuners` tells of every optimizer.

    source, library: where the method comes from, and the code
    steps:           which parameters it is for; AdamW takes the others
    state:           numbers that it keeps of a matrix [s, l], s <= l
    """

    source: ClassVar[str]
    library: ClassVar[str]
    steps: ClassVar[str]
    state: ClassVar[str]

    name: str
    version: int

    @abstractmethod
    def build(self, model: nn.Module, rates: Rates) -> Optimizer | None:
        """The optimizer of what learns in `model`; None for the Trainer's own.

        All that it must remember is in its `state_dict`, as numbers and tensors. Raises InvalidInput if nothing that
        learns is for it.
        """


class Split(NamedTuple):
    """The parameters that learn: hidden matrices, other matrices and tensors, and vectors, which never decay."""

    hidden: list[nn.Parameter]
    other: list[nn.Parameter]
    vectors: list[nn.Parameter]


def split(model: nn.Module, name: str) -> Split:
    """Hidden matrices are all 2-D parameters but embeddings and the output head. InvalidInput if none learns."""
    from transformers import PreTrainedModel

    outside: set[int] = set()
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        for one in (module if isinstance(module, nn.Embedding) else None, head):
            outside |= {id(parameter) for parameter in one.parameters()} if one is not None else set()
    found = Split([], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and id(parameter) not in outside
            place = found.hidden if hidden else found.other if parameter.ndim > 1 else found.vectors
            place.append(parameter)
    if not found.hidden:
        raise InvalidInput(
            f"optimizer {name!r} works on matrices, and none of the parameters that learn is one",
            remedy="Set optimizer to {name: adamw}, or let linear layers learn",
        )
    return found


def with_adamw(optimizer: Optimizer, parts: Split, rates: Rates) -> Optimizer:
    """`optimizer`, and AdamW for all of `parts` that it does not step."""
    stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    rest = [one for one in (*parts.hidden, *parts.other) if id(one) not in stepped]
    groups = [{"params": rest, "weight_decay": rates.weight_decay}, {"params": parts.vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return Paired(optimizer, torch.optim.AdamW(groups, lr=rates.learning_rate)) if groups else optimizer


class Paired(Optimizer):
    """Two optimizers as one: their groups and states are this one's, so that schedules and saves see all of them."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self._members = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for member in self._members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        place = 0
        for member in self._members:
            count = len(member.param_groups)
            member.param_groups = self.param_groups[place : place + count]
            member.state = self.state
            place += count
