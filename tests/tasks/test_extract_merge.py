"""From two checkpoints to an update, to a state, and back to a checkpoint: exact where it can be, refused where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.blobs import encode_parts
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, StateRef, UpdateRef, short
from tasks.codecs import CODECS, AnyCodec, Dense, Ternary
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, AnyMerger, Average, Joint, Opcm, TaskArithmetic, Ties
from tasks.recipe import Recipe
from tasks.tensors import prefixed, read_tensor
from tests.builders import checkpoint_of, ingested, memory_store, perturbed, random_tensors, tiny_model, update_of


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


@pytest.fixture
def base(store: ArtifactStore) -> CheckpointRef:
    return checkpoint_of(random_tensors(0), store)


def tensors(ref: str, store: ArtifactStore) -> dict[str, Tensor]:
    artifact = store.open(ref)
    return {name: read_tensor(artifact, name) for name in artifact.names}


def tuned(seed: int, size: float = 0.01) -> dict[str, Tensor]:
    noise = random_tensors(seed, size)
    return {name: tensor + noise[name] for name, tensor in random_tensors(0).items()}


def low_rank(base: CheckpointRef, name: str, rank: int, store: ArtifactStore) -> tuple[CheckpointRef, Tensor]:
    """A checkpoint whose tensor `name` is the base's plus factors, as LoRA leaves it, and the factors' product."""
    before = store.open(base)
    draft = store.draft("checkpoint", Lineage("fine_tune", {"base": base}))
    for record in before.manifest.tensors:
        if record.name != name:
            draft.share(record)
            continue
        left, right = torch.randn(record.shape[0], rank) / 100, torch.randn(rank, record.shape[1])
        parts = {**prefixed({"tensor": right}, "A"), **prefixed({"tensor": left}, "B")}
        draft.add(name, parts, role=record.role, dtype="F32", shape=record.shape, rank=rank, onto=record.blob)
    return CheckpointRef(draft.commit()), left @ right


class TestExtract:
    def test_base_plus_update_is_tuned_bit_for_bit(self, store: ArtifactStore) -> None:
        """Where the difference can be written in float32, as for weights on a common grid."""
        grid = {name: (tensor * 2**12).round() / 2**12 for name, tensor in random_tensors(0).items()}
        moved = {name: tensor + (random_tensors(1)[name] * 2**6).round() / 2**12 for name, tensor in grid.items()}
        base, after = checkpoint_of(grid, store), checkpoint_of(moved, store)
        update = extract_update(base, after, Extract(), store)
        state = fold_update(base, None, update, Recipe(Average()), store)
        for name, tensor in tensors(materialize(base, state, store), store).items():
            assert torch.equal(tensor, moved[name])

    def test_base_plus_update_is_tuned_to_the_last_place(self, store: ArtifactStore, base: CheckpointRef) -> None:
        """In general difference and sum are rounded once each: within one unit in the last place of the larger side."""
        after = tuned(1, size=0.3)
        update = tensors(extract_update(base, checkpoint_of(after, store), Extract(), store), store)
        for name, tensor in random_tensors(0).items():
            larger = torch.maximum(tensor.abs(), after[name].abs())
            place = torch.nextafter(larger, torch.tensor(torch.inf)) - larger
            assert ((tensor + update[name] - after[name]).abs() <= place).all()

    def test_half_precision_is_subtracted_in_full(self, store: ArtifactStore) -> None:
        before = {"l.weight": torch.tensor([[1.0, 100.0]], dtype=torch.bfloat16)}
        after = {"l.weight": torch.tensor([[1.0 + 2**-20, 100.001]])}
        update = extract_update(checkpoint_of(before, store), checkpoint_of(after, store), Extract(), store)
        assert torch.equal(tensors(update, store)["l.weight"], after["l.weight"] - before["l.weight"].float())

    def test_factors_stay_factors(self, store: ArtifactStore, base: CheckpointRef) -> None:
        after, product = low_rank(base, "layer.weight", 2, store)
        update = store.open(extract_update(base, after, Extract(), store))
        record = update.record("layer.weight")
        assert (record.rank, record.onto, record.dtype) == (2, None, "F32")
        assert record.blob == store.open(after).record("layer.weight").blob
        torch.testing.assert_close(read_tensor(update, "layer.weight"), product)
        assert not read_tensor(update, "out.weight").any()
        assert update.manifest.facts["norm"] == pytest.approx(product.norm().item(), rel=1e-4)

    def test_the_norm_is_that_of_the_whole_update(self, store: ArtifactStore, base: CheckpointRef) -> None:
        update = store.open(extract_update(base, checkpoint_of(tuned(1), store), Extract(), store))
        every = torch.cat([read_tensor(update, name).flatten() for name in update.names])
        assert update.manifest.facts["norm"] == pytest.approx(every.double().norm().item(), rel=1e-9)

    def test_other_shapes_are_refused(self, store: ArtifactStore, base: CheckpointRef) -> None:
        after = checkpoint_of({**tuned(1), "embed.weight": torch.zeros(13, 8)}, store)
        with pytest.raises(Mismatch, match=r"embed\.weight.*\[12, 8\].*\[13, 8\]"):
            extract_update(base, after, Extract(), store)
        assert list(store.refs("update")) == []

    def test_another_model_is_refused(self, store: ArtifactStore, base: CheckpointRef) -> None:
        with pytest.raises(Mismatch, match="no name in common"):
            extract_update(base, checkpoint_of({"x": torch.zeros(1)}, store), Extract(heads="keep"), store)

    def test_nan_is_refused_by_name(self, store: ArtifactStore, base: CheckpointRef) -> None:
        after = checkpoint_of({**tuned(1), "layer.bias": torch.full((16,), torch.nan)}, store)
        with pytest.raises(InvalidInput, match=r"layer\.bias.*16 NaN"):
            extract_update(base, after, Extract(), store)
        assert list(store.refs("update")) == []

    def test_integers_must_agree(self, store: ArtifactStore) -> None:
        one = {"l.weight": torch.randn(2, 2), "counts": torch.tensor([1, 2])}
        base, after = checkpoint_of(one, store), checkpoint_of({**one, "l.weight": torch.randn(2, 2)}, store)
        update = extract_update(base, after, Extract(), store)
        state = fold_update(base, None, update, Recipe(Average()), store)
        assert torch.equal(tensors(materialize(base, state, store), store)["counts"], one["counts"])
        other = checkpoint_of({**one, "counts": torch.tensor([1, 3])}, store)
        with pytest.raises(Mismatch, match="integer tensor 'counts'"):
            extract_update(base, other, Extract(), store)


class TestCompress:
    @pytest.mark.parametrize("codec", [kind() for kind in CODECS.values()], ids=CODECS)
    def test_sizes_are_those_of_the_files(self, codec: AnyCodec, store: ArtifactStore, base: CheckpointRef) -> None:
        """Two tensors did not change: they are one file, counted once, and still two tensors of the model."""
        after = {
            **tuned(1),
            "layer.bias": random_tensors(0)["layer.bias"],
            "out.weight": random_tensors(0)["out.weight"],
        }
        update = extract_update(base, checkpoint_of(after, store), Extract(), store)
        small = store.open(compress_update(update, codec, store)).manifest
        held = {record.name: record.blob for record in small.tensors}
        blobs = set(held.values())
        assert held["layer.bias"] == held["out.weight"]
        files = sum(len(store.objects.get(f"blob/{blob}")) for blob in blobs)
        numbers = sum(tensor.numel() for tensor in random_tensors(0).values())
        assert (small.facts["file_bytes"], small.facts["bf16_bytes"]) == (files, 2 * numbers)
        assert small.facts["ratio"] == 2 * numbers / files

    def test_dense_changes_nothing(self, store: ArtifactStore, base: CheckpointRef) -> None:
        update = extract_update(base, checkpoint_of(tuned(1), store), Extract(), store)
        again = tensors(compress_update(update, Dense(), store), store)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors(update, store).items())

    def test_ternary_has_one_magnitude_for_the_whole_update(self, store: ArtifactStore, base: CheckpointRef) -> None:
        update = extract_update(base, checkpoint_of(tuned(1), store), Extract(), store)
        small = store.open(compress_update(update, Ternary(density=0.1), store))
        every = torch.cat([read_tensor(small, name).flatten() for name in small.names])
        assert every.count_nonzero() == int(0.1 * every.numel()) + 1
        assert every[every != 0].abs().unique().tolist() == pytest.approx([small.manifest.facts["magnitude"]])

    def test_factors_are_coded_one_by_one(self, store: ArtifactStore, base: CheckpointRef) -> None:
        """As ComPEFT does; coding the product would cost m * n places."""
        after, _ = low_rank(base, "layer.weight", 2, store)
        update = extract_update(base, after, Extract(), store)
        small = store.open(compress_update(update, Ternary(density=0.5), store))
        assert small.record("layer.weight").rank == 2
        parts = small.parts("layer.weight")
        assert {key.partition(".")[0] for key in parts} == {"A", "B"}
        assert torch.linalg.matrix_rank(read_tensor(small, "layer.weight")) == 2

    def test_a_compressed_update_keeps_its_base(self, store: ArtifactStore, base: CheckpointRef) -> None:
        update = extract_update(base, checkpoint_of(tuned(1), store), Extract(), store)
        small = compress_update(update, Ternary(), store)
        assert store.open(small).manifest.lineage.inputs["base"] == base
        fold_update(base, None, small, Recipe(Average()), store)


class TestMerge:
    def test_folding_onto_a_half_precision_base(self, store: ArtifactStore) -> None:
        """The state is float32; one cast at the end gives the base's dtype."""
        before = random_tensors(0, dtype=torch.bfloat16)
        base = checkpoint_of(before, store)
        deltas = [random_tensors(seed, size=0.01) for seed in (1, 2)]
        state = None
        for one in deltas:
            state = fold_update(base, state, update_of(one, base, store), Recipe(Average()), store)
        assert state is not None
        for name, tensor in tensors(materialize(base, state, store), store).items():
            expected = before[name].float() + (deltas[0][name] + deltas[1][name]) / 2
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected.bfloat16())

    def test_a_double_precision_base_keeps_its_digits(self, store: ArtifactStore) -> None:
        before = {name: tensor / 3 for name, tensor in random_tensors(0, dtype=torch.float64).items()}
        base = checkpoint_of(before, store)
        delta = {name: torch.full_like(tensor, 2**-10) for name, tensor in before.items()}
        state = fold_update(base, None, update_of(delta, base, store), Recipe(Opcm(accumulate="float32")), store)
        for name, tensor in tensors(materialize(base, state, store), store).items():
            torch.testing.assert_close(tensor, before[name] + 2**-10, rtol=0, atol=1e-9)

    def test_untouched_tensors_are_the_base_s_blobs(self, store: ArtifactStore) -> None:
        """Adding a zero would not do: it turns -0.0 into 0.0, and large integers into floats and back."""
        large = torch.tensor([2**53 + 1])
        fixed = {**random_tensors(0), "class_token": torch.tensor([-0.0, 1.0]), "seen": large}
        base = checkpoint_of(fixed, store)
        after = checkpoint_of({**fixed, "out.weight": tuned(1)["out.weight"]}, store)
        update = extract_update(base, after, Extract(), store)
        before = store.open(base)
        for kind in MERGERS.values():
            state = fold_update(base, None, update, Recipe(kind()), store)
            merged = store.open(materialize(base, state, store))
            changed = {name for name in merged.names if merged.record(name).blob != before.record(name).blob}
            assert changed == {"out.weight"}, kind

    def test_an_update_of_another_base_is_refused(self, store: ArtifactStore, base: CheckpointRef) -> None:
        other = checkpoint_of(random_tensors(9), store)
        update = update_of(random_tensors(1), other, store)
        with pytest.raises(Mismatch) as caught:
            fold_update(base, None, update, Recipe(Average()), store)
        assert all(short(ref) in str(caught.value) for ref in (base, other, update))

    def test_a_state_of_another_base_is_refused(self, store: ArtifactStore, base: CheckpointRef) -> None:
        other = checkpoint_of(random_tensors(9), store)
        state = fold_update(other, None, update_of(random_tensors(1), other, store), Recipe(Average()), store)
        with pytest.raises(Mismatch, match="the base of state"):
            fold_update(base, state, update_of(random_tensors(1), base, store), Recipe(Average()), store)
        with pytest.raises(Mismatch, match="the base of state"):
            materialize(base, state, store)

    @pytest.mark.parametrize("merger", [TaskArithmetic(), Average(), Opcm(), Ties(density=0.3)], ids=str)
    def test_a_state_of_another_merger_is_refused(
        self, merger: AnyMerger, store: ArtifactStore, base: CheckpointRef
    ) -> None:
        """Other settings of the same merger are another merger: its state may mean something else."""
        update = update_of(random_tensors(1), base, store)
        state = fold_update(base, None, update, Recipe(Ties(density=0.2)), store)
        with pytest.raises(Mismatch, match="merger of state"):
            fold_update(base, state, update, Recipe(merger), store)

    def test_other_tensors_are_refused_by_name(self, store: ArtifactStore, base: CheckpointRef) -> None:
        update = random_tensors(1)
        state = fold_update(base, None, update_of(update, base, store), Recipe(Average()), store)
        del update["layer.bias"]
        with pytest.raises(Mismatch, match=r"layer\.bias"):
            fold_update(base, state, update_of(update, base, store), Recipe(Average()), store)
        assert list(store.refs("state")) == [state]

    def test_task_arithmetic_by_hand(self, store: ArtifactStore, base: CheckpointRef) -> None:
        state = None
        for seed in (1, 2, 3):
            state = fold_update(
                base, state, update_of(random_tensors(seed), base, store), Recipe(TaskArithmetic()), store
            )
        assert state is not None
        for name, tensor in tensors(materialize(base, state, store), store).items():
            total = sum(random_tensors(seed)[name] for seed in (1, 2, 3))
            torch.testing.assert_close(tensor, random_tensors(0)[name] + 0.3 * total)


def chain(folder: Path, merger: AnyMerger, store: ArtifactStore) -> tuple[list[UpdateRef], list[StateRef], str]:
    """A line of three tuned models, or as many as the merger takes, from folders to the merged checkpoint."""
    model = tiny_model("LlamaForCausalLM")
    base = ingested(model, folder / "base", store)
    updates, states = [], []
    for seed in (1, 2, 3)[: merger.limit if isinstance(merger, Joint) else None]:
        tuned = ingested(perturbed(model, seed), folder / str(seed), store)
        updates.append(compress_update(extract_update(base, tuned, Extract(), store), Ternary(), store))
        states.append(fold_update(base, states[-1] if states else None, updates[-1], Recipe(merger), store))
    return updates, states, materialize(base, states[-1], store)


@pytest.mark.parametrize("merger", [kind() for kind in MERGERS.values()], ids=MERGERS)
def test_the_same_chain_in_two_stores_has_the_same_refs(merger: AnyMerger, tmp_path: Path) -> None:
    one, two = memory_store(), memory_store()
    assert chain(tmp_path / "here", merger, one) == chain(tmp_path / "there", merger, two)
    assert list(one.refs()) == list(two.refs())


def test_encoding_is_independent_of_the_order_of_parts() -> None:
    parts = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int32), "c": torch.ones(1, dtype=torch.uint8)}
    assert encode_parts(parts) == encode_parts(dict(reversed(parts.items())))
