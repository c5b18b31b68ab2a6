"""Exact: every bit comes back, from the right base only, in far fewer bytes than byte differences take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.blobs import decode_parts, encode_parts
from storage.errors import Damaged, DeltaworksError, InvalidInput, Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, UpdateRef
from tasks.codecs import Leaf
from tasks.codecs.exact import Exact
from tasks.codecs.streams import tensor_digest
from tasks.codecs.ulps import MANTISSAS, ByExponent, bits_of, from_bits, stepped, steps, steps_by_exponent
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.tensors import dtype_name, read_delta, read_tensor
from tests.builders import memory_store

GOLDEN = Path(__file__).parents[1] / "golden" / "compress"
FLOATS = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32, torch.float64: np.uint64}


def there_and_back(base: Tensor, tuned: Tensor) -> tuple[Tensor, int]:
    """What comes back through a file, and the file's size."""
    leaf = Leaf("layers.0.weight", "linear.weight", torch.zeros(tuned.shape), sides=lambda: (base, tuned))
    coded = Exact().encode(leaf, {})
    assert coded.digest == tensor_digest(tuned)
    data = encode_parts(coded.parts)
    parts = decode_parts(memoryview(bytearray(data)), what="it")
    return Exact.restore(parts, tuple(tuned.shape), base), len(data)


def same_bits(first: Tensor, second: Tensor) -> bool:
    assert first.dtype == second.dtype and first.shape == second.shape
    return tensor_digest(first) == tensor_digest(second)


def moved(base: Tensor, share: float, seed: int = 1) -> Tensor:
    """`base` as a training may leave it, with about this share of its numbers changed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(base.shape, generator=generator)
    low, high = 1e-8, 1.0
    for _ in range(40):
        size = (low * high) ** 0.5
        tuned = (base.float() + noise * size).to(base.dtype)
        low, high = (size, high) if (tuned != base).float().mean() < share else (low, size)
    return tuned


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_bits_come_back(dtype: torch.dtype) -> None:
    """-0, infinities, payloads of NaN and denormals on either side."""
    word = FLOATS[dtype]

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40))
        tops = [0, 1, np.iinfo(word).max, np.iinfo(word).max >> 1, (np.iinfo(word).max >> 1) + 1]
        elements = st.sampled_from(tops) | st.integers(0, np.iinfo(word).max)
        base, tuned = (data.draw(arrays.arrays(word, shape, elements=elements)) for _ in range(2))
        kept = data.draw(arrays.arrays(np.bool_, shape))
        tuned = np.where(kept, base, tuned).astype(word)
        before, after = (from_bits(np.ascontiguousarray(one).reshape(-1), dtype, shape) for one in (base, tuned))
        found, _ = there_and_back(before, after)
        assert same_bits(found, after)

    holds()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_steps_count_floats(dtype: torch.dtype) -> None:
    """Odd towards 0, even away from it, two for each float; and a change of sign comes back too."""
    values = torch.tensor([-2.0, -1.0, 1e-3, 1.0, 2.0], dtype=dtype)
    word = bits_of(values).dtype.type
    assert steps(bits_of(values), bits_of(values) + word(3)).tolist() == [6] * 5
    assert steps(bits_of(values), bits_of(values) - word(3)).tolist() == [5] * 5
    if dtype == torch.float32:
        away = torch.nextafter(values, values * 2)
        assert steps(bits_of(values), bits_of(away)).tolist() == [2] * 5
    assert np.array_equal(
        stepped(bits_of(values), steps(bits_of(values), bits_of(-values.flip(0)))), bits_of(-values.flip(0))
    )


@pytest.mark.parametrize("dtype", MANTISSAS)
@pytest.mark.parametrize("elements", [0, 1, 70_000])
def test_torch_gives_the_same_steps_in_the_same_order(dtype: torch.dtype, elements: int) -> None:
    """The way of other devices, run on the CPU: with any bits, NaN and both zeros among them."""
    generator = torch.Generator().manual_seed(elements)
    base, tuned = (
        torch.randint(0, 256, (elements * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)
        for _ in range(2)
    )
    found, counts = steps_by_exponent(base, tuned, MANTISSAS[dtype])
    wanted, its = ByExponent(bits_of(base), MANTISSAS[dtype]).steps_to(bits_of(tuned))
    assert np.array_equal(found, wanted)
    assert counts == [(exponent, count) for exponent, count in its if count]


@pytest.mark.parametrize("elements", [0, 1, 150_001])
def test_elements_are_ordered_by_exponent_and_place(elements: int) -> None:
    """Over several pieces, as a stable sort of all would do it; and back."""
    base = (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    exponents = (bits_of(base).astype(np.int64) >> 7) & 0xFF
    tuned = bits_of(moved(base, 0.5))
    order = ByExponent(bits_of(base), 7)
    found, counts = order.steps_to(tuned)
    assert np.array_equal(found, steps(bits_of(base), tuned)[np.argsort(exponents, kind="stable")])
    assert counts == list(zip(*(one.tolist() for one in np.unique(exponents, return_counts=True)), strict=True))
    assert np.array_equal(order.tuned(found, counts), tuned)


def test_counts_of_another_base_are_damage() -> None:
    base = torch.tensor([1.0, 2.0, 2.0]).bfloat16()
    order = ByExponent(bits_of(base), 7)
    for counts in ([(127, 2), (128, 1)], [(127, 1), (129, 2)], [(128, 3)]):
        with pytest.raises(Damaged, match="exponent"):
            order.tuned(np.zeros(3, np.uint16), counts)


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4)),
        (torch.arange(12), torch.arange(12) + 1),
        (torch.tensor([True, False]), torch.tensor([False, False])),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.ones(5, 7).T, torch.ones(5, 7).T * 2),
    ],
    ids=["wider", "integers", "booleans", "empty", "no dimension", "transposed"],
)
def test_whatever_the_tensors_are(base: Tensor, tuned: Tensor) -> None:
    assert same_bits(there_and_back(base, tuned)[0], tuned)


def test_what_did_not_change_costs_a_header() -> None:
    base = torch.randn(300, 300).bfloat16()
    found, size = there_and_back(base, base.clone())
    assert same_bits(found, base) and size < 50


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.48, 0.9])
def test_at_most_half_of_what_byte_differences_take(share: float) -> None:
    """XOR and zstd, as updates of reinforcement learning are shipped; two thirds of it where nearly all changed."""
    scales = torch.rand(600, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    base = (torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)) * 0.02 * scales).bfloat16()
    tuned = moved(base, share)
    found, size = there_and_back(base, tuned)
    assert same_bits(found, tuned)
    xor = (bits_of(base) ^ bits_of(tuned)).tobytes()
    assert size < (0.5 if share < 0.5 else 0.67) * len(zstandard.ZstdCompressor(level=1).compress(xor))


def test_smaller_than_what_slime_ships() -> None:
    """Its two layouts, as its own code wrote them, each through zstd level 1."""
    sides, layouts = (load_file(GOLDEN / f"slime_lossless.{side}.safetensors") for side in ("in", "out"))
    found, size = there_and_back(sides["base"], sides["finetuned"])
    assert same_bits(found, sides["finetuned"])
    xor = bits_of(sides["base"]) ^ bits_of(sides["finetuned"])
    assert np.array_equal(xor.view(np.uint8), layouts["xor"].numpy())
    press = zstandard.ZstdCompressor(level=1).compress
    leaf = Leaf("w", "bare", sides["finetuned"], sides=lambda: (sides["base"], sides["finetuned"]))
    streams = [one for key, one in Exact().encode(leaf, {}).parts.items() if key != "meta"]
    assert sum(one.numel() for one in streams) < size
    assert (
        sum(one.numel() for one in streams) < min(len(press(one.numpy().tobytes())) for one in layouts.values()) / 1.5
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_altered_bytes_never_crash(data: st.DataObject) -> None:
    """Whatever the bytes are: an error of ours, or a tensor of the right form, which its digest then tells apart."""
    base = (torch.arange(600).float() / 7).bfloat16()
    tuned = moved(base, data.draw(st.sampled_from([0.1, 0.9])))
    leaf = Leaf("w", "bare", tuned.float(), sides=lambda: (base, tuned))
    parts = dict(Exact().encode(leaf, {}).parts)
    key = data.draw(st.sampled_from(sorted(parts)))
    raw = bytearray(parts[key].numpy().tobytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    parts[key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    try:
        found = Exact.restore(parts, (600,), base)
    except DeltaworksError:
        return
    assert found.shape == (600,)


class TestThroughTheStore:
    """From two checkpoints to an update and back."""

    @pytest.fixture
    def store(self) -> ArtifactStore:
        return memory_store()

    def checkpoint(self, store: ArtifactStore, tensors: dict[str, Tensor]) -> CheckpointRef:
        draft = store.draft("checkpoint", Lineage("ingest"))
        for name, tensor in tensors.items():
            parts = {"tensor": tensor}
            draft.add(name, parts, role="linear.weight", dtype=dtype_name(tensor.dtype), shape=tensor.shape)
        return CheckpointRef(draft.commit())

    def sides(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        base = {name: (torch.randn(64, 48) * 0.02).bfloat16() for name in ("a.weight", "b.weight", "c.weight")}
        tuned = {name: moved(tensor, 0.1) for name, tensor in base.items()}
        tuned["c.weight"] = base["c.weight"].clone()
        tuned["b.weight"] = (base["b.weight"].float() + 1e-6).bfloat16()
        return base, tuned

    def update(self, store: ArtifactStore) -> tuple[UpdateRef, UpdateRef, dict[str, Tensor], dict[str, Tensor]]:
        base, tuned = self.sides()
        plain = extract_update(self.checkpoint(store, base), self.checkpoint(store, tuned), Extract(), store)
        return plain, compress_update(plain, Exact(), store), base, tuned

    def test_base_and_update_give_the_tuned_checkpoint(self, store: ArtifactStore) -> None:
        plain, exact, base, tuned = self.update(store)
        artifact = store.open(exact)
        for name, tensor in tuned.items():
            assert same_bits(read_tensor(artifact, name), tensor)
            assert torch.equal(read_delta(artifact, name), tensor.float() - base[name].float())
            assert torch.equal(read_delta(artifact, name), read_delta(store.open(plain), name))
        assert artifact.manifest.facts["ratio"] > 4
        again = compress_update(exact, Exact(), store)
        assert [one.blob for one in store.open(again).manifest.tensors] == [
            one.blob for one in artifact.manifest.tensors
        ]

    def test_another_base_is_refused(self, store: ArtifactStore) -> None:
        _, exact, base, _ = self.update(store)
        other = self.checkpoint(store, {name: tensor + 1 for name, tensor in base.items()})
        artifact = store.open(exact)
        record = artifact.record("a.weight")
        draft = store.draft("update", Lineage("test"))
        draft.share(replace(record, onto=store.open(other).record("a.weight").blob))
        with pytest.raises(Mismatch, match=r"a\.weight"):
            read_tensor(store.open(draft.commit()), "a.weight")

    def test_other_bytes_are_damage(self, store: ArtifactStore) -> None:
        _, exact, _, _ = self.update(store)
        record = store.open(exact).record("a.weight")
        draft = store.draft("update", Lineage("test"))
        draft.share(replace(record, digest="0" * 64))
        with pytest.raises(Damaged, match=r"a\.weight"):
            read_tensor(store.open(draft.commit()), "a.weight")

    def test_without_the_tuned_checkpoint_there_is_nothing_to_keep(self, store: ArtifactStore) -> None:
        plain, *_ = self.update(store)
        inputs = {**store.open(plain).manifest.lineage.inputs, "tuned": f"checkpoint/{'0' * 64}"}
        draft = store.draft("update", Lineage("extract", inputs))
        for record in store.open(plain).manifest.tensors:
            draft.share(record)
        plain = UpdateRef(draft.commit())
        with pytest.raises(InvalidInput, match="no longer stored"):
            compress_update(plain, Exact(), store)
