"""Folding: updates of a line merged one after the other onto its base, by one recipe. What was done is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flows import steps
from flows.policy import run_now
from storage.lines import Entry, Fold
from storage.refs import CheckpointRef, StateRef
from tasks.recipe import Recipe


def fold_all(
    line: str,
    base: CheckpointRef,
    some: Sequence[Entry | Fold],
    recipe: Recipe,
    factors: Mapping[StateRef | None, float],
    said: str = "",
) -> list[Fold]:
    """The folds of these updates with their weights. `factors`: those of states that the line has already; the others
    get 1. `said`: what the labels of the steps end with."""
    state: StateRef | None = None
    folds: list[Fold] = []
    for one in some:
        label = f"{line}: merge {one.task}{said}"
        state = run_now(steps.fold, label, base, state, one.update, recipe, one.weight)
        assert one.update is not None and state is not None
        folds.append(Fold(one.task, one.update, state, one.weight, factors.get(state, 1.0)))
    return folds
