"""Reproduce: a version merged again from its stored updates, and what came of it held against what is stored.

Every state is folded anew, whether it is there or not, in a place of its own that goes away: nothing is changed. Same
updates, same order, same recipe: same refs, so that the comparison is one of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import Missing
from storage.lines import Entry
from storage.refs import CheckpointRef, Ref, StateRef, short
from tasks.aside import aside
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.parallel import Budget, Report
from tasks.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """One artifact made again: after which merge, what it should be, and what it is."""

    number: int
    task: str
    expected: Ref
    found: Ref

    @property
    def same(self) -> bool:
        return self.expected == self.found


def reproduce(
    entries: Sequence[Entry],
    model: CheckpointRef | None,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report = lambda done, total, note: None,
) -> list[Step]:
    """Merge `entries` again, a line's folds from its base on, and write the model; a step per state, and one for
    `model`, if it is known. It ends with the first that comes out as another.

    Raises Missing before anything is merged if an update, or the base, is no longer stored.
    """
    _check_there(entries, store)
    total = len(entries) + (model is not None)
    steps: list[Step] = []
    with aside(store) as place:
        state: StateRef | None = None
        for number, one in enumerate(entries, 1):
            recipe, fold = Recipe.from_spec(one.merger, f"entry {one.number}"), one.fold
            state = fold_update(one.base, state, fold.update, recipe, place, device, weight=fold.weight, budget=budget)
            steps.append(Step(number, one.task, fold.state, state))
            report(number, total, f"merge {one.task}")
            if not steps[-1].same:
                return steps
        if model is not None and state is not None:
            last = entries[-1]
            found = materialize(last.base, state, place, device, factor=last.factor, budget=budget)
            steps.append(Step(len(entries), last.task, model, found))
            report(total, total, "write the model")
    return steps


def _check_there(entries: Sequence[Entry], store: ArtifactStore) -> None:
    wanted = {str(one.fold.update): f"the update of {one.task!r}" for one in entries}
    wanted |= {str(one.base): "the base" for one in entries}
    lost = [(ref, what) for ref, what in wanted.items() if not store.has(ref)]
    if lost:
        ref, what = lost[0]
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise Missing(
            f"{what}, {short(ref)}, is not in {store.url}{more}: what it was merged from is needed to merge it again",
            remedy="Restore it from a copy of the store: `deltaworks copy`",
        )
