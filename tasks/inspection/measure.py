"""What is counted of one tensor: changes, moments, ranks, and the bits that its information takes.

kurtosis        excess kurtosis of the population, m4 / m2^2 - 3 around the mean, zeros included: 0 for a normal
                distribution, 3 for Laplace's, more the heavier the tails
effective rank  exp of the entropy of the singular values over their sum (Roy and Vetterli 2007): 1 if one direction
                holds everything, the smaller side if all are alike; about 0.8 of it for square noise
stable rank     squared Frobenius norm over the largest squared singular value
ternary bound   H2(k) + k bits for each number where a share k is not zero: places and signs, magnitudes left out
                (ComPEFT, arXiv 2311.13171, section 2.2)
step entropy    bits of how many floats a number moved, given the exponent of the base: what `exact` codes. Estimated by
                the frequencies found, which is too low where a tensor has few numbers
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.codecs.ulps import MANTISSAS, bits_of, steps
from tasks.devices import load_linalg
from tasks.spectrum import numerical_rank, singular_values

_PIECE = 1 << 16  # elements that stay in a core's cache


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sums of the second, third and fourth powers around the mean, in float64. They can be added."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        """Of both together (Pebay 2008, equations 2.1 to 3.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b = self.count, other.count
        n, d = a + b, other.mean - self.mean
        second = self.second + other.second + d * d * a * b / n
        third = self.third + other.third + d**3 * a * b * (a - b) / n**2
        third += 3 * d * (a * other.second - b * self.second) / n
        fourth = self.fourth + other.fourth + d**4 * a * b * (a * a - a * b + b * b) / n**3
        fourth += 6 * d * d * (a * a * other.second + b * b * self.second) / n**2
        fourth += 4 * d * (a * other.third - b * self.third) / n
        return Moments(n, self.mean + d * b / n, second, third, fourth)

    @property
    def squares(self) -> float:
        """The squared L2 norm."""
        return self.second + self.count * self.mean**2

    @property
    def kurtosis(self) -> float | None:
        """None where all numbers are equal."""
        scale = self.second**2
        return self.count * self.fourth / scale - 3 if scale > 0 else None


@dataclass(frozen=True)
class Ranks:
    """Of a matrix other than zero.

    side:      its smaller side, the largest rank it can have
    rank:      singular values above rounding in float32: s_i > s_0 * larger side * eps, as `matrix_rank` counts
    effective: see above
    stable:    see above
    """

    side: int
    rank: int
    effective: float
    stable: float


def numbers_of(delta: Tensor, tolerances: Sequence[float]) -> tuple[Moments, int, tuple[int, ...]]:
    """Moments, how many numbers are not zero, and how many are larger than each tolerance."""
    moments, changed = Moments(), 0
    beyond = [0] * len(tolerances)
    for piece in _pieces(delta):
        moments += _moments(piece.astype(np.float64))
        size = np.abs(piece)
        changed += int(np.count_nonzero(size))
        for place, tolerance in enumerate(tolerances):
            beyond[place] += int(np.count_nonzero(size > tolerance))
    return moments, changed, tuple(beyond)


def changed_bits(base: Tensor, tuned: Tensor) -> int:
    """How many numbers differ in a bit; both of one dtype of `MANTISSAS`. -0 and 0 differ."""
    return int(np.count_nonzero(bits_of(base) != bits_of(tuned)))


def can_compare(base: Tensor, tuned: Tensor) -> bool:
    """Whether a difference of bits is a difference of numbers."""
    return base.dtype == tuned.dtype and base.dtype in MANTISSAS and base.shape == tuned.shape


def ternary_bound(changed: int, elements: int) -> float:
    """Bits of all numbers of a tensor together: elements * (H2(k) + k) with k = changed / elements."""
    return sum(-count * math.log2(count / elements) for count in (changed, elements - changed) if count) + changed


def step_entropy(base: Tensor, tuned: Tensor) -> float | None:
    """Bits of all numbers together: sum over exponents e of n_e * H(step | e).

    None for numbers of more than 16 bits: of their steps nearly every one is another, and frequencies say nothing.
    """
    if not can_compare(base, tuned) or base.element_size() != 2:
        return None
    old = bits_of(base)
    exponents = (old << 1) >> (MANTISSAS[base.dtype] + 1)
    pairs = exponents.astype(np.uint32) << np.uint32(16) | steps(old, bits_of(tuned))
    found, counts = np.unique(pairs, return_counts=True)
    of_exponent = np.bincount(found >> np.uint32(16), weights=counts)
    return max(_weight(of_exponent) - _weight(counts), 0.0)


def ranks_of(values_K: Tensor, rows: int, columns: int) -> Ranks | None:
    """The ranks of a matrix [rows, columns] with these singular values; None for zeros. Values left out are zeros."""
    if not values_K.any():
        return None
    share_K = values_K[values_K > 0] / values_K.sum()
    effective = math.exp(-float((share_K * share_K.log()).sum()))
    stable = float((values_K / values_K[0]).square().sum())
    return Ranks(min(rows, columns), numerical_rank(values_K.float(), rows, columns), effective, stable)


def values_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of B A, of its factors' inner size: what is beyond it are zeros. The product is not made."""
    load_linalg(left.device)
    inner_B, inner_A = (torch.linalg.qr(one.double()).R for one in (left, right.mT))
    return singular_values(inner_B @ inner_A.mT)


def _weight(counts: NDArray[Any]) -> float:
    """The sum of n log2 n."""
    some = counts[counts > 0].astype(np.float64)
    return float((some * np.log2(some)).sum())


def _moments(piece: NDArray[np.float64]) -> Moments:
    mean = float(piece.mean())
    around = piece - mean
    squares = around * around
    return Moments(
        piece.size, mean, float(squares.sum()), float((squares * around).sum()), float((squares * squares).sum())
    )


def _pieces(delta: Tensor) -> Iterator[NDArray[Any]]:
    flat = delta.detach().cpu().reshape(-1).numpy()
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]
