"""Turned factors: the same product, in a shape in which one threshold is fair; and what that does to LoRA's updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.refs import UpdateRef
from tasks.codecs import Ternary
from tasks.compress import compress_update
from tasks.tensors import read_delta
from tasks.turned import turned


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(0, 10_000))
def test_the_product_stays_and_the_factors_are_alike(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * 1e-3
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64) * 30
    B, A = turned(left, right)
    assert (B.shape, A.shape) == (left.shape, right.shape)
    torch.testing.assert_close(B @ A, left @ right, rtol=1e-9, atol=1e-9)
    if rank <= min(rows, columns):
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-6, atol=1e-9)
        gram = B.T @ B
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-9 * float(gram.max()))
    else:
        assert torch.equal(B, left) and torch.equal(A, right)


def test_zeros_stay_zeros() -> None:
    B, A = turned(torch.zeros(8, 3), torch.randn(3, 5))
    assert not (B @ A).any()
    assert torch.isfinite(B).all() and torch.isfinite(A).all()


def lora(rank: int, store: ArtifactStore) -> UpdateRef:
    """Factors as training leaves them: A near where it began, B small."""
    generator = torch.Generator().manual_seed(1)
    draft = store.draft("update", Lineage("extract"))
    for number in range(3):
        A = (torch.rand(rank, 48, generator=generator) - 0.5) * 2 / 48**0.5
        B = torch.randn(64, rank, generator=generator) * 3e-3 / (1 + torch.arange(rank))
        parts = {"A.tensor": A, "B.tensor": B}
        draft.add(f"{number}.weight", parts, role="linear.weight", dtype="F32", shape=(64, 48), rank=rank)
    return UpdateRef(draft.commit())


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_a_ternary_lora_is_not_lost(rank: int) -> None:
    """One threshold over factors as they are would keep entries of A alone, and the update would be nothing."""
    store = ArtifactStore(MemoryObjects())
    update = lora(rank, store)
    found = store.open(compress_update(update, Ternary(density=0.2), store))
    for name in found.names:
        wanted, got = read_delta(store.open(update), name), read_delta(found, name)
        assert torch.nn.functional.cosine_similarity(wanted.flatten(), got.flatten(), dim=0) > 0.45
        assert found.record(name).rank == rank
        error = float((got - wanted).norm() / wanted.norm())
        assert found.record(name).error == pytest.approx(error, rel=1e-4)


def test_threads_do_not_change_the_ref() -> None:
    before = torch.get_num_threads()
    try:
        refs = set()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            store = ArtifactStore(MemoryObjects())
            refs.add(compress_update(lora(8, store), Ternary(), store))
    finally:
        torch.set_num_threads(before)
    assert len(refs) == 1
