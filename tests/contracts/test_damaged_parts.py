"""What every decoder promises of parts that no codec wrote: Damaged or a tensor of the right shape, in bounded memory.

The parts are those of the golden stores, so every form of every version is tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import Damaged
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from tasks.codecs import Parts, decode_parts, is_lossless, restore_parts
from tasks.codecs.streams import META, stream, write_numbers
from tasks.tensors import read_delta, unprefixed
from tests.storage.test_golden_codecs import WRITERS, golden

ODD = [
    None,
    True,
    -1,
    0,
    1,
    255,
    2**31,
    2**40,
    2**63,
    10**30,
    0.5,
    1e999,
    "",
    "x",
    "40",
    "0x1p+1",
    "inf",
    "f64",
    {},
    [],
]
ODD += [[one] for one in (None, -1, 0, 1, 2**40, 1e999, "40", [5])] + [[-4, -5], [1] * 70, [2**40, 2**40], [2**40, 0]]


@dataclass(frozen=True)
class Sample:
    """The parts of one tensor (or factor), and what reading needs beside them."""

    name: str
    codec: str
    parts: Parts
    shape: tuple[int, ...]
    base: Tensor | None

    def read(self, **changed: Tensor | None) -> Tensor | None:
        """The tensor with some parts changed, or left out; None if it is Damaged."""
        parts = {key: part for key, part in {**self.parts, **changed}.items() if part is not None}
        try:
            if self.base is None:
                found = decode_parts(self.codec, parts, self.shape)
            else:
                found = restore_parts(self.codec, parts, self.shape, self.base)
        except Damaged:
            return None
        assert found.shape == self.shape
        return found

    @property
    def streams(self) -> dict[str, bytes]:
        return {key: part.numpy().tobytes() for key, part in self.parts.items() if part.dtype == torch.uint8}


def samples(codec: str) -> Iterator[Sample]:
    artifact, _ = golden(codec)
    for record in artifact.manifest.tensors:
        if record.through or record.codec != codec:
            continue  # stated against another one, or the base of one
        parts, base = artifact.parts(record.name), None
        if is_lossless(record.codec):
            base = decode_parts("dense@1", artifact.onto(record.name) or {}, record.shape)
        if record.rank is None and parts:
            yield Sample(record.name, record.codec, parts, record.shape, base)
        elif record.rank is not None:
            for side, shape in (("A", (record.rank, record.shape[1])), ("B", (record.shape[0], record.rank))):
                yield Sample(f"{record.name}.{side}", record.codec, unprefixed(parts, side), shape, None)


CODED = [codec for codec in WRITERS if codec != "dense@1"]


@pytest.mark.parametrize("codec", CODED)
def test_metadata_may_say_anything(codec: str) -> None:
    for sample in samples(codec):
        if META not in sample.parts:
            continue
        meta = json.loads(sample.streams[META])
        for key in meta:
            for value in ODD:
                sample.read(meta=stream(json.dumps({**meta, key: value}).encode()))
            without = {other: value for other, value in meta.items() if other != key}
            sample.read(meta=stream(json.dumps(without).encode()))
        for text in (b"", b"{", b"null", b"[1]", b"7", b"\xff", b'{"shape":' + b"[" * 100_000):
            assert sample.read(meta=stream(text)) is None, text


@pytest.mark.parametrize("codec", CODED)
def test_what_is_empty_may_have_parts(codec: str) -> None:
    """No codec writes any for a tensor of no elements."""
    for sample in samples(codec):
        for shape in ((0,), (0, 5), (5, 0), ()):
            base = None if sample.base is None else sample.base.reshape(-1)[: int(np.prod(shape))].reshape(shape)
            other = replace(sample, shape=shape, base=base)
            meta = {**json.loads(sample.streams.get(META, b"{}")), "shape": list(shape)}
            other.read(**({META: stream(json.dumps(meta).encode())} if META in sample.parts else {}))


@pytest.mark.parametrize("codec", WRITERS)
def test_parts_may_be_missing_or_of_another_form(codec: str) -> None:
    for sample in samples(codec):
        for key, part in sample.parts.items():
            sample.read(**{key: None})
            for other in (part.float(), part.bfloat16(), part.reshape(1, -1), part.reshape(-1)[:0], torch.tensor(1.0)):
                found = sample.read(**{key: other})
                assert found is None or part.dtype != torch.uint8 or torch.equal(part, other), (sample.name, key)


@pytest.mark.parametrize("codec", CODED)
def test_bytes_may_be_altered(codec: str) -> None:
    """Blobs are held against their digests before: this is what is left if a writer is wrong."""
    known = list(samples(codec))

    @settings(max_examples=400, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        sample = data.draw(st.sampled_from(known))
        key = data.draw(st.sampled_from(sorted(sample.streams)))
        raw = bytearray(sample.streams[key])
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        for _ in range(data.draw(st.integers(0, 4))):
            if raw:
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        sample.read(**{key: stream(bytes(raw))})

    holds()


SPARE = 32 << 20  # bytes beyond what the process has, for tensors of some kB


def attacks() -> list[tuple[Sample, str, bytes]]:
    """Streams of a few kB at most, each of which stands for far more than its tensor has."""
    zeros = bytes(1 << 28)
    bomb = zstandard.ZstdCompressor(level=1).compress(zeros)
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(zeros)
    numbers = [write_numbers(np.zeros(1 << 25, dtype=width)) for width in (np.uint8, np.uint16, np.uint64)]
    numbers += [bytes([8]) + one[1:] for one in numbers]
    found: list[tuple[Sample, str, bytes]] = []
    for codec in CODED:
        for sample in samples(codec):
            for key, data in sample.streams.items():
                found += [(sample, key, one) for one in (bomb, unsized, *numbers)]
                if data[:4] == zstandard.FRAME_HEADER:
                    found.append((sample, key, _lying(bomb, zstandard.frame_content_size(data))))
            if META in sample.parts:
                meta = json.loads(sample.streams[META])
                for field in meta:
                    texts = [json.dumps({**meta, field: one}) for one in (2**40, [2**40], [2**20, 2**20], [2**40] * 2)]
                    found += [(sample, META, text.encode()) for text in texts]
    return found


def _lying(bomb: bytes, size: int) -> bytes:
    """The bomb with a header that declares `size`: four bytes after those of magic, descriptor and window."""
    lying = bomb[:6] + size.to_bytes(4, "little") + bomb[10:]
    assert zstandard.frame_content_size(lying) == size
    return lying


def attacked() -> None:
    """Run in a process of its own: what takes more than SPARE there ends it."""
    import resource
    from pathlib import Path

    planned = attacks()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + SPARE, held + SPARE))
    try:
        np.empty(2 * SPARE, dtype=np.uint8)
    except MemoryError:
        print("limited")
    read = [(sample, key) for sample, key, data in planned if sample.read(**{key: stream(data)}) is not None]
    # what some of the metadata says makes no difference; what a stream holds does
    print(
        f"{len(planned)} tried, streams read:",
        [(sample.codec, sample.name, key) for sample, key in read if key != META],
    )


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits the memory of a process")
def test_no_more_memory_than_the_shape_asks_for() -> None:
    code = "from tests.contracts.test_damaged_parts import attacked; attacked()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"limited\n\d{4,} tried, streams read: \[\]\n", done.stdout), done.stdout[-2000:]


class TestThroughTheStore:
    """Errors name the tensor, its artifact and what to do."""

    def read(self, **changed: Any) -> None:
        artifact, _ = golden("rtn@1")
        store, record = ArtifactStore(MemoryObjects()), artifact.record("vector")
        draft = store.draft("update", Lineage("test"))
        parts = {**artifact.parts("vector"), **changed.pop("parts", {})}
        written = store.write_tensor("vector", parts, role="bare", dtype="F32", shape=record.shape, codec=record.codec)
        draft.share(replace(written, **changed))
        read_delta(store.open(draft.commit()), "vector")

    def test_as_it_is(self) -> None:
        self.read()

    @pytest.mark.parametrize("codec", ["rtn@2", "rtn", "morse@1", "auto@1", "low_rank@1", ""])
    def test_a_codec_from_the_future(self, codec: str) -> None:
        said = rf"tensor 'vector' of update/\w+: .*'{codec}'.* reads .*rtn@1.*Deltaworks that wrote it"
        with pytest.raises(Damaged, match=said) as caught:
            self.read(codec=codec)
        assert str(caught.value).count(caught.value.remedy) == 1

    def test_a_stream_cut_short(self) -> None:
        with pytest.raises(Damaged, match=r"tensor 'vector' of update/\w+: part 'scales' must have 4 bytes, found 3"):
            self.read(parts={"scales": stream(b"abc")})

    def test_a_stream_that_does_not_say_how_long_it_is(self) -> None:
        unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0")
        with pytest.raises(Damaged, match=r"tensor 'vector' of update/\w+: part 'zeros' .* declares no size at all"):
            self.read(parts={"zeros": stream(unsized)})
