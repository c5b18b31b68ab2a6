"""Layouts that other programs store updates in, rebuilt here: whole tensors to bytes and back, through zstd level 1.

Ternary layouts are given a float32 tensor and the threshold, and read it back with the scale. Lossless ones are given
the 16-bit patterns of the base and the tuned tensor, and read the tuned ones back with the base. None of them has
headers but the lengths of its streams.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bits = NDArray[np.uint16]
_FULL = 255  # a gap's byte that stands for so many places without an entry
_PIECE = 1 << 16  # numbers that stay in a core's cache


class Ternary(NamedTuple):
    """encode(delta, threshold) -> bytes; decode(bytes, elements, scale) -> delta."""

    encode: Callable[[Floats, float], bytes]
    decode: Callable[[bytes, int, float], Floats]


class Lossless(NamedTuple):
    """encode(base, tuned) -> bytes; decode(base, bytes) -> tuned."""

    encode: Callable[[Bits, Bits], bytes]
    decode: Callable[[Bits, bytes], Bits]


def _squeeze(data: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(np.ascontiguousarray(data).view(np.uint8).data)


def _expand(data: bytes, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(data), dtype=dtype)


def _joined(*streams: bytes) -> bytes:
    return b"".join(len(stream).to_bytes(8, "little") + stream for stream in streams)


def _split(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 8 : end])
        at = end
    return found


def _trits(delta: Floats, threshold: float) -> bytes:
    found = np.empty(delta.size, np.int8)
    for start in range(0, delta.size, _PIECE):
        piece = delta[start : start + _PIECE]
        np.subtract(
            (piece >= threshold).view(np.int8), (piece <= -threshold).view(np.int8), out=found[start : start + _PIECE]
        )
    return _squeeze(found)


def _from_trits(data: bytes, elements: int, scale: float) -> Floats:
    return np.multiply(_expand(data, np.int8), np.float32(scale), dtype=np.float32)


def _planes(delta: Floats, threshold: float) -> bytes:
    return _joined(_squeeze(np.packbits(delta >= threshold)), _squeeze(np.packbits(delta <= -threshold)))


def _from_planes(data: bytes, elements: int, scale: float) -> Floats:
    positive, negative = (np.unpackbits(_expand(one), count=elements).view(np.int8) for one in _split(data))
    return np.multiply(positive - negative, np.float32(scale), dtype=np.float32)


def _gaps(delta: Floats, threshold: float) -> bytes:
    kept = np.flatnonzero(np.abs(delta) >= threshold)
    gaps = np.diff(kept, prepend=-1) - 1
    full, rest = np.divmod(gaps, _FULL)
    if full.any():
        entries = np.full(gaps.size + int(full.sum()), _FULL, np.uint8)
        entries[np.cumsum(full + 1) - 1] = rest
    else:
        entries = rest.astype(np.uint8)
    return _joined(_squeeze(entries), np.packbits(np.signbit(delta[kept])).tobytes())


def _from_gaps(data: bytes, elements: int, scale: float) -> Floats:
    first, second = _split(data)
    entries, found = _expand(first), np.zeros(elements, np.float32)
    is_entry = entries != _FULL
    places = np.cumsum(entries + is_entry.astype(np.int64))[is_entry] - 1
    negative = np.unpackbits(np.frombuffer(second, np.uint8), count=places.size)
    found[places] = np.where(negative, np.float32(-scale), np.float32(scale))
    return found


TERNARY = {
    "int8 trits, zstd-1": Ternary(_trits, _from_trits),
    "two bit planes, zstd-1": Ternary(_planes, _from_planes),
    "gaps as bytes, zstd-1; signs": Ternary(_gaps, _from_gaps),
}


def _xor(base: Bits, tuned: Bits) -> bytes:
    return _squeeze(base ^ tuned)


def _from_xor(base: Bits, data: bytes) -> Bits:
    return _expand(data, np.uint16) ^ base


def _xor_split(base: Bits, tuned: Bits) -> bytes:
    halves = (base ^ tuned).view(np.uint8).reshape(-1, 2)
    return _joined(_squeeze(halves[:, 0]), _squeeze(halves[:, 1]))


def _from_xor_split(base: Bits, data: bytes) -> Bits:
    halves = np.empty((base.size, 2), np.uint8)
    halves[:, 0], halves[:, 1] = (_expand(stream) for stream in _split(data))
    return halves.reshape(-1).view(np.uint16) ^ base


def _sparse(base: Bits, tuned: Bits) -> bytes:
    """NeMo-RL: gaps in the narrowest of 16, 32 and 64 bits, and the XOR of what changed."""
    changes = base ^ tuned
    places = np.flatnonzero(changes)
    gaps = np.diff(places, prepend=-1) - 1
    width = next(one for one in (np.uint16, np.uint32, np.uint64) if int(gaps.max(initial=0)) <= np.iinfo(one).max)
    return _joined(bytes([np.dtype(width).itemsize]), _squeeze(gaps.astype(width)), _squeeze(changes[places]))


def _from_sparse(base: Bits, data: bytes) -> Bits:
    width, gaps, changes = _split(data)
    places = np.cumsum(_expand(gaps, f"u{width[0]}"), dtype=np.int64)
    places += np.arange(places.size)
    tuned = base.copy()
    tuned[places] ^= _expand(changes, np.uint16)
    return tuned


def _zipnn() -> Lossless:
    """One thread. It reorders the bytes that it is given in place, so it gets a copy."""
    from zipnn import ZipNN

    def encode(base: Bits, tuned: Bits) -> bytes:
        return bytes(ZipNN(bytearray_dtype="bfloat16", threads=1).compress(bytearray(tuned.data)))

    def decode(base: Bits, data: bytes) -> Bits:
        found = ZipNN(bytearray_dtype="bfloat16", threads=1).decompress(bytes(data))
        return np.frombuffer(found, np.uint16)

    return Lossless(encode, decode)


def lossless() -> dict[str, Lossless | None]:
    """None for a program that is not installed."""
    version = importlib.metadata.version("zipnn") if importlib.util.find_spec("zipnn") else None
    return {
        "tuned alone, zstd-1": Lossless(
            lambda base, tuned: _squeeze(tuned), lambda base, data: _expand(data, np.uint16)
        ),
        f"tuned alone, zipnn {version}" if version else "tuned alone, zipnn": _zipnn() if version else None,
        "XOR, zstd-1": Lossless(_xor, _from_xor),
        "XOR, byte split, zstd-1": Lossless(_xor_split, _from_xor_split),
        "sparse: 16-bit gaps, XOR, zstd-1": Lossless(_sparse, _from_sparse),
    }
