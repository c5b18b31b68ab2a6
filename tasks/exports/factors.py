"""Low-rank factors of one tensor's change: those that are stored, or the best of a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.choice import require
from tasks.spectrum import thin_svd


@dataclass(frozen=True)
class LoraForm:
    """
    rank:  of tensors that are not stored as factors; those that are keep theirs
    error: in place of `rank`: per tensor the smallest rank with at most this relative Frobenius error
    skip:  leave out what is no linear weight (norms, biases, embeddings ...): programs that serve adapters often take
           nothing else
    dtype: of the factors
    """

    rank: int = 16
    error: float | None = None
    skip: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", "positive", self.rank)
        require(self.error is None or 0 <= self.error < 1, "error", "in [0, 1)", self.error)
        require(self.dtype.is_floating_point, "dtype", "float32, bfloat16 or float16", self.dtype)


class Product(NamedTuple):
    """A low-rank change of a weight [m, n]: B [m, r] times A [r, n], and how far it is from the exact one.

    `off` and `norm` are Frobenius norms of the difference and of the exact change; `svd` says whether it was cut.
    """

    B: Tensor
    A: Tensor
    off: float
    norm: float
    svd: bool


def product(delta: Tensor, form: LoraForm, stored: tuple[Tensor, Tensor] | None) -> Product | None:
    """Factors of `delta` [m, n] on the CPU: the `stored` ones, or cut by SVD; None if it is zero."""
    if not delta.any():
        return None
    B, A = (one.to(delta.device) for one in stored or cut(delta, form))
    off = delta - B.to(form.dtype).to(delta.dtype) @ A.to(form.dtype).to(delta.dtype)
    return Product(B.cpu(), A.cpu(), math.sqrt(square(off)), math.sqrt(square(delta)), stored is None)


def cut(delta: Tensor, form: LoraForm) -> tuple[Tensor, Tensor]:
    """B [m, r] and A [r, n] of the best product of that rank (Eckart and Young): singular values shared out evenly."""
    found = thin_svd(delta)
    rank = form.rank if form.error is None else rank_within(found.s, form.error)
    rank = min(rank, len(found.s))
    root = found.s[:rank].sqrt()
    return found.U[:, :rank] * root, root[:, None] * found.Vh[:rank]


def rank_within(s_K: Tensor, error: float) -> int:
    """The smallest rank, 1 or more, that leaves at most `error` of the Frobenius norm: s_K are all singular values."""
    squares = s_K.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # of what is cut off before each value
    return max(1, int((left > error**2 * left[0]).sum()))


def square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
