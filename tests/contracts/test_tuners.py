"""The contract of tuners: what every tuner promises. The table drives it, so a new tuner is tested when listed.

Every tuner trains on the real digits; what is stored is what was trained, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from storage.artifacts import ArtifactStore
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import load_model, skeleton_of
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, leading
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune, train
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average
from tasks.recipe import Recipe
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_delta, read_tensor
from tasks.tuners import TUNERS

SUITE = ImageClassification(data=Digits(view="rot90", limit=128), head=Orthonormal())
SCHEDULE: dict[str, Any] = {"steps": 10, "batch": 16, "learning_rate": 5e-3}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "full": [{}, {"weights": "all"}],
    "lora": [
        {"rank": 4, "dropout": 0.2},
        {"rank": 4, "rslora": True, "ratio": 8.0},
        {"rank": 4, "dora": True},
        {"rank": 4, "targets": "all"},
    ],
    "adalora": [{"rank": 2, "initial": 4}, {"rank": 2, "initial": 4, "targets": "all"}],
    "randlora": [{"rank": 8}, {"rank": 8, "sparse": True}],
    "osf": [{}],
    "shira": [{"rank": 2}, {"rank": 2, "mask": "magnitude"}],
}
# a tuner that is not in SETTINGS is tried with its defaults
CASES = {
    f"{name} {' '.join(settings)}".strip(): kind(**{**SCHEDULE, **settings})
    for name, kind in TUNERS.items()
    for settings in SETTINGS.get(name, [{}])
}
EVERY = pytest.mark.parametrize("case", CASES)


class Task:
    name = "rot90"
    suite = SUITE


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(DigitsBase(width=32, steps=60), store)


@pytest.fixture(scope="module")
def tuned(store: ArtifactStore, base: CheckpointRef) -> dict[str, CheckpointRef]:
    """Each case trained once."""
    return {case: fine_tune(base, "rot90", SUITE, tuner, store) for case, tuner in CASES.items()}


def trained(case: str, base: CheckpointRef, store: ArtifactStore) -> PreTrainedModel:
    """The model in memory right after training, its adapters still beside the weights."""
    source = store.open(base)
    problem = SUITE.open(source)
    with torch.random.fork_rng():
        model = load_model(source, dtype=torch.float32)
        set_seed(CASES[case].seed)
        CASES[case].attach(model, skeleton_of(source))
        train(problem.wrap(model), problem, CASES[case], "cpu", lambda done, total, note: None)
    return model.eval()


def outputs(model: PreTrainedModel) -> Tensor:
    pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels).last_hidden_state
    return found


@EVERY
def test_what_is_stored_is_what_was_trained(
    case: str, store: ArtifactStore, base: CheckpointRef, tuned: dict[str, CheckpointRef]
) -> None:
    model = trained(case, base, store)
    before, after = outputs(load_model(store.open(base))), outputs(load_model(store.open(tuned[case])))
    assert (after - before).abs().max() > 0.05
    # a product added to the output, or to the weight first: two orders of float32 sums
    torch.testing.assert_close(after, outputs(model), rtol=0, atol=2e-5)


@EVERY
def test_what_does_not_learn_is_the_bases(
    case: str, store: ArtifactStore, base: CheckpointRef, tuned: dict[str, CheckpointRef]
) -> None:
    """What the tuner does not give back shares its blob with the base, and it gives back what it targets."""
    source, after = store.open(base), store.open(tuned[case])
    model = trained(case, base, store)
    given = dict(CASES[case].collect(model, skeleton_of(source)))
    assert set(given) <= set(source.names)
    for record in after.manifest.tensors:
        old = source.record(record.name)
        assert (record.shape, record.role) == (old.shape, old.role)
        if record.name not in given:
            assert record == old
    roles = {source.record(name).role for name in given}
    if getattr(CASES[case], "weights", "") != "all":
        assert roles <= {"linear.weight", "conv.weight"}
        assert ("conv.weight" in roles) == (getattr(CASES[case], "targets", "") == "all")
    assert len(given) >= 6  # of the two layers


@EVERY
def test_equal_seeds_give_equal_refs(
    case: str, store: ArtifactStore, base: CheckpointRef, tuned: dict[str, CheckpointRef]
) -> None:
    torch.manual_seed(len(case))  # whatever was drawn before
    assert fine_tune(base, "rot90", SUITE, CASES[case], store) == tuned[case]
    assert fine_tune(base, "rot90", SUITE, replace(CASES[case], seed=1), store) != tuned[case]


@EVERY
def test_its_update_is_tuned_minus_base_and_merges(
    case: str, store: ArtifactStore, base: CheckpointRef, tuned: dict[str, CheckpointRef]
) -> None:
    update = extract_update(base, tuned[case], Extract(), store)
    before, after, delta = store.open(base), store.open(tuned[case]), store.open(update)
    for name in before.names:
        change = read_tensor(after, name) - read_tensor(before, name)
        torch.testing.assert_close(read_delta(delta, name), change, rtol=0, atol=1e-6)
        assert delta.record(name).rank == after.record(name).rank
    state = fold_update(base, None, update, Recipe(Average()), store)
    merged = store.open(materialize(base, state, store))
    for name in before.names:
        torch.testing.assert_close(read_tensor(merged, name), read_tensor(after, name), rtol=0, atol=1e-6)


@EVERY
def test_factors_are_where_the_change_is_low_rank(
    case: str, store: ArtifactStore, base: CheckpointRef, tuned: dict[str, CheckpointRef]
) -> None:
    """Of no higher rank than the tuner says, and stated against the base's own blob."""
    source, after = store.open(base), store.open(tuned[case])
    low = CASES[case].name in ("lora", "adalora") and not getattr(CASES[case], "dora", False)
    most = getattr(CASES[case], "initial", getattr(CASES[case], "rank", 0))
    ranks = {record.name: record.rank for record in after.manifest.tensors if record.rank is not None}
    assert bool(ranks) == low
    for name, rank in ranks.items():
        assert rank <= most
        assert after.record(name).onto == source.record(name).blob
        delta = read_tensor(after, name).double() - read_tensor(source, name).double()
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= rank


@pytest.mark.parametrize("name", TUNERS)
def test_it_learns(name: str, store: ArtifactStore, base: CheckpointRef) -> None:
    """Some sixty steps at its own defaults are far from the base, which has never seen this head."""
    rate = {"full": 1e-3, "osf": 2e-3}.get(name, 5e-3)
    small = {"initial": 8, "rank": 4} if name == "adalora" else {}
    tuner = TUNERS[name](**{"steps": 60, "batch": 32, "learning_rate": rate, **small})

    class Whole:
        name = "rot90"
        suite = replace(SUITE, data=Digits(view="rot90"))

    after = fine_tune(base, "rot90", Whole.suite, tuner, store)
    accuracy = [leading(store.open(evaluate(model, [Whole()], store)))["rot90"] for model in (base, after)]
    assert accuracy[0] < 0.35
    assert accuracy[1] > 0.5
