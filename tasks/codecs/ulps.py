"""Steps between floats, and the order of a tensor by the exponents of its base: what `exact` counts in.

A float's bits, read as an integer, rise with its distance from 0, so the difference of two such integers is how many
floats lie between two numbers of one sign. Taken modulo their width, differences give back every pattern of bits: -0,
infinities and the payloads of NaN too. Where a number's sign changed, the difference is large, and still exact.

How far a training moves a weight hardly depends on the weight, but how many floats that is does: the smaller the
weight, the finer its floats. So whether an element changes at all, and by how many steps, follows from the exponent of
its base, which the reader knows too. `ByExponent` brings elements of one exponent together: within pieces that stay in
a core's cache, sorted by a radix pass, then the pieces' runs of each exponent one behind the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged

Unsigned = NDArray[Any]  # unsigned integers of two, four or eight bytes
Counts = Sequence[tuple[int, int]]  # exponents, ascending, and how many elements have them

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
    """How many floats `tuned` lies further from 0 than `base`, or nearer: 0, -1, 1, -2 ... as 0, 1, 2, 3 ..."""
    apart: Unsigned = (tuned - base).view(_signed(base))
    folded = apart >> (8 * base.dtype.itemsize - 1)  # all bits of a negative one
    apart <<= 1
    apart ^= folded
    return apart.view(base.dtype)


def stepped(base: Unsigned, found: Unsigned) -> Unsigned:
    """The inverse: `tuned`, from `base` and what `steps` gave."""
    apart = found >> 1
    folded = -(found & found.dtype.type(1)).view(_signed(found))
    apart ^= folded.view(found.dtype)
    apart += base
    return apart


def _signed(bits: Unsigned) -> np.dtype[Any]:
    return np.dtype(f"i{bits.dtype.itemsize}")


def steps_by_exponent(base: Tensor, tuned: Tensor, mantissa: int) -> tuple[Unsigned, Counts]:
    """What `ByExponent.steps_to` gives, by torch: for tensors on another device than the CPU, where sorting small keys
    is a radix pass too. On the CPU it takes longer than that."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    old, new = (one.detach().contiguous().reshape(-1).view(words) for one in (base, tuned))
    apart = new - old
    folded = (apart << 1) ^ (apart >> (8 * base.element_size() - 1))
    exponents = 1 << (8 * base.element_size() - 1 - mantissa)
    keys = ((old >> mantissa) & (exponents - 1)).to(torch.uint8 if exponents <= 256 else torch.int16)
    order = torch.sort(keys, stable=True).indices
    counts = torch.bincount(keys.long(), minlength=exponents).tolist()
    found = folded[order].cpu().numpy().view(_WORDS[base.element_size()])
    return found, [(exponent, count) for exponent, count in enumerate(counts) if count]


class ByExponent:
    """The order of a tensor's elements by the exponents of the base and then by place.

    base:     the base's bits, [elements]
    mantissa: bits of a float below its exponent
    """

    def __init__(self, base: Unsigned, mantissa: int) -> None:
        self._base, self._mantissa = base, mantissa
        self._exponents = 1 << (base.dtype.itemsize * 8 - 1 - mantissa)

    def steps_to(self, tuned: Unsigned) -> tuple[Unsigned, Counts]:
        """`steps` of the elements in this order, [elements], and how many elements there are of each exponent."""
        runs = []  # where a piece begins, and its exponents
        totals: Counter[int] = Counter()
        values = np.empty_like(self._base)  # every piece in its own order
        for place, order, sizes in self._pieces():
            values[place] = steps(self._base[place], tuned[place])[order]
            totals.update(sizes)
            runs.append((place.start, sizes))
        counts = sorted(totals.items())
        next_of = _starts(counts)
        found = np.empty_like(values)
        for start, sizes in runs:
            for exponent, size in sizes.items():
                to = next_of[exponent]
                found[to : to + size] = values[start : start + size]
                next_of[exponent] = to + size
                start += size
        return found, counts

    def tuned(self, values: Unsigned, counts: Counts) -> Unsigned:
        """The inverse, in the tensor's own order. Raises Damaged if the counts are not those of the base."""
        next_of, left = _starts(counts), dict(counts)
        found = np.empty_like(values)
        for place, order, sizes in self._pieces():
            piece, start = np.empty(order.size, dtype=values.dtype), 0
            for exponent, size in sizes.items():
                if size > left.get(exponent, 0):
                    raise Damaged(f"the base has more numbers of exponent {exponent} than the update was written for")
                at = next_of[exponent]
                piece[start : start + size] = values[at : at + size]
                next_of[exponent] = at + size
                left[exponent] -= size
                start += size
            apart = np.empty_like(piece)
            apart[order] = piece
            found[place] = stepped(self._base[place], apart)
        return found

    def _pieces(self) -> Iterator[tuple[slice, NDArray[np.intp], dict[int, int]]]:
        """Where a piece is, its elements' order, and its exponents, ascending, with the number of their elements."""
        key = np.uint8 if self._exponents <= 256 else np.uint16
        for first in range(0, self._base.size, _PIECE):
            place = slice(first, first + _PIECE)
            keys = (self._base[place] >> self._mantissa).astype(key)
            np.bitwise_and(keys, self._exponents - 1, out=keys)  # without the sign
            order = keys.argsort(kind="stable")  # of small integers: a radix pass
            low, high = int(keys[order[0]]), int(keys[order[-1]])
            bounds = keys.searchsorted(np.arange(low, high + 1, dtype=key), sorter=order).tolist()
            sizes = zip(range(low, high + 1), bounds, [*bounds[1:], keys.size], strict=True)
            yield place, order, {exponent: end - start for exponent, start, end in sizes if end > start}


def _starts(counts: Counts) -> dict[int, int]:
    """Where the elements of each exponent begin."""
    starts = accumulate((count for _, count in counts), initial=0)
    return {exponent: start for (exponent, _), start in zip(counts, starts, strict=False)}
