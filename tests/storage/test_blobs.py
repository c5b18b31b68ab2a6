"""Blobs are safetensors files: read like the library reads them, and broken ones refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.artifacts import FRESH, ArtifactStore
from storage.blobs import DTYPES, decode_parts, encode_parts
from storage.directory import DirectoryObjects
from storage.errors import Damaged


def read(data: bytes) -> dict[str, torch.Tensor]:
    return decode_parts(memoryview(bytearray(data)), what="a blob")


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_what_is_read_is_what_safetensors_reads(forms: dict[str, tuple[str, list[int]]]) -> None:
    parts = {name: (torch.randn(shape) * 50).to(DTYPES[dtype]) for name, (dtype, shape) in forms.items()}
    data = encode_parts(parts)
    assert data == safetensors.torch.save(parts)
    expected, found = safetensors.torch.load(data), read(data)
    assert found.keys() == expected.keys() == parts.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_reading_copies_nothing() -> None:
    data = memoryview(bytearray(encode_parts({"a": torch.zeros(100), "b": torch.ones(7, dtype=torch.int64)})))
    parts = decode_parts(data, what="a blob")
    parts["a"][3] = 1.0
    assert torch.equal(decode_parts(data, what="a blob")["a"], parts["a"])


def test_metadata_and_odd_places_are_read() -> None:
    """Other writers add metadata, and need not align."""
    header = {"__metadata__": {"by": "another"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}
    text = json.dumps(header).encode()
    number = torch.tensor([2.5]).numpy().tobytes()
    assert read(len(text).to_bytes(8, "little") + text + b"\0" + number)["a"].item() == 2.5


def attacked(**changes: object) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        (10**12).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{x",
        attacked(dtype="F31"),
        attacked(shape=[3]),
        attacked(shape=[-2]),
        attacked(shape=[-1, -2]),
        attacked(shape=2),
        attacked(data_offsets=[0, 800]),
        attacked(data_offsets=[-8, 0]),
        attacked(data_offsets=[8, 0]),
        attacked(data_offsets=[4, 12]),
        attacked(data_offsets=[0]),
        attacked(shape=[2**62, 2**62]),
        attacked(shape=[1e999]),
        attacked(shape=[0, 2**70], data_offsets=[0, 0]),
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_broken_files_are_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match="a blob is not a safetensors file"):
        read(data)


def test_files_are_those_that_safetensors_writes() -> None:
    """All dtypes at once, names that sort or are written in their own way, tensors that are no plain memory."""
    parts = {f"{dtype} {number}": torch.ones(3).to(DTYPES[dtype]) for dtype in DTYPES for number in (2, 10)}
    parts |= {'é\u2028"\\\n\x01': torch.zeros(()), "turned": torch.randn(4, 3).T, "none": torch.zeros(0, 5)}
    assert encode_parts(parts) == safetensors.torch.save({key: part.contiguous() for key, part in parts.items()})
    assert encode_parts({}) == safetensors.torch.save({})


def test_an_old_blob_that_is_written_again_is_as_if_new(tmp_path: Path) -> None:
    """A prune goes by the age of objects: what is in use again must not look forgotten."""
    store = ArtifactStore(DirectoryObjects(tmp_path))
    name = store.write_blob(b"shared")
    path = tmp_path / "blob" / name
    for age, fresh in ((FRESH / 2, False), (FRESH * 2, True)):
        then = time.time() - age
        os.utime(path, (then, then))
        store.write_blob(b"shared")
        assert (path.stat().st_mtime > then + 1) is fresh
