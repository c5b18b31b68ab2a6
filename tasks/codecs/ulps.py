"""Steps between floats, and the order of a tensor by the exponents of its base: what `exact` counts in.

A float's bits, read as a sign and a magnitude, give an integer that rises with the float: `ranked`. The difference of
two such integers is how many floats lie between them. Both ways are exact for every pattern of bits, so -0, infinities
and the payloads of NaN come back.

How far a training moves a weight hardly depends on the weight, but how many floats that is does: the smaller the
weight, the finer its floats. So whether an element changes at all, and by how many steps, follows from the exponent of
its base, which the reader knows too. `by_exponent` brings elements of one exponent together: within pieces that stay in
a core's cache, sorted by a radix pass, then the pieces' runs of each exponent one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
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


def by_exponent(base: Unsigned, mantissa: int) -> NDArray[Any]:
    """The places of all elements, ordered by the exponents of the base and then by place: a permutation, [elements].

    `mantissa`: bits of a float below its exponent.
    """
    exponents = 1 << (base.dtype.itemsize * 8 - 1 - mantissa)
    key = np.uint8 if exponents <= 256 else np.uint16
    edges = np.arange(exponents)
    orders: list[NDArray[np.uint16]] = []
    begins: list[NDArray[np.int64]] = []
    for first in range(0, base.size, _PIECE):
        keys = ((base[first : first + _PIECE] << 1) >> (mantissa + 1)).astype(key)
        order = np.argsort(keys, kind="stable")  # of small integers: a radix pass
        begins.append(np.searchsorted(keys, edges, sorter=order))
        orders.append(order.astype(np.uint16))
    found: NDArray[Any] = np.empty(base.size, dtype=np.int32 if base.size < 2**31 else np.int64)
    if not orders:
        return found
    sizes = np.diff(np.array(begins), axis=1, append=np.array([[order.size] for order in orders]))
    starts = np.cumsum(sizes.T.ravel()).reshape(exponents, -1).T - sizes  # exponent by exponent, piece by piece
    for number, own in enumerate(orders):
        for exponent in np.flatnonzero(sizes[number]):
            begin, size, start = begins[number][exponent], sizes[number, exponent], starts[number, exponent]
            found[start : start + size] = own[begin : begin + size]
            found[start : start + size] += number * _PIECE
    return found


def taken(values: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    """`values[places]`, without a second copy of the places in the width that numpy wants."""
    found: NDArray[Any] = np.empty(places.size, dtype=values.dtype)
    for first in range(0, places.size, _PIECE):
        np.take(values, places[first : first + _PIECE], out=found[first : first + _PIECE], mode="clip")
    return found
