"""Inspections of stored updates whose answers are known, and of what is half gone, odd or broken."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, Ref, UpdateRef
from tasks.codecs import CODECS, Codec, Dense, Exact, Ternary
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.inspect_update import inspect_update
from tasks.inspection.findings import Inspection
from tasks.parallel import Budget
from tasks.tensors import prefixed, read_delta
from tests.builders import checkpoint_of, memory_store, random_tensors, update_of
from tests.tasks.inspected import LAYERS, Case, case, noise, rl_case, weights
from tests.tasks.tuned_case import forget

GONE = CheckpointRef(Ref(f"checkpoint/{'0' * 64}"))


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


@pytest.fixture
def plain(store: ArtifactStore) -> Case:
    tensors = weights()
    return case(tensors, noise(tensors), store)


def measured(update: UpdateRef, store: ArtifactStore, *codecs: Codec, ranks_up_to: int = 2048) -> Inspection:
    return inspect_update(update, store, codecs=codecs, ranks_up_to=ranks_up_to)


def test_shares_norms_and_bits_of_small_steps(store: ArtifactStore) -> None:
    made, changed = rl_case(store, 0.1)
    found = measured(made.update, store)
    total = found.total
    assert found.by_bits and not found.lossy and not found.notes and not found.costs
    assert total.elements == sum(one.numel() for one in weights().values())
    assert total.changed == changed / total.elements
    base, tuned = store.open(made.base), store.open(made.tuned)
    deltas = {
        one.name: tuned.parts(one.name)["tensor"].double() - base.parts(one.name)["tensor"].double()
        for one in found.tensors
    }
    for one in found.tensors:
        size = deltas[one.name].abs()
        assert one.beyond == (int((size > 1e-8).sum()), int((size > 1e-5).sum()))
        assert one.moments.squares == pytest.approx(float(size.square().sum()), rel=1e-12)
        assert one.base_squares == pytest.approx(float(base.parts(one.name)["tensor"].double().square().sum()))
        share = one.changed / one.elements
        entropy = -sum(part * math.log2(part) for part in (share, 1 - share) if part)
        assert one.ternary_bits == pytest.approx(one.elements * (entropy + share), rel=1e-12)
        # one step up, one down or none: the exponent can only help
        assert one.step_bits is not None and one.step_bits <= one.ternary_bits
    assert total.norm == pytest.approx(math.sqrt(sum(float(one.square().sum()) for one in deltas.values())))
    assert total.beyond(1) < total.beyond(0) <= total.changed  # small weights take steps below 1e-5


def test_kinds_and_layers(store: ArtifactStore) -> None:
    made, _ = rl_case(store)
    found = measured(made.update, store)
    assert [(one.label, one.elements) for one in found.kinds] == [
        ("embedding", 80 * 64),
        ("attention", LAYERS * 64 * 64),
        ("mlp", LAYERS * 128 * 64),
        ("norm", LAYERS * 64),
    ]
    assert [one.label for one in found.layers] == ["0", "1", "2", "outside"]
    assert {one.name for one in found.layers[1].members} == {
        f"layers.1.{rest}.weight" for rest in ("self_attn.q_proj", "mlp.up", "norm")
    }
    assert found.layers[3].norm == found.kinds[0].norm
    assert found.kinds[3].changed == found.kinds[3].norm == found.kinds[3].relative == 0
    assert sum(one.norm**2 for one in found.layers) == pytest.approx(found.total.norm**2, rel=1e-12)


def test_stages_and_stacks_are_told_apart(store: ArtifactStore) -> None:
    names = ("stages.0.layers.0.fc", "stages.0.layers.1.fc", "stages.1.layers.0.fc")
    staged = measured(update_of({f"{name}.weight": torch.ones(2, 2) for name in names}, GONE, store), store)
    assert [one.label for one in staged.layers] == ["0.0", "0.1", "1.0"]
    names = ("decoder.layers.0.fc", "encoder.layers.0.fc", "encoder.layers.10.fc", "encoder.layers.9.fc")
    stacks = measured(update_of({f"{name}.weight": torch.ones(2, 2) for name in names}, GONE, store), store)
    assert [one.label for one in stacks.layers] == [
        "decoder.layers.0",
        "encoder.layers.0",
        "encoder.layers.9",
        "encoder.layers.10",
    ]


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_found(store: ArtifactStore, rank: int) -> None:
    """Of matrices of rank 3 with equal singular values, effective and stable rank are 3."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in (90, 60))
    found = measured(update_of({"fc.weight": left @ right.T}, GONE, store), store)
    ranks = found.tensors[0].ranks
    assert ranks is not None and (ranks.side, ranks.rank) == (60, rank)
    assert ranks.effective == pytest.approx(rank) and ranks.stable == pytest.approx(rank)


@pytest.mark.parametrize("name", CODECS)
def test_costs_are_those_of_files_and_the_error_is_what_is_lost(plain: Case, store: ArtifactStore, name: str) -> None:
    before = set(store.objects.list(""))
    cost = measured(plain.update, store, CODECS[name]()).costs[0]
    assert set(store.objects.list("")) == before, "nothing is kept"
    written, source = store.open(compress_update(plain.update, CODECS[name](), store)), store.open(plain.update)
    assert cost.bytes == sum({one.blob: one.bytes for one in written.manifest.tensors}.values())
    elements = sum(one.elements for one in source.manifest.tensors)
    assert cost.bits == pytest.approx(8 * cost.bytes / elements) and cost.ratio == pytest.approx(16 / cost.bits)
    lost = kept = 0.0
    for one in source.names:
        delta = read_delta(source, one).double()
        lost += float((read_delta(written, one).double() - delta).square().sum())
        kept += float(delta.square().sum())
    if name == "exact":  # tuned minus base in float32 is rounded, the tuned tensor is not
        assert cost.lossless and cost.error == 0
    else:
        assert cost.error == pytest.approx(math.sqrt(lost / kept), rel=1e-5)


def test_all_codecs_are_tried_unless_some_are_named(store: ArtifactStore) -> None:
    made, _ = rl_case(store)
    assert [one.codec for one in inspect_update(made.update, store).costs] == list(CODECS)
    assert [one.codec for one in measured(made.update, store, Exact(), Ternary()).costs] == ["exact", "ternary"]


def test_an_update_of_zeros(store: ArtifactStore) -> None:
    tensors = weights(torch.bfloat16)
    found = inspect_update(case(tensors, tensors, store).update, store)
    total = found.total
    assert (total.changed, total.norm, total.relative, total.moments.kurtosis, total.rank) == (0, 0, 0, None, None)
    assert total.ternary_bits == total.step_bits == 0
    assert all(one.error == 0 and one.bytes for one in found.costs)


def test_scalars_empty_tensors_and_integers(store: ArtifactStore) -> None:
    base = {"scale": torch.tensor(1.0), "none.weight": torch.zeros(0, 4), "ids": torch.arange(5), "x": torch.ones(1, 3)}
    found = inspect_update(case(base, {**base, "scale": torch.tensor(2.0)}, store).update, store)
    assert found.by_bits and found.total.elements == 9
    assert {one.name: one.changed for one in found.tensors} == {"scale": 1, "none.weight": 0, "ids": 0, "x": 0}
    assert not any(one.why for one in found.costs)
    nothing = inspect_update(
        case({"none.weight": torch.zeros(0, 4)}, {"none.weight": torch.zeros(0, 4)}, store).update, store
    )
    assert nothing.total.changed == 0 and nothing.total.ternary_bits is None and nothing.total.elements == 0


@pytest.mark.parametrize("gone", ["base", "tuned"])
def test_without_a_checkpoint_what_is_not_zero_counts(plain: Case, store: ArtifactStore, gone: str) -> None:
    forget(store, getattr(plain, gone))
    found = measured(plain.update, store, Exact(), Ternary())
    assert not found.by_bits and not found.lossy
    assert found.total.changed == pytest.approx(1, abs=0.001)
    assert (found.total.relative is None) == (gone == "base")
    exact, ternary = found.costs
    assert exact.bytes is None and f"the {gone} of" in exact.why and "no longer stored" in exact.why
    assert ternary.bytes and not ternary.why
    assert f"no {gone} checkpoint: {getattr(plain, gone)[:20]}" in found.notes[0]
    assert "bits could not be compared in 10 of 10 tensors" in found.notes[1]


def test_what_exact_wrote_brings_its_bits_along(store: ArtifactStore) -> None:
    made, changed = rl_case(store)
    small = compress_update(made.update, Exact(), store)
    wanted = measured(made.update, store)
    for ref in (made.base, made.tuned, made.update):
        forget(store, ref)
    found = measured(small, store)
    assert found.by_bits and not found.lossy and not found.notes
    assert found.tensors == wanted.tensors and found.total.changed == changed / found.total.elements


def test_what_a_codec_changed_before_is_no_base_for_exact(plain: Case, store: ArtifactStore) -> None:
    """Its delta is other than what lies between the checkpoints, however it is written afterwards."""
    ternary = compress_update(plain.update, Ternary(density=0.25), store)
    for update in (ternary, compress_update(ternary, Dense(), store)):
        found = measured(update, store, Exact(), Ternary(density=0.25))
        assert found.lossy and not found.by_bits
        assert found.total.changed == pytest.approx(0.25, abs=0.001)
        exact, again = found.costs
        assert exact.bytes is None and "lossy before" in exact.why
        assert again.error == pytest.approx(0, abs=1e-6)
        assert "10 of 10 tensors were changed by a codec before" in found.notes[0]
    assert plain.update[:19] in measured(ternary, store).notes[0]
    dense = compress_update(plain.update, Dense(), store)
    assert measured(dense, store).by_bits and not measured(dense, store).lossy


def test_factors_tell_their_ranks(store: ArtifactStore) -> None:
    generator = torch.Generator().manual_seed(0)
    draft = store.draft("update", Lineage("extract", {"base": GONE}))
    left, right = torch.randn(24, 2, generator=generator), torch.randn(2, 16, generator=generator)
    parts = prefixed({"tensor": right}, "A") | prefixed({"tensor": left}, "B")
    draft.add("fc1.weight", parts, role="linear.weight", dtype="F32", shape=(24, 16), rank=2)
    update = UpdateRef(draft.commit())
    found = measured(update, store, CODECS["low_rank"](), Ternary(), ranks_up_to=4)
    values = torch.linalg.svdvals(left.double() @ right.double())
    ranks = found.tensors[0].ranks
    assert ranks is not None and (ranks.side, ranks.rank) == (16, 2)
    assert ranks.stable == pytest.approx(float((values / values[0]).square().sum()))
    assert found.tensors[0].factors
    assert found.costs[0].error == 0 and (found.costs[1].error or 0) > 0.1


def test_other_dtypes_are_compared_by_number(store: ArtifactStore) -> None:
    tensors = weights(torch.bfloat16)
    wide = {name: one.float() for name, one in tensors.items()}
    wide["layers.0.norm.weight"] = wide["layers.0.norm.weight"] + 1e-6
    found = measured(case(tensors, wide, store).update, store)
    assert not found.by_bits and found.total.changed == 64 / found.total.elements
    assert found.total.step_bits is None


def test_large_matrices_have_no_ranks(plain: Case, store: ArtifactStore) -> None:
    found = measured(plain.update, store, ranks_up_to=63)
    assert all(one.ranks is None for one in found.tensors) and found.total.effective is None
    assert found.notes == ("no ranks of 7 matrices whose smaller side is above 63",)
    assert not measured(plain.update, store, ranks_up_to=64).notes


def test_heads_are_left_out(store: ArtifactStore) -> None:
    tensors = random_tensors(0)
    base = checkpoint_of(tensors, store)
    tuned = {name: one * 1.5 for name, one in tensors.items()} | {"classifier.weight": torch.ones(3, 8)}
    update = extract_update(base, checkpoint_of(tuned, store), Extract(heads="keep"), store)
    found = measured(update, store, Ternary())
    assert {one.name for one in found.tensors} == set(tensors) and found.by_bits
    assert found.notes == ("1 tensors of task heads are left out, and are kept by every codec as they are",)
    assert found.total.relative == pytest.approx(0.5)


def test_results_do_not_depend_on_workers_and_memory(plain: Case, store: ArtifactStore) -> None:
    seen: list[tuple[int, int]] = []
    codecs = (Ternary(), Exact())
    wanted = inspect_update(plain.update, store, codecs=codecs)
    found = inspect_update(
        plain.update,
        store,
        codecs=codecs,
        budget=Budget(4, 1),
        report=lambda done, total, _: seen.append((done, total)),
    )
    assert found == wanted
    assert seen == [(done, 30) for done in range(1, 31)]
    json.dumps(asdict(found), allow_nan=False)


def test_what_is_no_number_is_refused(store: ArtifactStore) -> None:
    broken = random_tensors(1) | {"layer.bias": torch.full((16,), float("nan"))}
    update = update_of(broken, checkpoint_of(random_tensors(0), store), store)
    with pytest.raises(InvalidInput, match=r"'layer.bias' of update/.*16 NaN"):
        inspect_update(update, store)


def test_tolerances_and_other_artifacts_are_checked(plain: Case, store: ArtifactStore) -> None:
    for bad in (-1.0, math.nan):
        with pytest.raises(InvalidInput, match="0 or more"):
            inspect_update(plain.update, store, codecs=(), tolerances=(1e-5, bad))
    with pytest.raises(Mismatch, match="expected a update"):
        inspect_update(UpdateRef(plain.base), store)
    assert inspect_update(plain.update, store, codecs=(), tolerances=(1e-3, 0, 1e-3)).tolerances == (0, 1e-3)
