"""Exact order statistics of a stream of tensors too large to hold: the k-th smallest magnitude, the moments.

A magnitude's bits, read as an integer, sort like the magnitude itself. So the k-th one is found digit by digit,
sixteen bits a pass, by counting: two passes over float32, four over float64, and memory for 65,536 counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Stream = Callable[[], Iterable[Tensor]]  # called once per pass

_DIGIT = 16


def kth_magnitude(stream: Stream, k: int) -> float:
    """The k-th smallest (from 1) of |x| over all elements of the stream, exactly, as `torch.kthvalue` would give it.

    Tensors are float32 or float64. Where both occur, all are compared as float64, which changes no value.
    """
    width, prefix, below = 0, 0, 0
    dtype: torch.dtype | None = None
    while True:
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        bits = _DIGIT
        for tensor in stream():
            dtype = dtype or tensor.dtype
            if tensor.dtype != dtype:
                return kth_magnitude(lambda: (one.double() for one in stream()), k)
            view = torch.int64 if tensor.dtype == torch.float64 else torch.int32
            bits = 64 if tensor.dtype == torch.float64 else 32
            magnitude = tensor.abs().flatten().view(view)
            if width:
                magnitude = magnitude[(magnitude >> (bits - width)) == prefix]
            digit = (magnitude >> (bits - width - _DIGIT)) & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digit, minlength=1 << _DIGIT).cpu()
        cumulative = counts.cumsum(0)
        if width == 0 and not 1 <= k <= int(cumulative[-1]):
            raise ValueError(f"k must be in 1..{int(cumulative[-1])}, found {k}")
        found = int(torch.searchsorted(cumulative, torch.tensor(k - below)))
        below += int(cumulative[found - 1]) if found else 0
        prefix, width = (prefix << _DIGIT) | found, width + _DIGIT
        if width == bits:
            whole = torch.tensor(prefix, dtype=torch.int64 if bits == 64 else torch.int32)
            return float(whole.view(torch.float64 if bits == 64 else torch.float32))


@dataclass(frozen=True)
class Moments:
    """Count, sum and centred sum of squares of a stream, accumulated in float64."""

    count: int
    total: float
    squares: float  # sum of x**2
    centred: float  # sum of (x - mean)**2

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def std(self) -> float:
        """Unbiased, like `torch.std`."""
        return math.sqrt(self.centred / (self.count - 1)) if self.count > 1 else 0.0


def moments(stream: Stream) -> Moments:
    """Two passes: the mean first, then the squares around it, so that a large mean costs no digits."""
    count, total, squares = 0, 0.0, 0.0
    for tensor in stream():
        count += tensor.numel()
        total += tensor.sum(dtype=torch.float64).item()
        squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 if tensor.numel() else 0.0
    mean = total / count if count else 0.0
    centred = math.fsum(float((tensor.double() - mean).square().sum()) for tensor in stream())
    return Moments(count, total, squares, centred)
