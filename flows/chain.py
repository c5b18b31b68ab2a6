"""The chain: fine-tune, extract the task vector, compress it, merge it sequentially, evaluate and register."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.continuation import Wanted, check_continuation
from flows.policy import named, run_now
from flows.workplace import here
from storage.lines import Entry, Fold, Line
from storage.refs import CheckpointRef, ScoresRef, StateRef, UpdateRef
from storage.registry import ModelVersion
from tasks.evaluate import Summary, leading, summarise


@dataclass(frozen=True)
class Prepared:
    """One task's way to the lines: the tuned model, its scores alone, and the update to merge."""

    task: Task
    tuned: CheckpointRef
    alone: ScoresRef
    update: UpdateRef


@dataclass(frozen=True)
class Step:
    """One merge of a line."""

    entry: Entry
    model: CheckpointRef
    scores: ScoresRef
    summary: Summary
    version: ModelVersion


@dataclass(frozen=True)
class Grown:
    """A line after the chain. `beyond`: tasks that it holds after those of the chain."""

    name: str
    steps: list[Step] = field(default_factory=list)
    beyond: tuple[str, ...] = ()

    @property
    def last(self) -> Step:
        return self.steps[-1]


@dataclass(frozen=True)
class Outcome:
    """What a chain came to: refs, scores and versions, no tensors."""

    base: CheckpointRef
    base_scores: ScoresRef
    prepared: list[Prepared]
    lines: list[Grown]

    @property
    def best(self) -> Grown:
        """The line whose newest version has the best average; of equals, the first."""
        return max(self.lines, key=lambda line: line.last.summary.average)


@flow(
    name="chain",
    flow_run_name="{config.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
    validate_parameters=False,  # `load_chain` has done it, with better messages
)
def chain(config: ChainConfig) -> Outcome:
    """Base; for each task fine-tune, extract and compress; then fold one by one, evaluating after every step."""
    base = run_now(steps.base_step(config.base), f"base {config.base.name}", config.base)
    base_scores = run_now(steps.evaluate, "evaluate base", base, list(config.tasks), base)
    prepared = _prepare(config, base)
    lines = [_grow(config, line, base, prepared) for line in config.lines]
    return Outcome(base, base_scores, prepared, lines)


def count_steps(config: ChainConfig) -> int:
    """How many steps a first run of the chain has, for its progress bar."""
    per_task = 4 + bool(config.codec.trials())  # tune, extract, choose codec, compress, evaluate alone
    per_merge = 5  # merge, commit, write, evaluate, register
    searches = sum(line.search is not None for line in config.lines)
    return 2 + len(config.tasks) * (per_task + per_merge * len(config.lines) + searches)


def _prepare(config: ChainConfig, base: CheckpointRef) -> list[Prepared]:
    """Every task's update. Tasks do not depend on each other, so they are all submitted before the first is awaited."""
    submitted: list[tuple[Task, dict[str, PrefectFuture[Any]]]] = []
    for task in config.tasks:
        if task.checkpoint:
            tuned = named(steps.ingest, f"ingest {task.name}").submit(task.checkpoint)
        else:
            step = named(steps.fine_tune, f"fine-tune {task.name}")
            tuned = step.submit(base, task.name, task.suite, config.tuner_of(task))
        update = named(steps.extract, f"extract {task.name}").submit(base, tuned, config.extract)
        tried = None
        if config.codec.trials():
            tried = named(steps.choose_codec, f"choose codec {task.name}").submit(update, config.codec, task)
        examples = (task,) if config.codec.examples else ()
        small = named(steps.compress, f"compress {task.name}").submit(update, config.codec, tried, *examples)
        alone = named(steps.evaluate, f"evaluate {task.name} alone").submit(tuned, [task], base)
        submitted.append((task, {"tuned": tuned, "alone": alone, "update": small}))
    return [Prepared(task, **{name: one.result() for name, one in futures.items()}) for task, futures in submitted]


def _grow(config: ChainConfig, line: LineConfig, base: CheckpointRef, prepared: list[Prepared]) -> Grown:
    """Fold the updates into a line in order, going on where an earlier run stopped."""
    journal = Line(here().store.objects, line.name)
    journal.open(base, line.recipe.spec())
    head = journal.head()  # before the history is read: a merge that comes in between makes the commit fail, not vanish
    entries = journal.history()
    check_continuation(
        line.name, head, entries, [Wanted(one.task.name, one.update, one.task.weight) for one in prepared]
    )
    grown = Grown(line.name, beyond=tuple(entry.task for entry in entries[len(prepared) :]))
    alone = {one.task.name: leading(here().store.open(one.alone))[one.task.name] for one in prepared}
    matrix: list[dict[str, float]] = []
    for number, one in enumerate(prepared):
        name = one.task.name
        before = entries[number - 1] if number else None
        held = before.state if before else None
        state = run_now(steps.fold, f"{line.name}: merge {name}", base, held, one.update, line.recipe, one.task.weight)
        if number == len(entries):
            # before the commit: a merge that was interrupted in its search is then done again, factor and all
            factor = _factor(line, base, state, prepared[: number + 1])
            folded = Fold(name, one.update, state, one.task.weight, factor)
            head = run_now(steps.commit, f"{line.name}: commit {name}", line.name, head, folded)
            entries.append(head)
        factor = entries[number].factor  # the journal's, also where the search would choose another one by now
        written = (base, state) if factor == 1 else (base, state, factor)
        model = run_now(steps.materialize, f"{line.name}: write {name}", *written)
        seen = [task.task for task in prepared[: number + 1]]
        scores = run_now(steps.evaluate, f"{line.name}: evaluate {name}", model, seen, base)
        matrix.append(leading(here().store.open(scores)))
        summary = summarise(matrix, alone)
        so_far = entries[: number + 1]
        if number + 1 == len(prepared) == len(entries):
            # a head that went back to an older state is a new version all the same, so that the alias can follow it
            so_far[-1] = replace(so_far[-1], number=head.number)
        label = f"{line.name}: register {name}"
        version = run_now(steps.register, label, config.name, line.name, so_far, model, scores, summary)
        grown.steps.append(Step(entries[number], model, scores, summary, version))
    return grown


def _factor(line: LineConfig, base: CheckpointRef, state: StateRef, prepared: list[Prepared]) -> float:
    """How much of the merged delta to write, if the line searches for it."""
    if line.search is None:
        return 1.0
    seen = [one.task for one in prepared]
    scores = run_now(steps.search, f"{line.name}: search {seen[-1].name}", base, state, seen, line.search)
    return float(here().store.open(scores).manifest.facts["factor"])
