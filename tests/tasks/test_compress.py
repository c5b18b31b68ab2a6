"""Compressing an update: what records say of it, and that neither threads nor a second run change a byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import Lineage
from storage.refs import UpdateRef
from tasks.codecs import CODECS, Codec, Dense, Ternary
from tasks.compress import compress_update
from tasks.parallel import Budget
from tasks.tensors import dtype_name, prefixed, read_delta
from tests.builders import memory_store

LOSSY = [name for name, codec in CODECS.items() if not codec.lossless]


def deltas(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(50, 16, generator=generator, dtype=dtype) * 1e-3,
        "layers.0.fc1.bias": torch.randn(32, generator=generator, dtype=dtype) * 1e-4,
        "layers.0.fc1.weight": torch.randn(32, 16, generator=generator, dtype=dtype) * 1e-3,
        "layers.0.norm.weight": torch.zeros(16, dtype=dtype),
    }


def stored(store: ArtifactStore, tensors: dict[str, Tensor], rank: int | None = None) -> UpdateRef:
    draft = store.draft("update", Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}))
    for name, tensor in tensors.items():
        role = "embedding.weight" if "embed" in name else "linear.weight" if tensor.dim() == 2 else "linear.bias"
        parts = {"tensor": tensor} if tensor.any() else {}
        draft.add(name, parts, role=role, dtype=dtype_name(tensor.dtype), shape=tensor.shape)
    if rank:
        generator = torch.Generator().manual_seed(1)
        left, right = torch.randn(24, rank, generator=generator), torch.randn(rank, 16, generator=generator)
        parts = prefixed({"tensor": right}, "A") | prefixed({"tensor": left}, "B")
        draft.add("layers.1.fc1.weight", parts, role="linear.weight", dtype="F32", shape=(24, 16), rank=rank)
    draft.facts.update({"norm": 1.0, "task": "rot90"})
    return UpdateRef(draft.commit())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_records_say_what_was_lost(name: str, dtype: torch.dtype) -> None:
    store = memory_store()
    update = stored(store, deltas(dtype), rank=2)
    before, after = store.open(update), store.open(compress_update(update, CODECS[name](), store))
    for record in after.manifest.tensors:
        wanted, found = read_delta(before, record.name).double(), read_delta(after, record.name).double()
        assert found.shape == wanted.shape
        error = float((found - wanted).norm() / wanted.norm()) if wanted.any() else 0.0
        assert (record.error or 0.0) == pytest.approx(error, rel=1e-4, abs=1e-7)
    facts = after.manifest.facts
    assert facts["task"] == "rot90" and "norm" not in facts
    assert facts["file_bytes"] == sum({r.blob: r.bytes for r in after.manifest.tensors}.values())
    assert facts["bf16_bytes"] == 2 * sum(record.elements for record in before.manifest.tensors)
    assert after.manifest.lineage.inputs["update"] == update


@pytest.mark.parametrize("name", LOSSY)
def test_neither_threads_nor_a_second_run_change_a_byte(name: str) -> None:
    store = memory_store()
    update = stored(store, deltas(), rank=2)
    codec: Codec = CODECS[name]()
    alone = compress_update(update, codec, store)
    assert compress_update(update, codec, store, budget=Budget(workers=4, memory=10_000)) == alone
    assert compress_update(update, codec, store) == alone


def test_dense_keeps_wide_numbers() -> None:
    store = memory_store()
    update = stored(store, deltas(torch.float64))
    after = store.open(compress_update(update, Dense(), store))
    assert {record.dtype for record in after.manifest.tensors if record.name != "layers.0.norm.weight"} == {"F64"}
    for name, tensor in deltas(torch.float64).items():
        assert torch.equal(read_delta(after, name).double(), tensor)


@pytest.mark.parametrize("name", LOSSY)
def test_numbers_that_are_none_are_refused_by_name(name: str) -> None:
    store = memory_store()
    broken = deltas()
    broken["layers.0.fc1.weight"][3, 4] = torch.nan
    update = stored(store, broken)
    known = set(store.objects.list("update/"))
    with pytest.raises(InvalidInput, match=r"layers\.0\.fc1\.weight"):
        compress_update(update, CODECS[name](), store)
    assert set(store.objects.list("update/")) == known


def test_a_codec_that_must_be_chosen_first_says_so() -> None:
    store = memory_store()
    with pytest.raises(InvalidInput, match="grid"):
        compress_update(stored(store, deltas()), Ternary(alpha="grid"), store)
