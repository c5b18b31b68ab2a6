"""Settings of a training: what they change, what they do not, and what a device cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.settings import Settings
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import HISTORY, load_model
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.fine_tune import fine_tune
from tasks.suites import ImageClassification
from tasks.suites.base import batches
from tasks.suites.heads import LabelText, Orthonormal
from tasks.tensors import read_tensor
from tasks.tuners import Full, Lora

SUITE = ImageClassification(data=Digits(view="rot90", holdout=0.3, limit=160), head=Orthonormal())
TUNER = Full(weights="all", steps=12, batch=16, learning_rate=2e-3)


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(DigitsBase(width=32, steps=10), store)


def history(store: ArtifactStore, ref: CheckpointRef) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(store.open(ref).asset(HISTORY))
    return found


def same_weights(store: ArtifactStore, *refs: CheckpointRef) -> bool:
    first, *others = (store.open(ref) for ref in refs)
    return all(torch.equal(read_tensor(first, n), read_tensor(other, n)) for other in others for n in first.names)


@pytest.mark.parametrize("tuner", [TUNER, Lora(rank=4, dropout=0.3, steps=8, batch=16)], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_bytes(store: ArtifactStore, base: CheckpointRef, tuner: Any) -> None:
    seen: list[int] = []
    plain = fine_tune(base, "rot90", SUITE, tuner, store)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: seen.append(one.nbytes) or one, lambda one: one):  # type: ignore[func-returns-value]
        fine_tune(base, "rot90", SUITE, tuner, store)
        kept = sum(seen)
        seen.clear()
        assert fine_tune(base, "rot90", SUITE, replace(tuner, gradient_checkpointing=True), store) == plain
    assert sum(seen) < kept  # and keeps less for the way back


def test_half_precision_trains_about_the_same(store: ArtifactStore, base: CheckpointRef) -> None:
    full, half = (
        fine_tune(base, "rot90", SUITE, replace(TUNER, precision=precision), store)
        for precision in ("float32", "bfloat16")
    )
    assert not same_weights(store, full, half)
    assert {record.dtype for record in store.open(half).manifest.tensors} == {"F32"}  # the masters
    losses = [history(store, ref)[-1]["loss"] for ref in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # bfloat16 has three digits


def test_accumulation_is_a_larger_batch(store: ArtifactStore, base: CheckpointRef) -> None:
    whole, parts = (
        fine_tune(base, "rot90", SUITE, replace(TUNER, steps=4, batch=batch, accumulate=16 // batch), store)
        for batch in (16, 4)
    )
    first, second = store.open(whole), store.open(parts)
    for name in first.names:
        # the same examples in the same order; sums in another. Adam divides by the gradient's size, so that rounding
        # of a gradient near zero may move a weight by up to the learning rate a step
        torch.testing.assert_close(read_tensor(first, name), read_tensor(second, name), rtol=0, atol=4e-3)
    for one, other in zip(history(store, whole), history(store, parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_validation_changes_no_step_and_keeps_the_best(store: ArtifactStore, base: CheckpointRef) -> None:
    hot = replace(TUNER, learning_rate=3e-2, steps=30)  # it learns, then leaps about
    plain = fine_tune(base, "rot90", SUITE, hot, store)
    measured = fine_tune(base, "rot90", SUITE, replace(hot, validate_every=1), store)
    losses = {point["step"]: point["loss"] for point in history(store, measured) if "loss" in point}
    assert losses == {point["step"]: point["loss"] for point in history(store, plain)}
    curve = {point["step"]: point["validation_loss"] for point in history(store, measured)}
    facts = store.open(measured).manifest.facts
    assert len(curve) == 30
    assert facts["best_step"] == min(curve, key=lambda step: curve[step]) < 30
    # the weights that are kept are those that were measured: the loss is computed again, in one batch each
    problem = SUITE.open(store.open(base))
    model = problem.wrap(load_model(store.open(measured))).eval()
    rows = problem.rows("validation")
    with torch.no_grad():
        again = [float(model(**batch)["loss"]) for batch in batches(rows, 1, problem.collate)]
    assert sum(again) / len(again) == pytest.approx(facts["best_validation_loss"], rel=1e-5)


def test_a_training_without_progress_ends_early(store: ArtifactStore, base: CheckpointRef) -> None:
    hot = replace(TUNER, learning_rate=3e-2, steps=200, validate_every=2, patience=3)
    steps: list[int] = []
    ref = fine_tune(base, "rot90", SUITE, hot, store, report=lambda done, total, note: steps.append(done))
    best = store.open(ref).manifest.facts["best_step"]
    assert steps[-1] == best + 2 * 3 < 200


def test_what_does_not_change_a_result_is_not_in_its_lineage(store: ArtifactStore, base: CheckpointRef) -> None:
    assert TUNER.spec() == replace(TUNER, save_every=7, gradient_checkpointing=True).spec()
    assert {"save_every", "validate_every", "patience", "gradient_checkpointing"}.isdisjoint(TUNER.spec())
    assert replace(TUNER, validate_every=5).spec()["validate_every"] == 5


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidInput, match="patience must be 0, because validate_every is 0, found 2"):
        Full(patience=2)
    with pytest.raises(InvalidInput, match="save_every must be 0 or more"):
        Full(save_every=-1)


# -- What cannot be done is said before anything is loaded


def refused(store: ArtifactStore, base: CheckpointRef, message: str, device: str = "cpu", **changes: Any) -> None:
    before = list(store.objects.list(""))
    suite = changes.pop("suite", SUITE)
    with pytest.raises(InvalidInput, match=message):
        fine_tune(base, "rot90", suite, replace(TUNER, **changes), store, device, lambda done, total, note: 1 / 0)
    assert list(store.objects.list("")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(store: ArtifactStore, base: CheckpointRef, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(store, base, r"the device is 'cuda:0', but torch .* sees no GPU.*DELTAWORKS_DEVICE=cpu", "cuda:0")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cuda")
    with pytest.raises(InvalidInput, match="sees no GPU"):
        Settings.from_environment()


def test_float16_needs_a_gpu(store: ArtifactStore, base: CheckpointRef) -> None:
    refused(store, base, r"precision float16 needs a CUDA GPU.*Set precision to bfloat16", precision="float16")


def test_data_that_do_not_fit(store: ArtifactStore, base: CheckpointRef, tmp_path: Path) -> None:
    few = replace(SUITE, head=Orthonormal(classes=7))
    refused(store, base, r"labels of the train split, row \d+: expected 0 to 6, found [789]", suite=few)
    refused(store, base, "expected pixel_values, digit, found label, pixel_values", suite=replace(SUITE, label="digit"))
    bare = replace(SUITE, data=Digits(view="rot90"))
    refused(store, base, "the data have no validation split", suite=bare, validate_every=2)
    with pytest.raises(InvalidInput, match="needs the names of two classes"):
        replace(SUITE, head=LabelText()).open(store.open(base))
    problem = SUITE.open(store.open(base))
    with pytest.raises(Mismatch, match="0 to 9, found None"):
        problem.collate([{"pixel_values": torch.zeros(1, 8, 8), "label": None}])
