"""Streams: numbers as bytes, and the one piece of metadata of a coded tensor. What the parts of codecs are made of.

Every stream is a 1-D tensor of bytes. What is read is checked: a stream that is cut short, altered or of another
length than it should have is Damaged, and no more memory is taken than the number of elements asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pcodec
import torch
import zstandard
from numpy.typing import NDArray
from pcodec import standalone
from torch import Tensor

from storage.errors import Damaged
from storage.manifest import canonical, digest
from tasks.codecs.base import Parts

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.unsignedinteger[Any]]

META = "meta"  # the part with the metadata: canonical JSON
_ZSTD_LEVEL = 1  # on these streams higher levels are slower and often larger
_CODES = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
_CHUNK = 1 << 18  # numbers that one model of pcodec is for
_WIDTHS = (np.uint8, np.uint16, np.uint32, np.uint64)


def stream(data: Bytes | bytes) -> Tensor:
    """Bytes as a part."""
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


def with_meta(meta: Mapping[str, Any], streams: Mapping[str, Bytes | bytes]) -> Parts:
    """The parts of a coded tensor."""
    return {META: stream(canonical(dict(meta))), **{key: stream(data) for key, data in streams.items()}}


def meta_of(parts: Parts, shape: tuple[int, ...]) -> dict[str, Any]:
    """The metadata of a coded tensor; its `shape` must have as many elements as `shape`."""
    try:
        found = dict(json.loads(part(parts, META).tobytes()))
        stated = list(found["shape"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"the metadata of a coded tensor cannot be read: {error!r}") from error
    if not all(type(size) is int and size >= 0 for size in stated) or math.prod(stated) != math.prod(shape):
        raise Damaged(f"a coded tensor of shape {stated} cannot be read as {list(shape)}")
    return found


def number(meta: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """The integer `key` of the metadata, which must be from `low` to `high`."""
    found = meta.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
        raise Damaged(f"the metadata's {key!r} must be an integer from {low} to {high}, found {found!r}")
    return found


def scale_of(meta: Mapping[str, Any], key: str = "scale") -> float:
    """The number `key` of the metadata, written by `float.hex`; finite."""
    try:
        found = float.fromhex(meta[key])
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise Damaged(f"the metadata's {key!r} must be a number as float.hex writes it: {error!r}") from error
    if not math.isfinite(found):
        raise Damaged(f"the metadata's {key!r} must be finite, found {found}")
    return found


def part(parts: Parts, key: str) -> Bytes:
    """The bytes of a stream."""
    try:
        found = parts[key]
    except KeyError:
        raise Damaged(f"a coded tensor has no part {key!r}, only {', '.join(parts)}") from None
    if found.dtype != torch.uint8 or found.dim() != 1:
        raise Damaged(f"part {key!r} must be a row of bytes, found {found.dtype} of shape {list(found.shape)}")
    return found.cpu().numpy()


def exactly(data: Bytes, size: int, key: str) -> Bytes:
    """`data`, which must have `size` bytes."""
    if data.size != size:
        raise Damaged(f"part {key!r} must have {size:,} bytes, found {data.size:,}")
    return data


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's numbers as they lie in memory, row by row, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def narrow(values: NDArray[Any]) -> Numbers:
    """`values`, none of them negative, in the narrowest unsigned integers that hold them all."""
    top = int(values.max(initial=0))
    return values.astype(next(width for width in _WIDTHS if top <= np.iinfo(width).max), copy=False)


def write_numbers(values: Numbers, chunk: int = _CHUNK) -> bytes:
    """Unsigned integers through pcodec, after a byte with the width of one. Each `chunk` of them gets its own model.

    Gaps, steps and codes are independent draws: there is nothing to gain from modes and differences.
    """
    config = pcodec.ChunkConfig(
        compression_level=8,
        mode_spec=pcodec.ModeSpec.classic(),
        delta_spec=pcodec.DeltaSpec.no_op(),
        paging_spec=pcodec.PagingSpec.equal_pages_up_to(chunk),
        enable_8_bit=True,
    )
    width = values.dtype.itemsize
    data = standalone.simple_compress(np.ascontiguousarray(values), config) if values.size else b""
    return bytes([width]) + data


def read_numbers(parts: Parts, key: str, count: int) -> Numbers:
    """The inverse, `count` of them."""
    data = part(parts, key)
    widths = {np.dtype(width).itemsize: width for width in _WIDTHS}
    if not data.size or int(data[0]) not in widths:
        raise Damaged(f"part {key!r} does not begin with the width of its numbers")
    found: Numbers = np.empty(count, dtype=widths[int(data[0])])
    if count:
        try:
            progress = standalone.simple_decompress_into(data[1:].tobytes(), found)
        except BaseException as error:  # a panic of pcodec is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                raise
            raise Damaged(f"part {key!r} cannot be read: {error}") from error
        if progress.n_processed != count or not progress.finished:
            raise Damaged(f"part {key!r} must have {count:,} numbers, found {progress.n_processed:,} or more")
    return found


def squeeze(data: Bytes | bytes) -> bytes:
    """Bytes through zstandard."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(bytes(data))


def squeeze_codes(several: Sequence[Bytes]) -> bytes:
    """Bytes that are draws of their own through zstandard: Huffman codes, and repetitions only where they are long.

    They become one frame. Each of the several gets codes of its own.
    """
    press = zstandard.ZstdCompressor(compression_params=_CODES).compressobj(size=sum(one.size for one in several))
    blocks = []
    for one in several:
        blocks += [press.compress(np.ascontiguousarray(one).data), press.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*blocks, press.flush()])


def expand(parts: Parts, key: str, size: int) -> Bytes:
    """The inverse of both; `size` is what it must come to."""
    return exactly(expand_up_to(parts, key, size), size, key)


def expand_up_to(parts: Parts, key: str, most: int) -> Bytes:
    """The same where the size is not known: it must not come to more than `most`, and must say to how much."""
    data = part(parts, key).tobytes()
    try:
        declared = zstandard.frame_content_size(data)
        if not 0 <= declared <= most:
            size = "no size at all" if declared < 0 else f"{declared:,}"
            raise Damaged(f"part {key!r} must come to at most {most:,} bytes and say so, it declares {size}")
        return exactly(np.frombuffer(zstandard.ZstdDecompressor().decompress(data), dtype=np.uint8), declared, key)
    except zstandard.ZstdError as error:
        raise Damaged(f"part {key!r} cannot be read: {error}") from error
