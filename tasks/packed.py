"""Arithmetic on ternary tensors as two planes of bits: sixteen times less memory than float32, and exact counts.

With P and N the planes of the positive and the negative entries, s the magnitude, and |.| the number of bits set
(ComPEFT, arXiv 2311.13171, section 2.2):

    a . b          = s_a s_b (agree - oppose)
    agree          = |(P_a & P_b) | (N_a & N_b)|
    oppose         = |(P_a & N_b) | (N_a & P_b)|        sign conflicts
    ||a||^2        = s_a^2 |P_a | N_a|
    sum of w_i a_i = sum of w_i s_i (P_i - N_i)

Counts are integers, so a dot product is rounded once: it is the float64 nearest to the exact one.
Planes lie in 64-bit words, the first entry in the highest bit of the first byte, bits beyond the last entry zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged, InvalidInput, Mismatch
from storage.manifest import TensorRecord
from tasks.codecs import Parts, Ternary, decoder
from tasks.codecs.signs import Fours, read_ternary

Words = NDArray[np.uint64]

_TERNARY = decoder(Ternary)
_WORD = 64
_WORDS = 1 << 13  # of a plane that are worked on at once: some planes of so many stay in a core's cache
PIECE = _WORD * 1024  # entries that are spread out at once


@dataclass(frozen=True, eq=False)
class Planes:
    """A ternary tensor, flat.

    positive: the entries that are `scale`, [elements / 64 rounded up]
    negative: those that are -`scale`, [the same]; no entry is both
    scale:    the magnitude, a float32; positive
    elements: of the tensor
    """

    positive: Words
    negative: Words
    scale: float
    elements: int

    @property
    def count(self) -> int:
        """Entries other than zero."""
        return bits_set(self.positive) + bits_set(self.negative)

    def signs(self, start: int, stop: int) -> NDArray[np.int8]:
        """-1, 0 or 1 for the entries from `start`, a multiple of 8, to `stop`."""
        found = unpacked(self.positive, start, stop).view(np.int8)
        found -= unpacked(self.negative, start, stop).view(np.int8)
        return found


class Overlap(NamedTuple):
    """How many entries are other than zero in both tensors, with equal and with opposite signs."""

    agree: int
    oppose: int

    @property
    def both(self) -> int:
        return self.agree + self.oppose


def is_packed(record: TensorRecord) -> bool:
    """Whether a stored tensor is ternary. A product of ternary factors is not."""
    return record.codec == _TERNARY and record.rank is None


def planes_of(parts: Parts, shape: tuple[int, ...]) -> Planes:
    """The planes of a stored tensor of `ternary@2`, as it was written: it is never dense.

    Raises Damaged if the parts are not what the codec writes.
    """
    elements = math.prod(shape)
    positive, negative = _empty(elements), _empty(elements)
    if not parts:
        return Planes(positive, negative, 1.0, elements)
    found = read_ternary(parts, shape)
    scale = float(found.scale)
    if not 0 <= scale <= float(np.finfo(np.float32).max):
        raise Damaged(f"the magnitude of a ternary tensor must be a float32 and not negative, found {scale}")
    scale = float(np.float32(scale))
    if not scale:  # its entries are zeros, which have no sign
        return Planes(positive, negative, 1.0, elements)
    rows = positive.view(np.uint8), negative.view(np.uint8)
    if isinstance(found, Fours):
        for row, code in zip(rows, (1, 2), strict=True):
            plane = found.plane(code)
            row[: plane.size] = plane
        return Planes(positive, negative, scale, elements)
    for places, signs in found.pieces():
        bits = np.uint8(128) >> (places & 7).astype(np.uint8)
        below = bits * signs
        byte = places >> 3
        # every bit is set once at most, so that adding is setting; `bitwise_or.at` takes many times as long
        np.add.at(rows[0], byte, bits - below)
        np.add.at(rows[1], byte, below)
    return Planes(positive, negative, scale, elements)


def signs_of(delta: Tensor) -> Planes:
    """The signs of any tensor of floats, as planes of magnitude 1. Zeros of either sign have none."""
    flat = delta.detach().cpu().reshape(-1).numpy()
    positive, negative = _empty(flat.size), _empty(flat.size)
    rows = positive.view(np.uint8), negative.view(np.uint8)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        for row, chosen in zip(rows, (piece > 0, piece < 0), strict=True):
            packed = np.packbits(chosen)
            row[start // 8 : start // 8 + packed.size] = packed
    return Planes(positive, negative, 1.0, flat.size)


def overlap(one: Planes, other: Planes) -> Overlap:
    _check_sizes(one, other)
    agree = oppose = 0
    for (up, down), (other_up, other_down) in zip(_pieces(one), _pieces(other), strict=True):
        agree += bits_set((up & other_up) | (down & other_down))
        oppose += bits_set((up & other_down) | (down & other_up))
    return Overlap(agree, oppose)


def dot(one: Planes, other: Planes) -> float:
    """The dot product."""
    return scaled(one, other, overlap(one, other))


def scaled(one: Planes, other: Planes, found: Overlap) -> float:
    """The dot product of two tensors whose overlap was found. A product of two float32 is exact in float64."""
    return one.scale * other.scale * (found.agree - found.oppose)


def squared(one: Planes) -> float:
    """The squared L2 norm."""
    return one.scale * one.scale * one.count


def norm(one: Planes) -> float:
    """The L2 norm."""
    return math.sqrt(squared(one))


def sign_conflicts(one: Planes, other: Planes) -> int:
    """How many entries are positive in one tensor and negative in the other."""
    return overlap(one, other).oppose


def conflict_plane(one: Planes, other: Planes) -> Words:
    """A bit for every entry: whether it is positive in one tensor and negative in the other. See `unpacked`."""
    _check_sizes(one, other)
    found = one.positive & other.negative
    found |= one.negative & other.positive
    return found


def counts(several: Sequence[Planes]) -> NDArray[np.signedinteger[Any]]:
    """How many more of the tensors are positive than negative at each entry, [elements]: exact, whatever the scales."""
    elements = _common_size(several)
    found = np.empty(elements, dtype=_counter(several))
    for start in range(0, elements, PIECE):
        stop = min(start + PIECE, elements)
        found[start:stop] = _tally(several, start, stop)
    return found


def total(several: Sequence[Planes], weights: Sequence[float] | None = None) -> Tensor:
    """The sum of ternary tensors, each times its weight (1 if there are none), [elements] in float32.

    Summed in float64 and cast once; tensors of one magnitude are counted as integers first, so that their sum is
    exact. The sum is the only dense tensor. Raises Mismatch if their sizes differ.
    """
    elements = _common_size(several)
    factors = [one.scale * weight for one, weight in zip(several, weights or [1.0] * len(several), strict=True)]
    # in the order of the factors, so that the order of the tensors changes no bit
    groups = {
        factor: [one for one, its in zip(several, factors, strict=True) if its == factor] for factor in sorted(factors)
    }
    found = np.empty(elements, dtype=np.float32)
    for start in range(0, elements, PIECE):
        stop = min(start + PIECE, elements)
        sums = np.zeros(stop - start)
        for factor, members in groups.items():
            sums += factor * _tally(members, start, stop).astype(np.float64)
        found[start:stop] = sums
    return torch.from_numpy(found)


def added(onto: Tensor | None, one: Planes, weight: float = 1.0) -> Tensor:
    """`onto` plus a ternary tensor times its weight, [elements]; without `onto`, the weighted tensor in float32.

    The very bits that the same sum of dense tensors has, in the dtype of `onto`, of which it is another tensor.
    """
    factor = np.float32(one.scale) * np.float32(weight)
    before = np.zeros(0, dtype=np.float32) if onto is None else onto.detach().reshape(-1).numpy()
    found = np.empty(one.elements, dtype=before.dtype)
    for start in range(0, one.elements, PIECE):
        stop = min(start + PIECE, one.elements)
        share = one.signs(start, stop).astype(np.float32)
        share *= factor
        if onto is None:
            found[start:stop] = share
        else:
            np.add(before[start:stop], share, out=found[start:stop])
    return torch.from_numpy(found)


def bits_set(words: Words) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def unpacked(plane: Words, start: int, stop: int) -> NDArray[np.uint8]:
    """The bits of a plane from entry `start`, a multiple of 8, to `stop`: 0 or 1 each."""
    return np.unpackbits(plane.view(np.uint8)[start // 8 : -(-stop // 8)], count=stop - start)


def _empty(elements: int) -> Words:
    return np.zeros(-(-elements // _WORD), dtype=np.uint64)


def _pieces(one: Planes) -> Iterator[tuple[Words, Words]]:
    for at in range(0, one.positive.size, _WORDS):
        yield one.positive[at : at + _WORDS], one.negative[at : at + _WORDS]


def _counter(several: Sequence[Planes]) -> type[np.signedinteger[Any]]:
    """Integers that hold the count of so many."""
    return np.int8 if len(several) <= np.iinfo(np.int8).max else np.int32


def _tally(several: Sequence[Planes], start: int, stop: int) -> NDArray[np.signedinteger[Any]]:
    found = np.zeros(stop - start, dtype=_counter(several))
    for one in several:
        found += one.signs(start, stop)
    return found


def _common_size(several: Sequence[Planes]) -> int:
    if not several:
        raise InvalidInput("a sum of ternary tensors needs one of them at least")
    for other in several[1:]:
        _check_sizes(several[0], other)
    return several[0].elements


def _check_sizes(one: Planes, other: Planes) -> None:
    if one.elements != other.elements:
        raise Mismatch(
            "the size of a ternary tensor", expected=f"{one.elements:,} elements", found=f"{other.elements:,}"
        )
