"""The comparison: the same updates in every merger's hands, by several codecs, in several orders and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from prefect import flow

from configs.chain import Task
from configs.grid import Grid
from flows import steps
from flows.policy import run_now
from flows.trial import Trial, merged_in_turn
from flows.workplace import here
from storage.manifest import canonical, digest
from storage.refs import CheckpointRef, UpdateRef
from storage.registry import Stage
from tasks.evaluate import Summary, leading, summarise, with_abilities


@dataclass(frozen=True)
class Outcome:
    """One cell of the grid: where it stands, the model that it came to, and what that reaches. `bytes`: all updates."""

    merger: str
    codec: str
    order: tuple[str, ...]
    number: int  # of the order; 0 is the chain's own
    seed: int
    model: CheckpointRef
    summary: Summary
    bytes: int


@dataclass(frozen=True)
class Place:
    """A merger and a codec on the leaderboard: means over orders and seeds. `spread`: standard deviation of average."""

    merger: str
    codec: str
    runs: int
    average: float
    spread: float | None
    worst: float
    forgetting: float | None
    retained: float | None
    bytes: float
    forward_transfer: float | None = None
    held_out: float | None = None
    tradeoff: float | None = None


@flow(name="compare", flow_run_name="{grid.chain.name}", validate_parameters=False)  # `grid_of` has validated
def compare(grid: Grid) -> list[Outcome]:
    """Prepare each seed's updates once, write them by each codec, merge them in each order by each merger; register."""
    chain = grid.chain
    base = run_now(steps.base_step(chain.base), f"base {chain.base.name}", chain.base)
    able = _abilities(grid, base, base, "the base")
    unmet = leading(here().store.open(run_now(steps.evaluate, "evaluate base", base, list(chain.tasks), base)))
    found = []
    for seed in grid.seeds:
        prepared = [_prepare(grid, base, task, seed) for task in chain.tasks]
        alone = {name: score for one in prepared for name, score in one.alone.items()}
        for codec in grid.codecs:
            updates = [_written(grid, codec, one, seed) for one in prepared]
            for number, order in enumerate(grid.orders):
                for merger in grid.mergers:
                    where = (grid, base, merger, codec, number, order, seed)
                    found.append(_cell(where, prepared, updates, _Known(alone, able, unmet)))
    return found


def count_steps(grid: Grid) -> int:
    """How many steps a first run has, for its progress bar."""
    tasks, able = len(grid.chain.tasks), bool(grid.chain.retained)
    searched = sum(bool(codec.trials()) for codec in grid.codecs.values())
    each_seed = 3 * tasks + (len(grid.codecs) + searched) * tasks
    return 2 + able + len(grid.seeds) * each_seed + grid.cells * (4 * tasks - 1 + able)


def leaderboard(outcomes: Sequence[Outcome]) -> list[Place]:
    """A place per merger and codec, best first."""
    pairs = dict.fromkeys((one.merger, one.codec) for one in outcomes)
    places = [_place([one for one in outcomes if (one.merger, one.codec) == pair]) for pair in pairs]
    return sorted(places, key=lambda one: -one.average)


def register(grid: Grid, outcomes: Sequence[Outcome]) -> str:
    """A run in MLflow per cell, in an experiment of its own; its name. What is there already is not written again."""
    place, experiment = here(), f"{grid.chain.name}-compare"
    for one in outcomes:
        params = {
            "merger": one.merger,
            "codec": one.codec,
            "order": " ".join(one.order),
            "order_number": one.number,
            "seed": one.seed,
            **{f"merger.{key}": value for key, value in grid.mergers[one.merger].spec().items()},
            **{f"codec.{key}": value for key, value in grid.codecs[one.codec].spec().items()},
        }
        numbers = {name: value for name, value in one.summary.__dict__.items() if value is not None}
        key = digest(canonical(["compare", place.store.url, one.model, params]))
        tags = {"run": f"{one.merger}, {one.codec}, order {one.number}, seed {one.seed}"}
        stage = Stage("compare", one.model, params, {**numbers, "bytes": float(one.bytes)}, tags=tags)
        place.registry.log_chain(experiment, key, stage, [])
    return experiment


@dataclass(frozen=True)
class _Prepared:
    task: Task
    update: UpdateRef
    alone: dict[str, float]


@dataclass(frozen=True)
class _Known:
    """Scores beside those of a cell: of each task's own model, and of the base on its abilities and on the tasks."""

    alone: dict[str, float]
    able: dict[str, float]
    unmet: dict[str, float]


def _prepare(grid: Grid, base: CheckpointRef, task: Task, seed: int) -> _Prepared:
    """A task's update as it was extracted, and what its own model reaches."""
    how = f"{task.name}, seed {seed}"
    if task.checkpoint:
        tuned = run_now(steps.ingest, f"ingest {task.name}", task.checkpoint)
    else:
        tuned = run_now(steps.fine_tune, f"fine-tune {how}", base, task.name, task.suite, grid.tuner_of(task, seed))
    update = run_now(steps.extract, f"extract {how}", base, tuned, grid.chain.extract)
    scores = run_now(steps.evaluate, f"evaluate {how}, alone", tuned, [task], base)
    return _Prepared(task, update, leading(here().store.open(scores)))


def _written(grid: Grid, name: str, one: _Prepared, seed: int) -> UpdateRef:
    """The update by one of the codecs, chosen and calibrated as in a chain."""
    codec, how = grid.codecs[name], f"{one.task.name}, seed {seed}, {name}"
    tried = run_now(steps.choose_codec, f"choose {how}", one.update, codec, one.task) if codec.trials() else None
    examples = (one.task,) if codec.examples else ()
    update: UpdateRef = run_now(steps.compress, f"compress {how}", one.update, codec, tried, *examples)
    return update


def _cell(
    where: tuple[Grid, CheckpointRef, str, str, int, tuple[int, ...], int],
    prepared: Sequence[_Prepared],
    updates: Sequence[UpdateRef],
    known: _Known,
) -> Outcome:
    grid, base, merger, codec, number, order, seed = where
    label = f"{merger}, {codec}, order {number}, seed {seed}"
    tasks = [prepared[at].task for at in order]
    recipe, in_order = grid.mergers[merger], [updates[at] for at in order]
    trial: Trial = merged_in_turn(base, tasks, in_order, recipe, label, look_ahead=True)
    summary = summarise(trial.matrix, known.alone, trial.ahead, known.unmet)
    summary = with_abilities(summary, _abilities(grid, trial.model, base, label), known.able)
    size = sum(here().store.open(one).manifest.tensor_bytes for one in updates)
    return Outcome(merger, codec, tuple(task.name for task in tasks), number, seed, trial.model, summary, size)


def _abilities(grid: Grid, model: CheckpointRef, base: CheckpointRef, label: str) -> dict[str, float]:
    if not grid.chain.retained:
        return {}
    scores = run_now(steps.evaluate, f"evaluate abilities, {label}", model, list(grid.chain.retained), base)
    return leading(here().store.open(scores))


def _place(runs: Sequence[Outcome]) -> Place:
    averages = [one.summary.average for one in runs]

    def mean(name: str) -> float | None:
        found = [value for one in runs if (value := getattr(one.summary, name)) is not None]
        return fmean(found) if found else None

    return Place(
        runs[0].merger,
        runs[0].codec,
        len(runs),
        fmean(averages),
        stdev(averages) if len(averages) > 1 else None,
        fmean(one.summary.worst for one in runs),
        mean("forgetting"),
        mean("retained"),
        fmean(one.bytes for one in runs),
        mean("forward_transfer"),
        mean("held_out"),
        mean("tradeoff"),
    )


def plain_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One flat row per cell, for a Parquet file."""
    return [
        {
            "merger": one.merger,
            "codec": one.codec,
            "order": " ".join(one.order),
            "seed": one.seed,
            "model": one.model,
            "bytes": one.bytes,
            **one.summary.__dict__,
        }
        for one in outcomes
    ]
