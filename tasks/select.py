"""Statistics of a stream of tensors too large to hold: the k-th smallest magnitude, the power, the deviation.

A magnitude's bits, read as an integer, sort like the magnitude itself. So the k-th one is found digit by digit,
sixteen bits a pass, by counting: two passes over float32, four over float64, and memory for 65,536 counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

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


class Power(NamedTuple):
    """Number of elements, and the sum of their squares in float64."""

    elements: int
    squares: float


def power(stream: Stream) -> Power:
    """Count and sum of squares, in one pass."""
    count, squares = 0, 0.0
    for tensor in stream():
        count += tensor.numel()
        squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 if tensor.numel() else 0.0
    return Power(count, squares)


def deviation(stream: Stream) -> float:
    """The unbiased standard deviation, like `torch.std`, in float64; 0 for less than two elements.

    Two passes: the mean first, then the squares around it, so that a large mean costs no digits.
    """
    count, total = 0, 0.0
    for tensor in stream():
        count += tensor.numel()
        total += tensor.sum(dtype=torch.float64).item()
    if count < 2:
        return 0.0
    mean = total / count
    return math.sqrt(math.fsum(float((tensor.double() - mean).square().sum()) for tensor in stream()) / (count - 1))
