"""The search for a factor: on training examples alone, nothing kept of what was tried, the best one found."""

from __future__ import annotations

import pytest
import torch

from configs.chain import Task
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.refs import CheckpointRef, StateRef
from storage.tables import read_rows
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, leading
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average, TaskArithmetic
from tasks.recipe import Recipe
from tasks.search import Search, choose_factor
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_tensor
from tasks.tuners import Full
from tests.builders import memory_store

Grown = tuple[ArtifactStore, CheckpointRef, StateRef, list[Task]]


@pytest.fixture(scope="module")
def grown() -> Grown:
    """One task that was learned well, merged a hundred times too small."""
    store = memory_store()
    base = train_digits_base(DigitsBase(width=32, steps=60), store)
    task = Task("rot90", ImageClassification(data=Digits(view="rot90"), head=Orthonormal(index=0)))
    tuned = fine_tune(base, task.name, task.suite, Full(weights="all", steps=60, learning_rate=2e-3), store)
    update = extract_update(base, tuned, Extract(), store)
    return store, base, fold_update(base, None, update, Recipe(TaskArithmetic(scale=0.01)), store), [task]


def test_the_best_factor_is_found_and_the_table_says_why(grown: Grown) -> None:
    store, base, state, tasks = grown
    spec = Search(factors=(1.0, 100.0, 3000.0), samples=200)
    found = store.open(choose_factor(base, state, tasks, spec, store))
    assert found.manifest.facts["factor"] == 100.0
    rows = read_rows(found.asset("scores.parquet"))
    assert [(row["factor"], row["task"], row["samples"]) for row in rows] == [
        (factor, "rot90", 200) for factor in spec.factors
    ]
    assert max(rows, key=lambda row: row["value"])["factor"] == 100.0
    assert found.manifest.facts["means"]["100.0"] > 0.5 > found.manifest.facts["means"]["1.0"]


def test_what_was_tried_is_not_kept(grown: Grown) -> None:
    store, base, state, tasks = grown
    before = set(store.objects.list(""))
    ref = choose_factor(base, state, tasks, Search(factors=(2.0, 4.0), samples=20), store)
    added = set(store.objects.list("")) - before
    assert added == {ref, *(f"blob/{blob}" for blob in store.open(ref).manifest.blobs())}


def test_the_search_sees_no_test_example(grown: Grown, monkeypatch: pytest.MonkeyPatch) -> None:
    store, base, state, tasks = grown
    asked = []
    rows = Digits.rows
    monkeypatch.setattr(Digits, "rows", lambda self, split: asked.append(split) or rows(self, split))  # type: ignore[func-returns-value]
    choose_factor(base, state, tasks, Search(factors=(1.0,), samples=20), store)
    assert asked == ["train"]


def test_a_factor_is_written_into_model_and_lineage(grown: Grown) -> None:
    store, base, state, tasks = grown
    plain, large = (store.open(materialize(base, state, store, factor=factor)) for factor in (1.0, 100.0))
    assert dict(plain.manifest.lineage.spec) == {}
    assert dict(large.manifest.lineage.spec) == {"factor": 100.0}
    before = store.open(base)
    for name in before.names:
        small, much = (read_tensor(one, name) - read_tensor(before, name) for one in (plain, large))
        torch.testing.assert_close(much, 100 * small, rtol=1e-2, atol=1e-5)
    scores = leading(store.open(evaluate(CheckpointRef(large.ref), tasks, store)))
    assert scores["rot90"] > 0.5


def test_equal_factors_and_equal_means_take_the_first(grown: Grown) -> None:
    """A base that cannot be changed scores the same with every factor."""
    store, base, _, tasks = grown
    nothing = extract_update(base, base, Extract(), store)
    state = fold_update(base, None, nothing, Recipe(Average()), store)
    found = store.open(choose_factor(base, state, tasks, Search(factors=(3.0, 1.0), samples=50), store))
    assert found.manifest.facts["factor"] == 3.0


@pytest.mark.parametrize(
    ("field", "value"), [("factors", ()), ("factors", (0.0,)), ("factors", (-1.0,)), ("samples", 0)]
)
def test_invalid_settings(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=field):
        Search(**{field: value})  # type: ignore[arg-type]
