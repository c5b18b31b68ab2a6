"""The plan of a rebuild: which updates of a line are merged again, in which order, with what weight and recipe.

Everything that can be wrong is found here, before anything is merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Missing
from storage.lines import Entry, Line
from storage.refs import short
from tasks.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """A line as it is, `head` and `held`, and what shall become of it: `folds` in their new order.

    The folds are entries of the old history, whose `step` is their old place; weights are new ones.
    """

    line: str
    head: Entry
    held: tuple[Entry, ...]
    folds: tuple[Entry, ...]
    recipe: Recipe
    why: str = ""

    @property
    def changes(self) -> bool:
        """Whether the line would be another one afterwards."""
        old, new = ([(one.update, one.weight) for one in some] for some in (self.held, self.folds))
        return old != new or dict(self.head.merger) != self.recipe.spec()

    @property
    def dropped(self) -> list[Entry]:
        kept = {one.step for one in self.folds}
        return [one for one in self.held if one.step not in kept]


def plan_rebuild(
    line: Line,
    head: Entry,
    recipe: Recipe,
    store: ArtifactStore,
    *,
    drop: Sequence[str] = (),
    order: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    why: str = "",
) -> Plan:
    """What to merge. `head` is read before this call: the rebuild is committed right after it or not at all.

    Updates are named by task, by step in the line as it is, or by (a beginning of) their ref.
    """
    held = line.history()
    if not held:
        raise InvalidInput(f"line {line.name!r} has no merges that could be done again")
    out = {_find(line.name, held, name).step for name in drop}
    kept = [one for one in held if one.step not in out]
    if not kept:
        raise InvalidInput(
            f"line {line.name!r}: nothing would be left to merge",
            remedy=f"`deltaworks line rollback {line.name} 0 --why ...` goes back to the base",
        )
    if order:
        kept = _ordered(line.name, held, kept, order)
    counts = {_find(line.name, held, name).step: weight for name, weight in (weights or {}).items()}
    if out & set(counts):
        raise InvalidInput(f"line {line.name!r}: an update is both dropped and given a weight")
    kept = [replace(one, weight=counts.get(one.step, one.weight)) for one in kept]
    plan = Plan(line.name, head, tuple(held), tuple(kept), recipe, why)
    if plan.changes:
        _check(plan, store)
    return plan


def _ordered(line: str, held: Sequence[Entry], kept: Sequence[Entry], order: Sequence[str]) -> list[Entry]:
    found = [_find(line, held, name) for name in order]
    steps = [one.step for one in found]
    for problem, some in (
        ("names twice", [one for one in found if steps.count(one.step) > 1]),
        ("names, though it is dropped,", [one for one in found if one not in kept]),
        ("lacks", [one for one in kept if one.step not in steps]),
    ):
        if some:
            tasks = ", ".join(dict.fromkeys(one.task for one in some))
            raise InvalidInput(
                f"--order {problem} {tasks}",
                remedy=f"It must name each update that is kept exactly once: {', '.join(one.task for one in kept)}",
            )
    return found


def _find(line: str, held: Sequence[Entry], name: str) -> Entry:
    """The fold that a person means by `name`."""
    found = [
        one
        for one in held
        if name == one.task
        or name == str(one.step)
        or (name.startswith("update/") and len(name) > len("update/") and str(one.update).startswith(name))
    ]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.step} {one.task} ({short(str(one.update), 8)})" for one in held)
    problem = "could be several updates" if found else "is no update"
    raise InvalidInput(
        f"{name!r} {problem} of line {line!r}",
        remedy=f"Give a task, a step, or the beginning of a ref that stands for one of {listed}",
    )


def _check(plan: Plan, store: ArtifactStore) -> None:
    """Refuse now what a fold would refuse later."""
    merger = plan.recipe.merger
    for one in plan.folds:
        if not one.weight > 0:
            raise InvalidInput(f"the weight of {one.task!r} must be positive, found {one.weight:g}")
        if one.weight != 1 and not merger.weighted:
            raise InvalidInput(
                f"merger {merger.name!r} lets every update count the same, but {one.task!r} has weight {one.weight:g}",
                remedy=f"Add --weight {one.task}=1, or take a merger that has weights: `deltaworks mergers` lists them",
            )
    for ref in (plan.head.base, *(one.update for one in plan.folds)):
        if ref is None or not store.has(ref):
            raise Missing(
                f"{short(ref or '')} of line {plan.line!r} is not in {store.url}",
                remedy="Restore it from a copy of the store, or leave it out with --drop",
            )
