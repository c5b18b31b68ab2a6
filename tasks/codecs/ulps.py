"""Steps between floats, and the order of a tensor by the exponents of its base: what `exact` counts in.

A float's bits, read as a sign and a magnitude, give an integer that rises with the float: `ranked`. The difference of
two such integers is how many floats lie between them. Both ways are exact for every pattern of bits, so -0, infinities
and the payloads of NaN come back.

How far a training moves a weight hardly depends on the weight, but how many floats that is does: the smaller the
weight, the finer its floats. So whether an element changes at all, and by how many steps, follows from the exponent of
its base, which the reader knows too. `ByExponent` brings elements of one exponent together: within pieces that stay in
a core's cache, sorted by a radix pass, then the pieces' runs of each exponent one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Unsigned = NDArray[Any]  # unsigned integers of two, four or eight bytes

MANTISSAS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}  # bits; below: the exponent
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_PIECE = 1 << 16  # elements


def bits_of(tensor: Tensor) -> Unsigned:
    """The numbers of a tensor as unsigned integers of their width, flat."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return np.empty(0, dtype=_WORDS[tensor.element_size()])
    return flat.view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])


def from_bits(bits: Unsigned, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `bits_of`."""
    if not bits.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def steps(base: Unsigned, tuned: Unsigned) -> Unsigned:
    """How many floats `tuned` lies above or below `base`, zig-zag: 0, -1, 1, -2 ... as 0, 1, 2, 3 ..."""
    return _in_pieces(_steps, base, tuned)


def stepped(base: Unsigned, found: Unsigned) -> Unsigned:
    """The inverse: `tuned`, from `base` and what `steps` gave."""
    return _in_pieces(_stepped, base, found)


def ranked(bits: Unsigned) -> Unsigned:
    """Integers in the order of the floats that the bits stand for; -0 comes right before 0."""
    top = bits.dtype.itemsize * 8 - 1
    # all bits turn where the sign is set, else the sign alone
    turned: Unsigned = (bits >> top) * bits.dtype.type(2**top - 1)
    turned |= bits.dtype.type(2**top)
    turned ^= bits
    return turned


def unranked(ranks: Unsigned) -> Unsigned:
    """The inverse of `ranked`."""
    top = ranks.dtype.itemsize * 8 - 1
    turned: Unsigned = (~ranks >> top) * ranks.dtype.type(2**top - 1)
    turned |= ranks.dtype.type(2**top)
    turned ^= ranks
    return turned


def _steps(base: Unsigned, tuned: Unsigned) -> Unsigned:
    apart = ranked(tuned)
    apart -= ranked(base)  # around the end of the integers, which the inverse undoes
    folded: Unsigned = (apart >> (apart.dtype.itemsize * 8 - 1)) * apart.dtype.type(np.iinfo(apart.dtype).max)
    apart <<= 1
    folded ^= apart
    return folded


def _stepped(base: Unsigned, found: Unsigned) -> Unsigned:
    apart: Unsigned = (found & found.dtype.type(1)) * found.dtype.type(np.iinfo(found.dtype).max)
    apart ^= found >> 1
    apart += ranked(base)
    return unranked(apart)


def _in_pieces(work: Callable[[Unsigned, Unsigned], Unsigned], first: Unsigned, second: Unsigned) -> Unsigned:
    found = np.empty_like(first)
    for start in range(0, first.size, _PIECE):
        place = slice(start, start + _PIECE)
        found[place] = work(first[place], second[place])
    return found


class ByExponent:
    """The order of a tensor's elements by the exponents of the base and then by place.

    base:     the base's bits, [elements]
    mantissa: bits of a float below its exponent
    """

    def __init__(self, base: Unsigned, mantissa: int) -> None:
        exponents = 1 << (base.dtype.itemsize * 8 - 1 - mantissa)
        key = np.uint8 if exponents <= 256 else np.uint16
        edges = np.arange(exponents + 1)
        self._elements = base.size
        self._orders: list[NDArray[np.uint16]] = []  # of each piece
        runs: list[NDArray[np.int64]] = [np.zeros((0, exponents), dtype=np.int64)]
        for first in range(0, base.size, _PIECE):
            keys = ((base[first : first + _PIECE] << 1) >> (mantissa + 1)).astype(key)
            order = np.argsort(keys, kind="stable")  # of small integers: a radix pass
            runs.append(np.diff(np.searchsorted(keys, edges, sorter=order))[None])
            self._orders.append(order.astype(np.uint16))
        self._runs = np.concatenate(runs)  # elements of each piece and exponent
        # where each run begins: exponent by exponent, piece by piece
        self._starts = np.cumsum(self._runs.T.ravel()).reshape(exponents, -1).T - self._runs

    def ordered(self, values: Unsigned) -> Unsigned:
        """`values` of the elements in this order, [elements]."""
        found = np.empty(self._elements, dtype=values.dtype)
        for number, order in enumerate(self._orders):
            piece = values[number * _PIECE : (number + 1) * _PIECE][order.astype(np.intp)]  # else several times slower
            for run, place in self._of_piece(number):
                found[place] = piece[run]
        return found

    def in_place(self, values: Unsigned) -> Unsigned:
        """The inverse: what `ordered` was given."""
        found = np.empty(self._elements, dtype=values.dtype)
        for number, order in enumerate(self._orders):
            piece = np.empty(order.size, dtype=values.dtype)
            for run, place in self._of_piece(number):
                piece[run] = values[place]
            found[number * _PIECE : (number + 1) * _PIECE][order.astype(np.intp)] = piece
        return found

    def _of_piece(self, number: int) -> Iterator[tuple[slice, slice]]:
        """Where the runs of a piece are in its own order and in that of all elements."""
        begin = 0
        for exponent in np.flatnonzero(self._runs[number]):
            size, start = int(self._runs[number, exponent]), int(self._starts[number, exponent])
            yield slice(begin, begin + size), slice(start, start + size)
            begin += size
