"""Join: an update into a line that others may be merging into at the same time.

Nobody holds a lock: who commits second folds again onto the head that came in between. Every lost race means that
somebody else's update entered the line, so the line always grows, and a process that dies leaves nothing to clean up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import Conflict
from storage.lines import Entry, Line
from storage.refs import UpdateRef, short
from tasks.merge import fold_update
from tasks.parallel import Budget, Report
from tasks.recipe import Recipe


@dataclass(frozen=True)
class Joined:
    """Where an update is in a line. `is_new`: False if it was there before. `lost`: races against others."""

    entry: Entry
    is_new: bool
    lost: int = 0


def join_line(
    line: Line,
    update: UpdateRef,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    task: str | None = None,
    weight: float = 1.0,
    budget: Budget | None = None,
    report: Report | None = None,
    retrying: Callable[[Conflict], None] = lambda error: None,
) -> Joined:
    """Fold `update` onto the head of `line`, whatever that is by then. An update that the line has is left as it is.

    `task` is what the journal calls it, by default what its manifest says. The head's factor stays: how much of the
    merged delta is written. Raises as `fold_update` does, with nothing committed, and Missing if there is no line.
    """
    named = task or str(store.open(update, "update").manifest.facts.get("task") or short(update))
    lost = 0
    while True:
        head = line.head()  # before the history is read: what comes in between then makes the commit fail
        held = next((entry for entry in line.history() if entry.update == update), None)
        if held is not None:
            return Joined(held, False, lost)
        recipe = Recipe.from_spec(head.merger, f"line {line.name!r}")
        state = fold_update(
            head.base, head.state, update, recipe, store, device, weight=weight, budget=budget, report=report
        )
        try:
            return Joined(line.fold(head, named, update, state, weight, head.factor), True, lost)
        except Conflict as error:
            lost += 1
            retrying(error)
