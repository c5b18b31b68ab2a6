"""Refold: states that were pruned, merged again from the updates. Same updates, same order, same recipe: same refs."""

from __future__ import annotations

from collections.abc import Sequence

from storage.artifacts import ArtifactStore
from storage.errors import Mismatch
from storage.lines import Entry
from storage.refs import StateRef, short
from tasks.merge import fold_update
from tasks.parallel import Budget, Report
from tasks.recipe import Recipe


def missing_folds(folds: Sequence[Entry], store: ArtifactStore) -> list[Entry]:
    """Of the folds that lead to a state, those to do again: all after the last state that is still there."""
    missing: list[Entry] = []
    for one in reversed(folds):
        if store.has(one.fold.state):
            break
        missing.insert(0, one)
    return missing


def refold(
    folds: Sequence[Entry],
    store: ArtifactStore,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report | None = None,
) -> list[StateRef]:
    """Make the state of the last of `folds`, which are a line's from its base on, if it is not there; and those
    between the last one that is there and it. Returns what was made. Mismatch if one comes out as another."""
    todo = missing_folds(folds, store)
    held = folds[len(folds) - len(todo) - 1].state if len(todo) < len(folds) else None
    made: list[StateRef] = []
    for one in todo:
        recipe = Recipe.from_spec(one.merger, f"entry {one.number}")
        fold = one.fold
        held = fold_update(
            one.base, held, fold.update, recipe, store, device, weight=fold.weight, budget=budget, report=report
        )
        if held != fold.state:
            raise Mismatch(
                f"merging {one.task!r} again",
                expected=short(fold.state),
                found=short(held),
                remedy="Last digits differ between kinds of machines: merge where it was merged first (cpu, cuda, the "
                "number of threads: DELTAWORKS_DEVICE, DELTAWORKS_THREADS), or restore the state from a copy of the "
                "store, with `deltaworks copy`",
            )
        made.append(held)
    return made
