"""Fields: any numbers come back, every width is taken, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pcodec.standalone
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.fields import read_fields, write_fields
from tasks.codecs.streams import stream

CHUNK = 1 << 14
MIXED = (0.0, 0.02, 0.3, 1.0, 5.0, 100.0, 2000.0)  # mean sizes, for which the widths differ


def mixed(seed: int = 0) -> NDArray[np.uint16]:
    """A chunk of each size, and a short one."""
    generator = np.random.default_rng(seed)
    found = [generator.exponential(mean, CHUNK) if mean else np.zeros(CHUNK) for mean in (*MIXED, 0.15)]
    return np.minimum(np.concatenate(found)[:-5], 65_535).astype(np.uint16)


def written(values: NDArray[Any]) -> tuple[dict[str, Any], Parts]:
    meta, streams = write_fields(values)
    return dict(meta), {key: stream(data) for key, data in streams.items()}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_numbers_come_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32, np.uint64]))
    top = data.draw(st.sampled_from([1, 3, 15, 255, np.iinfo(dtype).max]))
    values = data.draw(arrays.arrays(dtype, st.integers(0, 300), elements=st.integers(0, int(top))))
    meta, parts = written(values)
    assert np.array_equal(read_fields(parts, meta, values.size, values.dtype), values)


def test_every_width_is_taken() -> None:
    values = mixed()
    meta, parts = written(values)
    assert set(meta["widths"]) == {0, 1, 2, 4, 8}
    assert np.array_equal(read_fields(parts, meta, values.size, values.dtype), values)


def test_a_reader_of_its_own_takes_a_few_lines() -> None:
    """By the description alone."""
    values = mixed(1)
    meta, parts = written(values)
    data = {key: part.numpy().tobytes() for key, part in parts.items()}
    bits = np.unpackbits(np.frombuffer(zstandard.ZstdDecompressor().decompress(data["fields"]), np.uint8))
    gaps, more = (pcodec.standalone.simple_decompress(data[key][1:]).astype(np.int64) for key in ("gaps", "more"))
    is_set = np.zeros(values.size, dtype=np.int64)
    is_set[np.cumsum(gaps + 1) - 1] = 1
    found, full, at = is_set.copy(), is_set.astype(bool), 0
    for number, width in enumerate(meta["widths"]):
        piece = slice(number * meta["chunk"], min((number + 1) * meta["chunk"], values.size))
        size = (piece.stop - piece.start) * width
        if width:
            found[piece] = bits[at : at + size].reshape(-1, width) @ (1 << np.arange(width)[::-1])
            full[piece] = found[piece] == (1 << width) - 1
        at += -(-size // 8) * 8
    found[full] += more
    assert np.array_equal(found, values)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [0]},
        {"widths": [3] * 8},
        {"widths": [[0]] * 8},
        {"widths": [1.0] * 8},
        {"widths": None},
        {"widths": [0, 0, 1, 2, 4, 8, 1, 8]},
        {"chunk": 0},
        {"chunk": CHUNK // 2},
        {"gaps": 1},
        {"more": 10},
        {"more": 1 << 40},
    ],
    ids=str,
)
def test_what_does_not_fit_is_damage(change: dict[str, Any]) -> None:
    values = mixed()
    meta, parts = written(values)
    with pytest.raises(Damaged):
        read_fields(parts, {**meta, **change}, values.size, values.dtype)


@pytest.mark.parametrize("key", ["fields", "gaps", "more"])
def test_a_stream_that_is_missing_or_cut_short_is_damage(key: str) -> None:
    values = mixed()
    meta, parts = written(values)
    for broken in ({**parts, key: parts[key][:-3]}, {name: one for name, one in parts.items() if name != key}):
        with pytest.raises(Damaged):
            read_fields(broken, meta, values.size, values.dtype)
