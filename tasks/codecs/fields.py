"""Fields: unsigned integers of which most are small, some large, and neighbours alike. How `exact` writes its steps.

The numbers are cut into chunks of equal size, and each chunk has a width: a number takes a field of so many bits, of
which the largest value says that the rest of the number follows in `more`. Fields of 1, 2, 4 or 8 bits lie side by
side, the first in the highest bits; each chunk ends with a byte, and all go through the Huffman codes of zstandard. Of
small numbers several are coded at once, so that codes of whole bits lose little. In chunks of width 0, where few
numbers are not 0, a field is one bit that is not written: `gaps` counts the zeros before every field that is set, over
all chunks. `more` and `gaps` go through pcodec, which comes as near to the entropy alone, but takes ten times as long
per number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.packing import pack_codes, packed_size, unpack_codes
from tasks.codecs.streams import (
    Bytes,
    Numbers,
    expand,
    narrow,
    number,
    read_numbers,
    squeeze_codes,
    write_numbers,
)

_WIDTHS = (0, 1, 2, 4, 8)
_MODELLED = 1 << 14  # numbers of `more` and `gaps` that are modelled together
_CHUNKS = (1 << 14, 1 << 15)  # numbers of a chunk in small and in large tensors
_LARGE = 1 << 18


def write_fields(values: Numbers) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """Metadata and streams; of the streams, those that are not empty."""
    chunk = _CHUNKS[values.size > _LARGE]
    widths: list[int] = []
    fields: list[Bytes] = []
    places: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    more: list[Numbers] = [values[:0]]
    for start in range(0, values.size, chunk):
        piece = values[start : start + chunk]
        width = _width_for(piece)
        widths.append(width)
        top = (1 << (width or 1)) - 1
        if width:
            codes = np.minimum(piece, top).astype(np.uint8)
            full = (codes == top).nonzero()[0]
            fields.append(np.frombuffer(pack_codes(codes, width), dtype=np.uint8))
        else:
            full = piece.nonzero()[0]
            places.append(full + start)
        rest = piece[full]
        rest -= rest.dtype.type(top)
        more.append(rest)
    gaps = np.diff(np.concatenate(places), prepend=-1)
    gaps -= 1
    rests = np.concatenate(more)
    streams: dict[str, bytes] = {}
    if fields:
        streams["fields"] = squeeze_codes(fields)
    for key, numbers in (("gaps", narrow(gaps)), ("more", rests)):
        if numbers.size:
            streams[key] = write_numbers(numbers, _MODELLED)
    # empty streams are left out: an entry of a file's header is larger than many a tensor's stream
    return {"chunk": chunk, "widths": widths, "gaps": gaps.size, "more": rests.size}, streams


def read_fields(parts: Parts, meta: Mapping[str, Any], count: int, dtype: np.dtype[Any]) -> Numbers:
    """The inverse, `count` numbers of this type."""
    chunk = number(meta, "chunk", 1, 1 << 40)
    starts = range(0, count, chunk)
    widths: Any = meta.get("widths")
    known = isinstance(widths, list) and all(type(one) is int and one in _WIDTHS for one in widths)
    if not known or len(widths) != len(starts):
        raise Damaged(f"the metadata's 'widths' must be {len(starts):,} of {', '.join(map(str, _WIDTHS))}")
    sizes = [min(chunk, count - start) for start in starts]
    ends = np.cumsum([0, *map(packed_size, sizes, widths)])
    data = expand(parts, "fields", int(ends[-1])) if ends[-1] else np.empty(0, dtype=np.uint8)
    more = _read(parts, "more", meta, count)
    if more.dtype.itemsize > dtype.itemsize:
        raise Damaged(f"part 'more' is wider than its numbers of {dtype.itemsize} bytes")
    places = _places(_read(parts, "gaps", meta, count), count)
    bounds = np.searchsorted(places, [*starts, count])
    found: Numbers = np.empty(count, dtype=dtype)
    used = 0
    for place, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        piece, width = found[start : start + size], widths[place]
        if width:
            codes = unpack_codes(data[ends[place] : ends[place + 1]], width, size)
            piece[:] = codes
            full = (codes == (1 << width) - 1).nonzero()[0]
        else:
            full = places[bounds[place] : bounds[place + 1]] - start
            piece[:] = 0
            piece[full] = 1
        rests = more[used : used + full.size]
        used += full.size
        if used > more.size:
            break
        piece[full] += rests
    if used != more.size or any(width and there for width, there in zip(widths, np.diff(bounds), strict=True)):
        raise Damaged("parts 'more' and 'gaps' do not fit the fields of their tensor")
    return found


def _width_for(piece: Numbers) -> int:
    """Such that few numbers take more, for what those are coded with is slow."""
    for width, part in ((2, 8), (4, 8), (8, 2)):
        if part * np.count_nonzero(piece >= (1 << width) - 1) <= piece.size:
            break
    else:
        return 1  # nearly all are large
    if width > 2:
        return width
    changed = np.count_nonzero(piece)
    return 0 if 8 * changed <= piece.size else 1 if 4 * changed <= piece.size else 2


def _read(parts: Parts, key: str, meta: Mapping[str, Any], count: int) -> Numbers:
    size = number(meta, key, 0, count)
    return read_numbers(parts, key, size) if size else np.empty(0, dtype=np.uint8)


def _places(gaps: Numbers, count: int) -> NDArray[np.int64]:
    if gaps.size and int(gaps.max()) >= count:
        raise Damaged(f"part 'gaps' leads beyond its {count:,} numbers")
    places = np.cumsum(gaps, dtype=np.int64)
    places += np.arange(gaps.size)
    if gaps.size and int(places[-1]) >= count:
        raise Damaged(f"part 'gaps' leads beyond its {count:,} numbers")
    return places
