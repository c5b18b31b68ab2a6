"""Benchmark: what codecs cost in quality. The digits' six updates, written by every codec in several settings.

`single` is the base plus one task's decoded update, on that task; `merged` all six merged one by one, on all tasks.
Every task's model is evaluated on the test split. Bytes are those of the files, headers included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.chain import load_chain
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.refs import CheckpointRef, UpdateRef
from tasks.codecs import CODECS, Codec
from tasks.compress import compress_update
from tasks.evaluate import evaluate, leading
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, TaskArithmetic
from tasks.recipe import Recipe
from tests.benchmarks.quality import Trained, train

SETTINGS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "dense": [{}],
    "exact": [{}],
    "ternary": [
        {"density": density, "alpha": alpha} for alpha in ("projection", "norm") for density in (0.05, 0.1, 0.2, 0.5)
    ],
    "bitdelta": [{"scale": "matrix"}, {"scale": "row"}],
    "rtn": [{"bits": bits} for bits in (2, 3, 4, 8)],
    "low_rank": [{"energy": energy} for energy in (0.5, 0.7, 0.9, 0.99)],
    "skillpack": [{}],
    "dare": [{"density": density} for density in (0.1, 0.5)],
    "auto": [{"error": error} for error in (0.6, 0.3, 0.1)],
}
RECIPES = {
    "tsv_m": Recipe(MERGERS["tsv_m"]()),
    "task_arithmetic": Recipe(MERGERS["task_arithmetic"]()),
    "average": Recipe(MERGERS["average"]()),
}


@dataclass(frozen=True)
class Quality:
    """A codec in one setting: means over the tasks, and over the seeds. Accuracies are shares in [0, 1].

    ratio: of the tensors in bfloat16 to the files; bytes: of the files of one task's update
    """

    codec: str
    setting: str
    seeds: int
    ratio: float
    bytes: int
    single: float
    tsv_m: float
    task_arithmetic: float
    average: float


def settings() -> dict[tuple[str, str], Codec]:
    """Every codec of the table in the settings above: (name, setting in words) -> codec."""
    forgotten = set(CODECS) - set(SETTINGS)
    if forgotten:
        raise KeyError(f"the benchmark has no settings for {', '.join(sorted(forgotten))}")
    return {
        (name, ", ".join(f"{key} {value}" for key, value in one.items())): CODECS[name](**one)
        for name, several in SETTINGS.items()
        if name in CODECS
        for one in several
    }


def measure(folder: Path, seeds: Sequence[int], say: Callable[[str], None] = lambda words: None) -> list[Quality]:
    store = ArtifactStore(DirectoryObjects(folder))
    found: dict[tuple[str, str], list[Quality]] = {}
    for seed in seeds:
        say(f"training, seed {seed}")
        trained = train(seed, store)
        for (name, setting), codec in settings().items():
            say(f"{name} {setting}, seed {seed}")
            found.setdefault((name, setting), []).append(_of_codec(name, setting, codec, trained, store))
    return [_mean(rows) for rows in found.values()]


def _of_codec(name: str, setting: str, codec: Codec, trained: Trained, store: ArtifactStore) -> Quality:
    updates = {task: compress_update(exact, codec, store) for task, exact in trained.exact.items()}
    facts = [store.open(update).manifest.facts for update in updates.values()]
    files, plain = (sum(int(one[key]) for one in facts) for key in ("file_bytes", "bf16_bytes"))
    merged = {name: _merged(recipe, trained.base, updates, store) for name, recipe in RECIPES.items()}
    return Quality(
        name, setting, 1, plain / files, files // len(facts), _single(trained.base, updates, store), **merged
    )


def _single(base: CheckpointRef, updates: Mapping[str, UpdateRef], store: ArtifactStore) -> float:
    alone = Recipe(TaskArithmetic(scale=1.0))
    return statistics.fmean(_scores(alone, base, [update], [task], store) for task, update in updates.items())


def _merged(recipe: Recipe, base: CheckpointRef, updates: Mapping[str, UpdateRef], store: ArtifactStore) -> float:
    return _scores(recipe, base, list(updates.values()), list(updates), store)


def _scores(
    recipe: Recipe, base: CheckpointRef, updates: Sequence[UpdateRef], names: Sequence[str], store: ArtifactStore
) -> float:
    """Mean accuracy of the updates' merge on the named tasks."""
    tasks = [task for task in load_chain("demo").tasks if task.name in names]
    state = None
    for update in updates:
        state = fold_update(base, state, update, recipe, store)
    assert state is not None
    model = materialize(base, state, store)
    return statistics.fmean(leading(store.open(evaluate(model, tasks, store, base=base))).values())


def _mean(rows: Sequence[Quality]) -> Quality:
    def mean(key: str) -> float:
        return statistics.fmean(getattr(row, key) for row in rows)

    accuracies = {key: mean(key) for key in ("single", *RECIPES)}
    return Quality(rows[0].codec, rows[0].setting, len(rows), mean("ratio"), round(mean("bytes")), **accuracies)


def by_codec(rows: Sequence[Quality]) -> Iterator[tuple[str, list[Quality]]]:
    """The rows of each codec, smallest files first."""
    for name in dict.fromkeys(row.codec for row in rows):
        yield name, sorted((row for row in rows if row.codec == name), key=lambda row: -row.ratio)
