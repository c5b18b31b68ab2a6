"""Benchmark: how good the merged models are. Every merger on the digits, three seeds by three orders, every step.

python -m tests.benchmarks.quality          about ten minutes on two cores; trains 3 bases and 18 models
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from configs.chain import load_chain
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.refs import CheckpointRef, UpdateRef
from tasks.compress import compress_update
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import Summary, evaluate, leading, summarise
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS
from tasks.recipe import Recipe
from tasks.scalings import Lines, MatchNorm
from tasks.sparsifiers import Dare

SEEDS = (0, 1, 2)
ORDERS = (0, 1, 2)
RECIPES = {
    **{name: Recipe(kind()) for name, kind in MERGERS.items() if name not in ("slerp",)},
    "average + match_norm": Recipe(MERGERS["average"](), scaling=MatchNorm()),
    "ties + match_norm": Recipe(MERGERS["ties"](), scaling=MatchNorm()),
    "task_arithmetic + lines": Recipe(MERGERS["task_arithmetic"](scale=1.0), scaling=Lines()),
    "tsv_m + match_norm": Recipe(MERGERS["tsv_m"](), scaling=MatchNorm()),
    "iso_c + match_norm": Recipe(MERGERS["iso_c"](), scaling=MatchNorm()),
    "average + dare 0.5": Recipe(MERGERS["average"](), sparsify=Dare(density=0.5)),
}


@dataclass(frozen=True)
class Trained:
    """One seed's base and, per task, its own accuracy and its update: exact, and as the demo compresses it."""

    base: CheckpointRef
    alone: Mapping[str, float]
    exact: Mapping[str, UpdateRef]
    ternary: Mapping[str, UpdateRef]


@dataclass(frozen=True)
class Grown:
    """One line: merger, seed, order, and its summary after every step."""

    recipe: str
    updates: str
    seed: int
    order: tuple[str, ...]
    steps: list[Summary]


def train(seed: int, store: ArtifactStore) -> Trained:
    """The demo's base and tasks with another seed."""
    config = load_chain("demo")
    assert isinstance(config.base, DigitsBase)
    base = train_digits_base(replace(config.base, seed=seed), store)
    alone, exact, ternary = {}, {}, {}
    for task in config.tasks:
        tuned = fine_tune(base, task.name, task.suite, replace(config.tuner, seed=seed), store)
        alone[task.name] = leading(store.open(evaluate(tuned, [task], store)))[task.name]
        exact[task.name] = extract_update(base, tuned, Extract(), store)
        ternary[task.name] = compress_update(exact[task.name], config.codec, store)
    return Trained(base, alone, exact, ternary)


def order_of(number: int, names: list[str]) -> tuple[str, ...]:
    """The first order is that of the demo, the others are drawn."""
    if number:
        random.Random(number).shuffle(names)
    return tuple(names)


def grow(name: str, kind: str, seed: int, number: int, trained: Trained, store: ArtifactStore) -> Grown:
    suites = {task.name: task for task in load_chain("demo").tasks}
    order = order_of(number, list(suites))
    updates = trained.exact if kind == "exact" else trained.ternary
    state, matrix, steps = None, [], []
    for step, task in enumerate(order, 1):
        state = fold_update(trained.base, state, updates[task], RECIPES[name], store)
        model = materialize(trained.base, state, store)
        seen = [suites[one] for one in order[:step]]
        matrix.append(leading(store.open(evaluate(model, seen, store, base=trained.base))))
        steps.append(summarise(matrix, trained.alone))
    return Grown(name, kind, seed, order, steps)


def measure(folder: Path, console: Console) -> list[Grown]:
    """All lines, from exact updates; the demo's own order and seed also from its ternary ones."""
    store = ArtifactStore(DirectoryObjects(folder))
    trained = {seed: train(seed, store) for seed in track(SEEDS, "training", console=console)}
    jobs = [(name, "exact", seed, number) for name in RECIPES for seed in SEEDS for number in ORDERS]
    jobs += [(name, "ternary", 0, 0) for name in RECIPES]
    return [grow(*job, trained[job[2]], store) for job in track(jobs, "merging", console=console)]


def overview(grown: list[Grown]) -> list[dict[str, float | str]]:
    """One row per recipe, best first: means over seeds and orders, and the spread of the average, in percent."""
    found = []
    for name in RECIPES:
        lines = [one for one in grown if one.recipe == name and one.updates == "exact"]
        last = [line.steps[-1] for line in lines]
        averages = [100 * one.average for one in last]
        compressed = [100 * one.steps[-1].average for one in grown if one.recipe == name and one.updates == "ternary"]
        found.append(
            {
                "merger": name,
                "average": statistics.fmean(averages),
                "spread": statistics.stdev(averages),
                "worst": 100 * statistics.fmean(one.worst for one in last),
                "forgetting": 100 * statistics.fmean(one.forgetting or 0.0 for one in last),
                "ternary": compressed[0],
                **{
                    f"step {step}": 100 * statistics.fmean(line.steps[step - 1].average for line in lines)
                    for step in range(1, 7)
                },
            }
        )
    return sorted(found, key=lambda row: -float(row["average"]))


def main(target: Path) -> None:
    from tempfile import TemporaryDirectory

    torch.set_num_threads(1)
    console = Console()
    with TemporaryDirectory() as folder:
        table = overview(measure(Path(folder), console))
    target.write_text(json.dumps(table, indent=1))
    for row in table:
        console.print(row)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quality.json"))
