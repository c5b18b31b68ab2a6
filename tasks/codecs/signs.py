"""Signs: how `ternary` stores which entries are kept and on which side of zero they are.

Two layouts. `gaps`: the number of zeros before every kept entry, through pcodec, and a bit per kept entry in `signs`,
set where it is negative; bits cannot be compressed. `fours`: four entries to a byte, two bits for each (0, 1 positive,
2 negative), the first in the highest bits, through the Huffman codes of zstandard. Gaps are within 0.3 % of the bound
for independent entries, but cost time by kept entry; fours cost the same at every density and come within 1 % of the
bound from a quarter on, where the 81 bytes that occur are even enough for codes of whole bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.packing import pack_codes
from tasks.codecs.streams import (
    Bytes,
    Numbers,
    exactly,
    expand,
    meta_of,
    narrow,
    number,
    part,
    read_numbers,
    scale_of,
)

PIECE = 1 << 16  # entries that stay in a core's cache while they are worked on
_FIELDS = np.arange(256)[:, None] >> np.array([6, 4, 2, 0]) & 3  # of every byte, [256, 4]


@dataclass(frozen=True)
class Gaps:
    """The entries other than zero by the gaps before them.

    gaps:     [count]
    signs:    a bit for each, set where it is negative
    scale:    their size
    elements: of the tensor
    """

    gaps: Numbers
    signs: Bytes
    scale: float
    elements: int

    def pieces(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Places of the entries, ascending, and 1 for those that are negative: some at once."""
        last = -1
        for first in range(0, self.gaps.size, PIECE):
            places = np.add(self.gaps[first : first + PIECE], 1, dtype=np.int64)
            places[0] += last
            np.cumsum(places, out=places)
            last = int(places[-1])
            if last >= self.elements:
                raise Damaged(f"part 'gaps' of a ternary tensor leads beyond its {self.elements:,} elements")
            yield places, np.unpackbits(self.signs[first // 8 : (first + PIECE) // 8], count=places.size)

    def dense(self) -> NDArray[np.float32]:
        """The tensor, flat."""
        flat = np.zeros(self.elements, dtype=np.float32)
        size = np.float32(self.scale).view(np.uint32)
        for places, negative in self.pieces():
            bits = negative.astype(np.uint32)
            bits <<= np.uint32(31)  # the bit of a sign is the highest of a float's
            bits |= size
            flat[places] = bits.view(np.float32)
        return flat


@dataclass(frozen=True)
class Fours:
    """All entries, four to a byte: `data`, [elements / 4 rounded up]."""

    data: Bytes
    scale: float
    elements: int

    def plane(self, code: int) -> Bytes:
        """A bit for each entry, set where it is positive (1) or negative (2), [elements / 8 rounded up]."""
        halves = ((code == _FIELDS) @ np.array([8, 4, 2, 1])).astype(np.uint8)[self.data]
        if halves.size % 2:
            halves = np.append(halves, np.uint8(0))
        plane: Bytes = halves[::2] << 4
        plane |= halves[1::2]
        return plane

    def dense(self) -> NDArray[np.float32]:
        """The tensor, flat."""
        table = np.array([0, self.scale, -self.scale, 0], dtype=np.float32)[_FIELDS]
        flat = np.empty((self.data.size, 4), dtype=np.float32)
        for first in range(0, self.data.size, PIECE):  # `take` makes an index of eight bytes for every byte
            piece = slice(first, first + PIECE)
            np.take(table, self.data[piece], axis=0, out=flat[piece], mode="clip")
        return flat.reshape(-1)[: self.elements]


def read_ternary(parts: Parts, shape: tuple[int, ...]) -> Gaps | Fours:
    """What the parts of a ternary tensor say."""
    meta = meta_of(parts, shape)
    elements = math.prod(shape)
    scale = scale_of(meta)
    if "gaps" in parts:
        count = number(meta, "count", 1, elements)
        signs = exactly(part(parts, "signs"), -(-count // 8), "signs")
        gaps = read_numbers(parts, "gaps", count)
        if int(gaps.max()) >= elements:
            raise Damaged(f"part 'gaps' of a ternary tensor leads beyond its {elements:,} elements")
        return Gaps(gaps, signs, scale, elements)
    data = expand(parts, "fours", -(-elements // 4))
    beyond = data[-1] & ((1 << 2 * (-elements % 4)) - 1)
    if beyond or (data & data >> 1 & 0b01010101).any():
        raise Damaged("part 'fours' of a ternary tensor holds what is no entry")
    return Fours(data, scale, elements)


def gaps_of(flat: NDArray[Any], threshold: float, most: float) -> tuple[Numbers, NDArray[np.bool_]] | None:
    """The gaps before the entries that are kept, and which of these are negative. None for more than `most` entries."""
    gaps, signs, skipped, count = [], [], 0, 0
    for piece in pieces_of(flat):
        # of the numbers that are no zeros: a threshold of 0 keeps no zeros
        kept = np.flatnonzero(np.abs(piece) >= threshold if threshold > 0 else piece)
        count += kept.size
        if count > most:
            return None
        if not kept.size:
            skipped += piece.size
            continue
        signs.append(np.signbit(piece[kept]))
        before = np.diff(kept, prepend=-1)
        before -= 1
        before[0] += skipped
        gaps.append(narrow(before))
        skipped = piece.size - 1 - int(kept[-1])
    if not gaps:
        return np.empty(0, np.uint8), np.empty(0, np.bool_)
    return np.concatenate(gaps), np.concatenate(signs)


def fours_of(flat: NDArray[Any], threshold: float) -> Bytes:
    """All entries, four to a byte."""
    data = np.empty(-(-flat.size // 4), dtype=np.uint8)
    for place, piece in enumerate(pieces_of(flat)):
        up, down = (piece >= threshold, piece <= -threshold) if threshold > 0 else (piece > 0, piece < 0)
        codes = down.view(np.uint8) << np.uint8(1)
        codes |= up.view(np.uint8)
        start = place * PIECE // 4
        data[start : start + PIECE // 4] = np.frombuffer(pack_codes(codes, 2), dtype=np.uint8)
    return data


def pieces_of(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]
