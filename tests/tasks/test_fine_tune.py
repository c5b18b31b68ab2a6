"""Training: the same bytes every time, whatever runs beside it, and only what the tuner names changes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, leading
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import decode_record, read_tensor
from tasks.tuners import Full, Lora

SUITE = ImageClassification(data=Digits(view="rot90", limit=128), head=Orthonormal())
LORA = Lora(rank=4, dropout=0.3, steps=6, batch=16, learning_rate=2e-3)


class Task:
    name = "rot90"
    suite = SUITE


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(DigitsBase(width=32, steps=10), store)


def test_equal_inputs_give_equal_refs(store: ArtifactStore, base: CheckpointRef) -> None:
    first = fine_tune(base, "rot90", SUITE, LORA, store)
    assert fine_tune(base, "rot90", SUITE, LORA, store) == first
    assert fine_tune(base, "rot90", SUITE, replace(LORA, seed=1), store) != first
    assert train_digits_base(DigitsBase(width=32, steps=10), store) == base


def test_other_threads_do_not_change_a_training(store: ArtifactStore, base: CheckpointRef) -> None:
    """Evaluations load models and iterate over data; neither may touch the dropout or LoRA's initial weights."""
    alone = fine_tune(base, "rot90", SUITE, LORA, store)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            evaluate(base, [Task()], store)

    threads = [threading.Thread(target=disturb) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        disturbed = [fine_tune(base, "rot90", SUITE, LORA, store) for _ in range(3)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert disturbed == [alone] * 3


@pytest.mark.parametrize("weights", ["all", "linear"])
def test_full_changes_what_it_names(store: ArtifactStore, base: CheckpointRef, weights: str) -> None:
    tuner = Full(weights=weights, steps=4, batch=16)  # type: ignore[arg-type]
    before, after = store.open(base), store.open(fine_tune(base, "rot90", SUITE, tuner, store))
    changed = {name for name in before.names if before.record(name).blob != after.record(name).blob}
    linear = {record.name for record in before.manifest.tensors if record.role == "linear.weight"}
    used = {name for name in before.names if not name.startswith("pooler.")}  # the head looks at the class token
    # adding one number to all keys changes no attention weight: their bias has no gradient but rounding
    still = {name for name in used if name.endswith("k_proj.bias")}
    expected = linear & used if weights == "linear" else used
    assert changed <= expected
    assert expected - changed <= still


def test_lora_stores_factors_on_the_bases_blobs(store: ArtifactStore, base: CheckpointRef) -> None:
    before, after = store.open(base), store.open(fine_tune(base, "rot90", SUITE, LORA, store))
    for record in after.manifest.tensors:
        if record.rank is None:
            assert record.blob == before.record(record.name).blob
        else:
            assert record.rank == 4
            assert record.onto == before.record(record.name).blob


def test_lora_on_a_lora_tuned_model(store: ArtifactStore, base: CheckpointRef) -> None:
    """The second adapter is stated against what the first one made of the base, not against the first one's blob."""
    first = fine_tune(base, "rot90", SUITE, LORA, store)
    second = fine_tune(first, "rot90", SUITE, replace(LORA, seed=1), store)
    before, after = store.open(first), store.open(second)
    update = store.open(extract_update(first, second, Extract(), store))
    name = "layers.0.mlp.fc1.weight"
    assert after.record(name).rank is None
    delta = decode_record(update.record(name), update.parts(name))
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 4
    torch.testing.assert_close(read_tensor(before, name) + delta, read_tensor(after, name))


def test_training_learns(store: ArtifactStore) -> None:
    base = train_digits_base(DigitsBase(width=48, steps=200), store)
    tuned = fine_tune(base, "rot90", replace(SUITE, data=Digits(view="rot90")), Full(steps=60), store)

    class Whole:
        name = "rot90"
        suite = replace(SUITE, data=Digits(view="rot90"))

    accuracy = [leading(store.open(evaluate(model, [Whole()], store)))["rot90"] for model in (base, tuned)]
    assert accuracy[0] < 0.35
    assert accuracy[1] > 0.75


def test_a_diverged_training_is_refused(store: ArtifactStore, base: CheckpointRef) -> None:
    refs = set(store.refs())
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        fine_tune(base, "rot90", SUITE, Full(steps=8, batch=16, learning_rate=1e30, clip=1e30), store)
    assert set(store.refs()) == refs


def test_progress_and_losses_come_out(store: ArtifactStore, base: CheckpointRef) -> None:
    seen: list[tuple[int, int]] = []
    tuned = fine_tune(base, "rot90", SUITE, LORA, store, report=lambda done, total, note: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(1, 7)]
    assert store.open(tuned).asset("training.json").count(b"loss") == 6
