"""Packing: codes of one to eight bits side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tasks.codecs.streams import Bytes, exactly

_PIECE = 1 << 16  # codes, a multiple of eight: every piece ends at a byte
_PAIRED = (1, 2, 4, 8)  # bits of codes that are put together two by two, many times as fast
_PAIR = np.dtype("<u2")  # two bytes, of which the first is the low one


def pack_codes(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Codes below 2^bits as one row of bits, the highest of each first; the last byte is filled up with zeros."""
    packed = []
    for start in range(0, codes.size, _PIECE):
        if bits in _PAIRED:
            packed.append(_paired(codes[start : start + _PIECE], bits).tobytes())
            continue
        piece = np.unpackbits(codes[start : start + _PIECE, None], axis=1)[:, 8 - bits :]
        packed.append(np.packbits(piece).tobytes())
    return b"".join(packed)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def unpack_codes(data: Bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """The inverse, [count]. Raises Damaged if `data` is of another size."""
    exactly(data, packed_size(count, bits), "codes")
    codes = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        if bits in _PAIRED:
            codes[start : start + size] = _unpaired(data[start * bits // 8 :][: packed_size(size, bits)], bits)[:size]
            continue
        piece = np.unpackbits(data[start * bits // 8 : packed_size(start + size, bits)], count=size * bits)
        codes[start : start + size] = np.packbits(piece.reshape(size, bits), axis=1).reshape(-1) >> (8 - bits)
    return codes


def _paired(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.packbits(codes)
    if rest := -codes.size % (8 // bits):
        codes = np.append(codes, np.zeros(rest, dtype=np.uint8))
    while bits < 8:
        pairs = codes.view(_PAIR)
        codes = ((pairs << bits) | (pairs >> 8)).astype(np.uint8)
        bits *= 2
    return codes


def _unpaired(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.unpackbits(data)
    width = 8
    while width > bits:
        width //= 2
        pairs = data.astype(_PAIR)
        high = pairs >> width
        pairs <<= 8
        pairs |= high
        pairs &= ((1 << width) - 1) * 0x101
        data = pairs.view(np.uint8)
    return data
