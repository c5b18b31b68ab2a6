"""Why: what a merge gave and took, and which update most likely took the most.

Gains and losses are between a version and the one before it, on the same rows. The cause is looked for by leaving one
update out after the other: the rest is merged again, written and asked for the task that lost, aside, so that nothing
of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.lines import Entry
from storage.refs import ScoresRef, StateRef, UpdateRef, short
from tasks.aside import aside
from tasks.choice import restored
from tasks.evaluate import evaluate, leading, outcomes_of
from tasks.gate import paired_test
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.parallel import Budget, Report
from tasks.recipe import Recipe
from tasks.suites import AnySuite


@dataclass(frozen=True)
class Change:
    """A task's leading score before and after. `p`: of a one-sided paired test, row by row, that it is worse (of a
    loss) or better (of a gain) by chance alone; None where rows were not kept."""

    task: str
    before: float | None
    after: float | None
    p: float | None

    @property
    def points(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Without:
    """What a task reaches where one update was left out: `gain` is how much more than with it."""

    task: str
    update: UpdateRef
    score: float
    gain: float


@dataclass(frozen=True)
class Asked:
    """A suite under the name of its task."""

    name: str
    suite: AnySuite


def changes(before: ScoresRef | None, after: ScoresRef, store: ArtifactStore) -> list[Change]:
    """Of every task of either, the worst loss first."""
    old, new = ({} if one is None else leading(store.open(one, "scores")) for one in (before, after))
    rows = [{} if one is None else outcomes_of(store.open(one, "scores")) for one in (before, after)]
    found = []
    for task in dict.fromkeys([*new, *old]):
        was, now = (side.get(task, []) for side in rows)
        chance = None
        if was and len(was) == len(now):
            lost = (new.get(task) or 0.0) < (old.get(task) or 0.0)
            chance = paired_test(now, was) if lost else paired_test(was, now)
        found.append(Change(task, old.get(task), new.get(task), chance))
    return sorted(found, key=lambda one: math.inf if one.points is None else one.points)


def leave_one_out(
    entries: Sequence[Entry],
    task: str,
    scores: ScoresRef,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    budget: Budget | None = None,
    report: Report = lambda done, total, note: None,
) -> list[Without]:
    """What `task` reaches without each of `entries`, a line's folds from its base on, but its own; best first.

    The suite is the one that `scores` were taken with. Raises InvalidInput if they do not say it, or if there is no
    other update to leave out.
    """
    reached = leading(store.open(scores, "scores"))
    asked = _asked(task, scores, store)
    others = [place for place, one in enumerate(entries) if one.task != task]
    if task not in reached or not others:
        raise InvalidInput(f"{task!r} cannot be asked without another update: the merge holds no other")
    found = []
    with aside(store) as place:
        for number, left in enumerate(others, 1):
            state: StateRef | None = entries[left - 1].state if left else None
            if state is not None and not store.has(state):
                state = None
            rest = [one for at, one in enumerate(entries) if at != left and (state is None or at > left)]
            for one in rest:
                recipe = Recipe.from_spec(one.merger, f"entry {one.number}")
                state = fold_update(
                    one.base, state, one.fold.update, recipe, place, device, weight=one.weight, budget=budget
                )
            assert state is not None
            base = entries[left].base
            model = materialize(base, state, place, device, factor=entries[-1].factor, budget=budget)
            score = leading(place.open(evaluate(model, [asked], place, device, base=base)))[task]
            found.append(Without(entries[left].task, entries[left].fold.update, score, score - reached[task]))
            report(number, len(others), f"without {entries[left].task}")
    return sorted(found, key=lambda one: -one.gain)


def _asked(task: str, scores: ScoresRef, store: ArtifactStore) -> Asked:
    spec = store.open(scores, "scores").manifest.lineage.spec.get("tasks", {}).get(task)
    if not spec:
        raise InvalidInput(
            f"{short(scores)} does not say how {task!r} was asked",
            remedy="Run its chain again: evaluations of today say it",
        )
    return Asked(task, restored(AnySuite, spec["suite"]))
