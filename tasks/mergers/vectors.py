"""Updates as vectors: their order, their inner products, their mixtures. For mergers that see all updates at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cmp_to_key
from typing import TypeVar

import torch
from torch import Tensor

from tasks.mergers.base import Columns

Item = TypeVar("Item")

_PIECE = 1 << 18  # elements per vector that are in float64 at once


def kept(hold: bool, stream: Callable[[], Iterable[Item]]) -> Callable[[], Iterable[Item]]:
    """The stream, computed once for all passes if it may be held in memory, else for each of them."""
    if not hold:
        return stream
    found: list[Item] = []

    def again() -> Iterable[Item]:
        if not found:
            found.extend(stream())
        return found

    return again


def in_fixed_order(deltas: Sequence[Tensor], weights: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """Deltas (and their weights) in an order that depends on their values alone.

    Sums round differently in different orders. After this, a method that is symmetric on paper gives the same bits
    whatever the order in which the updates came.
    """
    order = fixed_order(lambda: [deltas], weights)
    return [deltas[index] for index in order], [weights[index] for index in order]


def fixed_order(deltas: Columns, weights: Sequence[float]) -> list[int]:
    """The same order as indices, of deltas that come piece by piece. Rarely looks further than the first piece."""

    def compare(one: int, two: int) -> int:
        """By the first element that differs; by the weight where none does."""
        for piece in deltas():
            here, there = piece[one].flatten(), piece[two].flatten()
            different = here != there
            if bool(different.any()):
                place = int(different.int().argmax())
                return 1 if bool(here[place] > there[place]) else -1
        return (weights[one] > weights[two]) - (weights[one] < weights[two])

    return sorted(range(len(weights)), key=cmp_to_key(compare))


def gram(deltas: Sequence[Tensor], onto: Tensor | None = None) -> Tensor:
    """Inner products of the deltas [K tensors of one shape] as [K, K] in float64 on the CPU, in one pass.

    With `onto` those of onto + delta, whose sums are never rounded to float32.
    """
    rows = [delta.flatten() for delta in deltas]
    shift = None if onto is None else onto.flatten()
    found_KK = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for start in range(0, rows[0].numel(), _PIECE):
        place = slice(start, start + _PIECE)
        piece_KN = torch.stack([row[place].double() for row in rows])
        if shift is not None:
            piece_KN += shift[place].double()
        found_KK += piece_KN @ piece_KN.T
    return found_KK.cpu()


def mixture(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The sum of coefficient times tensor, added in float64, in the dtype of the first."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient:
            total += tensor.double() * coefficient
    return total.to(tensors[0].dtype)
