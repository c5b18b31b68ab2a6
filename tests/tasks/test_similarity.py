"""Similarity of stored updates, against float64 on the flat dense vectors, whatever codec wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, UpdateRef
from tasks import similarity as module
from tasks.codecs import CODECS, Codec, Ternary
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.parallel import Budget
from tasks.similarity import Similarity, similarity
from tasks.tensors import prefixed, read_delta
from tests.builders import checkpoint_of, memory_store, random_tensors, update_of

TERNARY = Ternary(density=0.3)


class Place(NamedTuple):
    store: ArtifactStore
    base: CheckpointRef
    dense: list[UpdateRef]

    def coded(self, codec: Codec) -> list[UpdateRef]:
        return [compress_update(update, codec, self.store) for update in self.dense]


@pytest.fixture
def place() -> Place:
    """Three updates: two that share a part, and one of its own."""
    store = memory_store()
    tensors = random_tensors(0)
    base = checkpoint_of(tensors, store)
    common = random_tensors(9, 0.01)
    dense = []
    for seed in (1, 2, 3):
        own = random_tensors(seed, 0.01)
        tuned = {name: one + own[name] + (common[name] if seed < 3 else 0) for name, one in tensors.items()}
        dense.append(extract_update(base, checkpoint_of(tuned, store), Extract(), store))
    return Place(store, base, dense)


def flat(update: UpdateRef, store: ArtifactStore) -> Tensor:
    artifact = store.open(update)
    return torch.cat([read_delta(artifact, name).double().reshape(-1) for name in artifact.names])


def check(found: Similarity, updates: list[UpdateRef], store: ArtifactStore) -> None:
    rows = torch.stack([flat(update, store) for update in updates])
    norms = rows.norm(dim=1)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-12)
    np.testing.assert_allclose(found.cosines, rows @ rows.T / norms.outer(norms), rtol=1e-9, atol=1e-12)
    signs = rows.sign()
    both, opposed = signs.abs() @ signs.abs().T, (signs.abs() @ signs.abs().T - signs @ signs.T) / 2
    np.testing.assert_allclose(found.conflicts, torch.where(both > 0, opposed / both, 0.0), rtol=1e-12)
    np.testing.assert_allclose(found.changed, signs.abs().mean(dim=1), rtol=1e-12)
    assert found.numbers == rows.shape[1] and found.tensors == len(random_tensors(0))
    for square in (found.cosines, found.conflicts):
        assert np.array_equal(square, square.T)
    assert found.cosines.diagonal().tolist() == [1.0] * len(updates)


@pytest.mark.parametrize("name", CODECS)
def test_equals_the_dense_result(place: Place, name: str) -> None:
    updates = place.coded(CODECS[name]())
    check(similarity(updates, place.store), updates, place.store)


def test_ternary_updates_stay_packed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a ternary tensor was decoded")

    updates = place.coded(TERNARY)
    wanted = similarity(updates, place.store)
    assert wanted.packed == 1
    monkeypatch.setattr(module, "read_delta", refuse)
    monkeypatch.setattr(Ternary, "decode", refuse)
    found = similarity(updates, place.store)
    assert np.array_equal(found.cosines, wanted.cosines)


def test_of_mixed_updates_only_the_ternary_pairs_are_packed(place: Place) -> None:
    ternary, other = place.coded(TERNARY), place.coded(CODECS["exact"]())
    updates = [ternary[0], other[1], ternary[1], place.dense[2]]
    found = similarity(updates, place.store)
    check(found, updates, place.store)
    assert found.packed == pytest.approx(1 / 6)


def test_what_ternary_1_wrote_is_compared_too(place: Place) -> None:
    """Scale, signs and zstandard gaps: what `tests/golden/format` holds of the first version."""
    import zstandard

    draft = place.store.draft("update", Lineage("compress", {"base": place.base}))
    for name, tensor in random_tensors(5).items():
        kept = tensor.reshape(-1).abs() > 0.8
        gaps = np.diff(kept.nonzero()[:, 0].numpy(), prepend=-1) - 1
        stream = zstandard.ZstdCompressor(level=1).compress(gaps.astype(np.uint8).tobytes())
        negative = np.packbits(tensor.reshape(-1)[kept].numpy() < 0)
        parts = {
            "scale": torch.tensor([0.5]),
            "signs": torch.from_numpy(negative),
            "gaps": torch.frombuffer(bytearray(stream), dtype=torch.uint8),
        }
        draft.add(name, parts, role="linear.weight", dtype="F32", shape=tensor.shape, codec="ternary@1")
    old = UpdateRef(draft.commit())
    assert int(flat(old, place.store).count_nonzero()) > 50
    updates = [old, *place.coded(TERNARY)]
    check(similarity(updates, place.store), updates, place.store)


def test_products_of_ternary_factors_are_not_taken_for_ternary() -> None:
    store = memory_store()
    generator = torch.Generator().manual_seed(0)
    updates = []
    for _ in range(2):
        draft = store.draft("update", Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}))
        left, right = torch.randn(24, 2, generator=generator), torch.randn(2, 16, generator=generator)
        parts = prefixed({"tensor": right}, "A") | prefixed({"tensor": left}, "B")
        draft.add("fc1.weight", parts, role="linear.weight", dtype="F32", shape=(24, 16), rank=2)
        updates.append(compress_update(UpdateRef(draft.commit()), TERNARY, store))
    assert store.open(updates[0]).record("fc1.weight").rank == 2
    found, rows = similarity(updates, store), torch.stack([flat(update, store) for update in updates])
    assert found.packed == 0
    wanted = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert found.cosines[0, 1] == pytest.approx(float(wanted), rel=1e-9)


def test_results_do_not_depend_on_workers_and_memory(place: Place) -> None:
    updates = [*place.coded(TERNARY), *place.dense]
    wanted = similarity(updates, place.store, Budget(workers=1))
    seen: list[int] = []
    found = similarity(updates, place.store, Budget(4, 1), report=lambda done, total, note: seen.append(done))
    assert np.array_equal(found.cosines, wanted.cosines) and np.array_equal(found.norms, wanted.norms)
    assert seen == [1, 2, 3, 4, 5]


def test_an_update_of_zeros_has_no_direction(place: Place) -> None:
    zeros = update_of({name: torch.zeros_like(one) for name, one in random_tensors(0).items()}, place.base, place.store)
    found = similarity([zeros, place.dense[0], zeros], place.store)
    assert found.cosines.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert found.norms[0] == 0 and found.changed[0] == 0 and not found.conflicts.any()


@pytest.mark.parametrize("codec", [TERNARY, CODECS["dense"]()], ids=lambda codec: codec.name)
def test_equal_and_opposite_updates(place: Place, codec: Codec) -> None:
    tensors = random_tensors(4)
    one, same, opposite = (
        compress_update(
            update_of({name: factor * tensor for name, tensor in tensors.items()}, place.base, place.store),
            codec,
            place.store,
        )
        for factor in (1, 2, -1)
    )
    found = similarity([one, one, same, opposite], place.store)
    assert found.cosines[0].tolist() == pytest.approx([1, 1, 1, -1], abs=1e-15)
    assert found.cosines[0, 1] == 1
    assert found.conflicts[0].tolist() == [0, 0, 0, 1]


def test_large_tensors_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    wanted = similarity([place.dense[0], *place.coded(TERNARY)], place.store)
    monkeypatch.setattr(module, "PIECE", 16)
    found = similarity([place.dense[0], *place.coded(TERNARY)], place.store)
    np.testing.assert_allclose(found.cosines, wanted.cosines, rtol=1e-12)


def test_heads_are_left_out(place: Place) -> None:
    tensors = random_tensors(0)
    updates = []
    for classes in (3, 4):
        tuned = {name: tensor * 1.5 for name, tensor in tensors.items()} | {"classifier.weight": torch.ones(classes, 8)}
        spec = Extract(heads="keep")
        updates.append(extract_update(place.base, checkpoint_of(tuned, place.store), spec, place.store))
    found = similarity(updates, place.store)
    assert found.numbers == sum(tensor.numel() for tensor in tensors.values()) and found.cosines[0, 1] == 1


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {**found, "layer.bias": torch.ones(17)}, r"layer.bias.*\[16\] as in update/.*found \[17\]"),
        (lambda found: {name: one for name, one in found.items() if name != "layer.bias"}, "found no such tensor"),
        (lambda found: {**found, "more": torch.ones(2)}, "'more'.*expected no such tensor as in update/.*found .2."),
    ],
)
def test_other_tensors_are_refused(place: Place, change: Change, message: str) -> None:
    other = update_of(change(random_tensors(1)), place.base, place.store)
    with pytest.raises(Mismatch, match=message):
        similarity([place.dense[0], other], place.store)


def test_updates_of_another_base_are_refused_by_name(place: Place) -> None:
    base = checkpoint_of(random_tensors(7), place.store)
    other = update_of(random_tensors(1), base, place.store)
    with pytest.raises(Mismatch) as error:
        similarity([place.dense[0], other], place.store)
    for ref in (place.dense[0], other, base, place.base):
        assert ref[:19] in str(error.value)


def test_fewer_than_two_or_numbers_that_are_none(place: Place) -> None:
    with pytest.raises(InvalidInput, match="two updates or more, found 1"):
        similarity(place.dense[:1], place.store)
    broken = random_tensors(1) | {"layer.bias": torch.full((16,), float("nan"))}
    update = update_of(broken, place.base, place.store)
    with pytest.raises(InvalidInput, match=r"'layer.bias' of update/.*16 NaN"):
        similarity([place.dense[0], update], place.store)
