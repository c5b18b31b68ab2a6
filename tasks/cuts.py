"""Cuts: which entries of a stream are its largest, so that any piece of it can be thinned by itself later."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from tasks.select import Rank, Stream, count_equal, ranked


class Cut(NamedTuple):
    """Which entries of a stream are the largest: those above `bound`, and of those equal to it the ones whose place,
    counted from 0 through the whole stream, is below `until`."""

    bound: float
    until: float


def cut(stream: Stream, k: Rank) -> Cut:
    """Where to cut so that exactly k entries stay, of equal magnitudes the earlier ones."""
    rank = total = 0

    def place(count: int) -> int:
        nonlocal rank, total
        rank, total = k(count) if callable(k) else k, count
        return total - rank + 1 if 0 < rank < total else 0

    bound, smaller, same = ranked(stream, place)
    if rank <= 0:
        return Cut(math.inf, 0)
    if bound == 0:
        return Cut(0.0, math.inf)  # all, or so many that zeros are among them, which are zeros when left out
    if smaller is None or same is None:
        above = sum(int(torch.count_nonzero(hardshrink(tensor.flatten(), bound))) for tensor in stream())
        wanted = rank - above
    else:
        wanted = rank - (total - smaller - same)
        if wanted == same:
            return Cut(bound, math.inf)
    start = 0
    for tensor in stream():
        magnitude = tensor.flatten().abs()
        here = count_equal(magnitude, bound)
        if wanted <= here:
            return Cut(bound, start + int((magnitude == bound).nonzero()[wanted - 1]) + 1)
        wanted -= here
        start += tensor.numel()
    raise AssertionError("the stream changed between two passes")


def keep(delta: Tensor, bound: float, until: float = math.inf, start: int = 0) -> Tensor:
    """The entries that a cut keeps, the others zero. `start`: the place of the first entry of `delta`."""
    flat, edge = delta.flatten(), min(max(until - start, 0), delta.numel())
    if bound == 0:
        return delta
    if bound == math.inf:
        return torch.zeros_like(delta)
    if edge == 0:
        return hardshrink(delta, bound)
    if edge == delta.numel():
        return _from(delta, bound)
    head, tail = flat[: int(edge)], flat[int(edge) :]
    return torch.cat([_from(head, bound), hardshrink(tail, bound)]).reshape(delta.shape)


def places(values: Tensor, bound: float, until: float = math.inf, start: int = 0) -> Tensor:
    """Where in `values`, flat and none of them negative, those lie that a cut keeps and that are not zero, in order."""
    if values.device.type != "cpu" or bound in (0, math.inf):
        return keep(values, bound, until, start).nonzero().flatten()
    array, edge = values.numpy(), int(min(max(until - start, 0), values.numel()))
    # numpy's comparisons and its search for what is true are vectorised, those of torch are not
    head, tail = np.flatnonzero(array[:edge] >= bound), np.flatnonzero(array[edge:] > bound)
    return torch.from_numpy(head if edge == len(array) else np.concatenate([head, tail + edge]))


def _from(flat: Tensor, bound: float) -> Tensor:
    """The entries of magnitude `bound` or more, the others zero. In one pass without booleans, which are slow."""
    return hardshrink(
        flat, float(torch.nextafter(torch.tensor(bound, dtype=flat.dtype), torch.zeros((), dtype=flat.dtype)))
    )
