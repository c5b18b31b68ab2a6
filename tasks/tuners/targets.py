"""Targets: which modules of an architecture an adapter goes to. Everything that can be wrong is found here, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from storage.errors import InvalidInput
from tasks.choice import require

if TYPE_CHECKING:
    from tasks.naming import Skeleton, Slot

Targets = tuple[str, ...] | Literal["all-linear", "all-conv", "all"]

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear,)
TRANSPOSED: tuple[type[nn.Module], ...] = (Conv1D,)  # GPT-2's linear layers, which hold their weights transposed
CONV: tuple[type[nn.Module], ...] = (nn.Conv2d,)
_ROLES = {"all-linear": ("linear.weight",), "all-conv": ("conv.weight",), "all": ("linear.weight", "conv.weight")}


@dataclass(frozen=True)
class Layer:
    """A module with a weight: its path in memory, its kind, the shape of its weight as a matrix [rows, columns]."""

    path: str
    module: nn.Module
    rows: int
    columns: int

    @property
    def side(self) -> int:
        return min(self.rows, self.columns)


def find(targets: Targets, skeleton: Skeleton, adapts: tuple[type[nn.Module], ...], tuner: str) -> list[Layer]:
    """The layers that `targets` mean: a word for all of a kind, or endings of module names.

    Raises InvalidInput if a name fits nothing, or something that this tuner cannot adapt.
    """
    slots = {slot.memory.removesuffix(".weight"): slot for slot in skeleton.slots.values() if _owned(slot)}
    layers = {path: _layer(path, slot, skeleton) for path, slot in slots.items()}
    if isinstance(targets, str):
        kind = [layers[path] for path, slot in slots.items() if slot.role in _ROLES[targets]]
        found = [one for one in kind if isinstance(one.module, adapts) and not one.path.startswith("lm_head")]
        if not found:
            raise _nothing(targets, skeleton, layers, adapts, tuner)
        return found
    chosen: set[str] = set()
    for target in targets:
        hits = [path for path in layers if path == target or path.endswith(f".{target}")]
        if not hits:
            raise _unknown(target, skeleton, layers)
        for path in hits:
            if not isinstance(layers[path].module, adapts):
                found_kind = _kind(layers[path].module)
                raise InvalidInput(
                    f"targets: {target!r} is {found_kind} ({path}), and {tuner} adapts {_kinds(adapts)}",
                    remedy="Leave it out, or tune with full, weights: all, which changes every parameter",
                )
        chosen |= set(hits)
    return [one for path, one in layers.items() if path in chosen]


def narrow(layers: list[Layer]) -> Layer:
    """The layer with the smallest side: the first that a rank does not fit."""
    return min(layers, key=lambda one: one.side)


def require_rank(setting: str, rank: int, layers: list[Layer]) -> None:
    """Refuse a rank that is more than any of these layers can have. A smaller layer just has columns to spare."""
    widest = max(layers, key=lambda one: one.side)
    most = f"at most {widest.side}, the smaller side of {widest.path}, the largest target"
    require(rank <= widest.side, setting, most, rank)


def _owned(slot: Slot) -> bool:
    return slot.memory.endswith(".weight") and len(slot.shape) > 1


def _layer(path: str, slot: Slot, skeleton: Skeleton) -> Layer:
    rows = slot.shape[0]
    columns = 1
    for size in slot.shape[1:]:
        columns *= size
    return Layer(path, skeleton.model.get_submodule(path), rows, columns)


def _unknown(target: str, skeleton: Skeleton, layers: Mapping[str, Layer]) -> InvalidInput:
    known = list(dict.fromkeys(_endings(layers)))
    tied = [name for name in skeleton.tied if name == f"{target}.weight" or name.endswith(f".{target}.weight")]
    if tied:
        return InvalidInput(
            f"targets: {target!r} has no weight of its own in {skeleton.architecture}: it is tied to "
            f"{skeleton.tied[tied[0]]}",
            remedy="Leave it out",
        )
    near = difflib.get_close_matches(target, [*known, *layers], n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return InvalidInput(
        f"targets: no module of {skeleton.architecture} is called {target!r}",
        remedy=f"{hint}Modules with weights there: {', '.join(known)}",
    )


def _endings(layers: Mapping[str, Layer]) -> Iterator[str]:
    for path in layers:
        yield path.rpartition(".")[2]


def _nothing(
    targets: str,
    skeleton: Skeleton,
    layers: Mapping[str, Layer],
    adapts: tuple[type[nn.Module], ...],
    tuner: str,
) -> InvalidInput:
    there = sorted({_kind(one.module) for one in layers.values()})
    conv = issubclass(nn.Conv2d, adapts) and any(isinstance(one.module, nn.Conv2d) for one in layers.values())
    way = "Set targets to all-conv, or tune" if conv and targets != "all-conv" else "Tune"
    return InvalidInput(
        f"targets: {targets} are none that {tuner} adapts in {skeleton.architecture}: it adapts {_kinds(adapts)}, and "
        f"the weights there belong to {', '.join(there) or 'no module'}",
        remedy=f"{way} with full, weights: all, which changes every parameter",
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _kinds(adapts: tuple[type[nn.Module], ...]) -> str:
    return ", ".join(one.__name__ for one in adapts)
