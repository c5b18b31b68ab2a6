"""Evaluations put together of suites that were asked before: the same bytes, and nothing asked twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.measured import Measured
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, ScoresRef
from storage.tables import write_rows
from tasks.checkpoints import load_model
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import OUTCOMES, TABLE, evaluate
from tasks.suites import AnySuite, ImageClassification
from tasks.suites.heads import Orthonormal


@dataclass(frozen=True)
class Watched:
    """A task whose suite notes when it is asked, and may be killed then."""

    name: str
    real: ImageClassification
    asked: list[str] = field(default_factory=list)
    killed: bool = False

    @property
    def suite(self) -> AnySuite:
        return self  # type: ignore[return-value]

    def spec(self) -> dict[str, Any]:
        return self.real.spec()

    def fingerprint(self) -> str:
        return self.real.fingerprint()

    def open(self, base: Any) -> Any:
        self.asked.append(self.name)
        if self.killed:
            raise KeyboardInterrupt
        return self.real.open(base)


def suite(index: int, **changes: Any) -> ImageClassification:
    return ImageClassification(Digits(view="rot90", limit=40), Orthonormal(index=index), **changes)


@pytest.fixture(scope="module")
def base() -> tuple[CheckpointRef, dict[str, bytes]]:
    store = ArtifactStore(MemoryObjects())
    found = train_digits_base(DigitsBase(width=16, steps=20), store)
    return found, {key: store.objects.get(key) for key in store.objects.list("")}


@pytest.fixture
def model(base: tuple[CheckpointRef, dict[str, bytes]]) -> CheckpointRef:
    return base[0]


@pytest.fixture
def new(base: tuple[CheckpointRef, dict[str, bytes]]) -> Callable[[], ArtifactStore]:
    """Stores that hold the model, and nothing else."""

    def made() -> ArtifactStore:
        store = ArtifactStore(MemoryObjects())
        for key, data in base[1].items():
            store.objects.put(key, data)
        return store

    return made


@pytest.fixture
def asked() -> list[str]:
    return []


def by_hand(model: CheckpointRef, tasks: list[Watched], store: ArtifactStore) -> ScoresRef:
    """What an evaluation writes, without any room in between."""
    artifact = store.open(model, "checkpoint")
    rows, outcomes = [], []
    for task in tasks:
        for one in task.real.open(artifact).score(load_model(artifact), "cpu", lambda done, total: None):
            named = {name: value for name, value in one.__dict__.items() if name != "outcomes"}
            rows.append({"task": task.name, **named})
            outcomes += [{"task": task.name, "metric": one.metric, "outcome": value} for value in one.outcomes]
    spec = {"tasks": {task.name: {"suite": task.spec(), "data": task.fingerprint()} for task in tasks}}
    draft = store.draft("scores", Lineage("evaluate", {"model": model}, spec))
    draft.add_asset(TABLE, write_rows(rows))
    draft.add_asset(OUTCOMES, write_rows(outcomes))
    return ScoresRef(draft.commit())


def test_an_evaluation_that_was_killed_asks_only_the_rest(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str]
) -> None:
    store, tasks = new(), [Watched(name, suite(index), asked) for index, name in enumerate("abc")]
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [*tasks[:2], replace(tasks[2], killed=True)], store)
    assert not list(store.refs("scores"))
    asked.clear()
    found = evaluate(model, tasks, store)
    assert asked == ["c"]
    assert found == by_hand(model, tasks, new()) == evaluate(model, tasks, new()), "not a byte is different"


def test_in_another_list_or_under_another_name_nothing_is_asked_again(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str]
) -> None:
    store, (a, b, c) = new(), (Watched(name, suite(index), asked) for index, name in enumerate("abc"))
    evaluate(model, [a, b], store)
    asked.clear()
    other = [b, replace(a, name="renamed"), c]
    found = evaluate(model, other, store)
    assert asked == ["c"]
    assert found == by_hand(model, other, new())
    asked.clear()
    assert evaluate(model, [c, a], store) == by_hand(model, [c, a], new())
    assert not asked


@pytest.mark.parametrize(
    "changed",
    [
        suite(1),
        suite(0, batch=7),
        replace(suite(0), data=Digits(view="rot90", limit=39)),
        replace(suite(0), data=Digits(view="rot180", limit=40)),
    ],
)
def test_a_suite_that_is_changed_is_asked_again(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str], changed: ImageClassification
) -> None:
    store = new()
    evaluate(model, [Watched("a", suite(0), asked)], store)
    task = Watched("a", changed, asked)
    assert evaluate(model, [task], store) == by_hand(model, [task], new())
    assert asked == ["a", "a"]


def test_other_data_under_the_same_settings_are_asked_again(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str]
) -> None:
    class Changed(Watched):
        def fingerprint(self) -> str:
            return "0" * 64

    store = new()
    evaluate(model, [Watched("a", suite(0), asked)], store)
    evaluate(model, [Changed("a", suite(0), asked)], store)
    assert asked == ["a", "a"]


def test_another_model_or_base_is_asked_again(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str]
) -> None:
    store, task = new(), Watched("a", suite(0), asked)
    other = train_digits_base(DigitsBase(width=16, steps=2, seed=1), store)
    for one, base in ((model, None), (model, model), (model, other), (other, model), (other, other)):
        evaluate(one, [task], store, base=base)
    assert len(asked) == 4, "a model that lends its own tokenizer is one that nobody lends any"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"scores": []},
        {"scores": [{"metric": "accuracy"}]},
        {"scores": [{"metric": "accuracy", "value": "much", "samples": 1, "low": 0, "high": 1, "outcomes": []}]},
        {"scores": [{"metric": "\x1b[2J", "value": 1, "samples": 1, "low": 0, "high": 1, "outcomes": []}]},
        {"scores": [{"metric": "accuracy", "value": 1, "samples": -1, "low": 0, "high": 1, "outcomes": []}]},
        {"scores": [{"metric": "accuracy", "value": 1, "samples": 1, "low": 0, "high": 1, "outcomes": 5}]},
        {"scores": [{"metric": "accuracy", "value": 1, "samples": 1, "low": 0, "high": 1, "more": 5}]},
    ],
)
def test_what_is_no_score_is_measured_again(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str], entry: Any
) -> None:
    store, task = new(), Watched("a", suite(0), asked)
    found = evaluate(model, [task], store)
    (key,) = store.objects.list("measured/")
    Measured(store.objects).write(model, key.rpartition("/")[2], entry)
    assert evaluate(model, [task], store) == found
    assert asked == ["a", "a"]
    store.objects.put(key, store.objects.get(key)[:-1])
    assert evaluate(model, [task], store) == found
    assert asked == ["a", "a", "a"]
    assert evaluate(model, [task], store) == found
    assert asked == ["a", "a", "a"], "what was measured again is kept again"


def test_nothing_is_loaded_where_nothing_is_asked(
    model: CheckpointRef, new: Callable[[], ArtifactStore], asked: list[str]
) -> None:
    store, task = new(), Watched("a", suite(0), asked)
    found = evaluate(model, [task], store)
    (blob, *_) = (one.blob for one in store.open(model).manifest.tensors)
    store.objects.delete(f"blob/{blob}")
    assert evaluate(model, [task], store) == found
