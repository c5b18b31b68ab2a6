"""Which of a codec's trials is best is seen on examples of the task, and nothing of what was tried is kept."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from configs.chain import Task
from storage.artifacts import ArtifactStore
from storage.refs import CheckpointRef, UpdateRef
from storage.tables import read_rows
from tasks.codec_search import SAMPLES, choose_codec
from tasks.codecs import Ternary, Trial
from tasks.compress import compress_update
from tasks.data.digits import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tuners import Full
from tests.builders import memory_store


class Tuned(NamedTuple):
    store: ArtifactStore
    base: CheckpointRef
    update: UpdateRef
    task: Task


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    store = memory_store()
    base = train_digits_base(DigitsBase(width=32, steps=60), store)
    task = Task("rot90", ImageClassification(data=Digits(view="rot90"), head=Orthonormal(index=0)))
    model = fine_tune(base, task.name, task.suite, Full(weights="all", steps=60, learning_rate=2e-3), store)
    return Tuned(store, base, extract_update(base, model, Extract(), store), task)


def test_the_grid_takes_the_best_score(tuned: Tuned) -> None:
    store, _, update, task = tuned
    codec = Ternary(density=0.02, alpha="grid")
    before = set(store.objects.list(""))
    found = store.open(choose_codec(update, codec, task, store))
    facts, rows = found.manifest.facts, read_rows(found.asset("scores.parquet"))
    assert len(rows) == len(codec.trials()) == len(facts["tried"])
    scores = [row["score"] for row in rows]
    assert scores.index(max(scores)) == facts["trial"]
    assert min(scores) < max(scores) - 0.1, "the size of the kept entries matters, or nothing was tried"
    assert facts["exact"] > max(scores) - 0.1
    assert found.manifest.lineage.spec["samples"] == SAMPLES
    added = set(store.objects.list("")) - before
    assert {key.partition("/")[0] for key in added} == {"blob", "scores"} and len(added) == 2
    settled = codec.trials()[facts["trial"]]
    assert store.open(compress_update(update, settled, store)).manifest.lineage.spec["alpha"] == settled.alpha


def test_the_rules() -> None:
    tried = [Trial(10, 0.5), Trial(20, 0.9), Trial(30, 0.9)]
    assert Ternary(alpha="grid").best(0.95, tried) == 1
