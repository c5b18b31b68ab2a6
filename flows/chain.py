"""The chain: fine-tune, extract the task vector, compress it, merge it sequentially, evaluate and register."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.growing import Growing, Grown, Prepared
from flows.judging import Ground
from flows.policy import named, run_now
from storage.refs import CheckpointRef, ScoresRef
from tasks.launched import ending_with_us


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
    """Base; for each task fine-tune, extract and compress; then fold one by one, evaluating after every step.

    With `start: head` a task is trained when the one before it has been merged: see `_in_turn`.
    """
    with ending_with_us():
        base = run_now(steps.base_step(config.base), f"base {config.base.name}", config.base)
        base_scores = run_now(steps.evaluate, "evaluate base", base, list(config.tasks), base)
        ground = Ground(base, base_scores, _abilities(config, base))
        if config.start == "head":
            prepared, line = _in_turn(config, ground)
            return Outcome(base, base_scores, prepared, [line])
        started = [_submit(config, base, task, name) for task in config.tasks for name in task.updates]
        prepared = [one.result() for one in started]  # all were submitted before the first is awaited
        lines = [_grow(config, line, ground, prepared) for line in config.lines]
        return Outcome(base, base_scores, prepared, lines)


def count_steps(config: ChainConfig) -> int:
    """How many steps a first run of the chain has, for its progress bar."""
    per_update = 4 + bool(config.codec.trials())  # tune, extract, choose codec, compress, evaluate alone
    per_merge = 5  # merge, commit, write, evaluate, register
    searches = sum(line.search is not None for line in config.lines)
    updates = sum(len(task.updates) for task in config.tasks)
    ahead = (len(config.tasks) - 1) * len(config.lines)  # the merged model on the next task, its champion as a rule
    able = bool(config.retained) * (1 + updates * len(config.lines))
    return 2 + updates * (per_update + per_merge * len(config.lines) + searches) + ahead + able


def _abilities(config: ChainConfig, base: CheckpointRef) -> ScoresRef | None:
    """What the base reaches on what it can do, if the chain names anything."""
    if not config.retained:
        return None
    scores: ScoresRef = run_now(steps.evaluate, "evaluate abilities of the base", base, list(config.retained), base)
    return scores


def _grow(config: ChainConfig, line: LineConfig, ground: Ground, prepared: list[Prepared]) -> Grown:
    """Fold the updates into a line in order, going on where an earlier run stopped."""
    growing = Growing(config, line, ground)
    growing.check([one.wanted for one in prepared])
    for one in prepared:
        growing.add(one)
    return growing.finish()


def _in_turn(config: ChainConfig, ground: Ground) -> tuple[list[Prepared], Grown]:
    """Each training starts from the line's merged model of the step before it, the first one from the base.

    What the line holds already is found done, or is a conflict before anything is trained for it.
    """
    growing = Growing(config, config.lines[0], ground)
    prepared: list[Prepared] = []
    for task in config.tasks:
        for number, name in enumerate(task.updates, 1):
            growing.check_next(task, name, config)
            start = growing.model
            one = _submit(config, ground.base, task, name, number, start).result()
            prepared.append(one)
            growing.add(one)
    return prepared, growing.finish()


@dataclass(frozen=True)
class _Submitted:
    """The way of one update, under way."""

    task: Task
    name: str
    futures: dict[str, PrefectFuture[Any]]

    def result(self) -> Prepared:
        return Prepared(self.task, self.name, **{what: future.result() for what, future in self.futures.items()})


def _submit(
    config: ChainConfig,
    base: CheckpointRef,
    task: Task,
    name: str,
    number: int = 1,
    start: CheckpointRef | None = None,
) -> _Submitted:
    """Tune, extract, compress and evaluate alone. `start`: what is tuned, if not the base."""
    begun = () if start in (None, base) else (start,)
    if task.checkpoint:
        begun = ()  # trained elsewhere
        tuned = named(steps.ingest, f"ingest {name}").submit(task.checkpoint)
    else:
        step = named(steps.fine_tune, f"fine-tune {name}")
        tuned = step.submit(base, name, task.suite, config.tuner_of(task, number), *begun)
    against = begun if config.extract.against == "start" else ()
    update = named(steps.extract, f"extract {name}").submit(base, tuned, config.extract, *against)
    tried = None
    if config.codec.trials():
        tried = named(steps.choose_codec, f"choose codec {name}").submit(update, config.codec, task)
    examples = (task,) if config.codec.examples else ()
    small = named(steps.compress, f"compress {name}").submit(update, config.codec, tried, *examples)
    alone = named(steps.evaluate, f"evaluate {name} alone").submit(tuned, [task], base)
    return _Submitted(task, name, {"tuned": tuned, "alone": alone, "update": small})
