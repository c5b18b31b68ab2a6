"""Packing: codes of one to eight bits side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tasks.codecs.streams import Bytes, exactly

_PIECE = 1 << 16  # codes, a multiple of eight: every piece ends at a byte


def pack_codes(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Codes below 2^bits as one row of bits, the highest of each first; the last byte is filled up with zeros."""
    packed = []
    for start in range(0, codes.size, _PIECE):
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
        piece = np.unpackbits(data[start * bits // 8 : packed_size(start + size, bits)], count=size * bits)
        codes[start : start + size] = np.packbits(piece.reshape(size, bits), axis=1).reshape(-1) >> (8 - bits)
    return codes
