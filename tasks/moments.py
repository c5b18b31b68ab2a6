"""Power and deviation of streams of tensors, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tasks.select import Stream


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
