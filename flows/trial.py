"""A trial: updates merged one by one, outside of any line, and evaluated after each merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.chain import Task
from flows import steps
from flows.policy import run_now
from flows.workplace import here
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.evaluate import leading
from tasks.recipe import Recipe


@dataclass(frozen=True)
class Trial:
    """The model after the last merge, and the accuracy matrix: a row per merge, task -> score.

    `ahead`: task -> what the model before its merge reached on it; none of the first."""

    model: CheckpointRef
    matrix: list[dict[str, float]]
    ahead: dict[str, float]


def merged_in_turn(
    base: CheckpointRef,
    tasks: Sequence[Task],
    updates: Sequence[UpdateRef],
    recipe: Recipe,
    label: str,
    *,
    look_ahead: bool = False,
) -> Trial:
    """Fold, write and evaluate, update by update. What was done before is found done.

    look_ahead: evaluate each model on the task that comes next too, for forward transfer.
    """
    state: StateRef | None = None
    model, matrix = base, []
    ahead: dict[str, float] = {}
    for number, (task, update) in enumerate(zip(tasks, updates, strict=True), 1):
        if look_ahead and number > 1:
            scores = run_now(steps.evaluate, f"evaluate ahead of {task.name}, {label}", model, [task], base)
            ahead |= leading(here().store.open(scores))
        state = run_now(steps.fold, f"merge {task.name}, {label}", base, state, update, recipe, task.weight)
        model = run_now(steps.materialize, f"write {task.name}, {label}", base, state)
        scores = run_now(steps.evaluate, f"evaluate {task.name}, {label}", model, list(tasks[:number]), base)
        matrix.append(leading(here().store.open(scores)))
    return Trial(model, matrix, ahead)
