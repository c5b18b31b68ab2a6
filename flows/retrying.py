"""Retrying: what is tried where the gate of a line refuses a merge, and how what passes enters the journal.

Another factor writes the same state. Another recipe merges all updates of the line again, the newest with them, and
enters the journal as one rebuild, from which the line goes on. Until then the journal is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import get_run_logger

from flows import steps
from flows.folding import fold_all
from flows.policy import run_now
from flows.tables import recipe_name, recipe_text
from storage.errors import InvalidInput
from storage.lines import Entry, after_rebuild
from storage.refs import StateRef
from tasks.recipe import Recipe
from tasks.retry import OtherRecipe, unfit


@dataclass(frozen=True)
class Alternative:
    """What a line's journal would hold instead: `said` in words, `at 0.5` or `by tsv_m`."""

    said: str
    entry: Entry


def alternatives(
    line: str,
    refused: Entry,
    before: Sequence[Entry],
    retry: Sequence[float | OtherRecipe],
    reasons: Sequence[str],
    factor_of: Callable[[str, StateRef], float] = lambda said, state: 1.0,
) -> Iterator[Alternative]:
    """What `retry` lists, made when it is asked for.

    `refused`: the fold that did not pass, and why; `before`: the steps of the line that it came after. `factor_of`: by
    which factor a state is written that another recipe made. A recipe that cannot merge these updates is passed over,
    and the log says why.
    """
    tried = [dict(refused.merger)]
    for item in retry:
        if not isinstance(item, OtherRecipe):
            yield Alternative(f"at {item:g}", replace(refused, factor=item))
            continue
        recipe = item.instead_of(Recipe.from_spec(refused.merger, f"line {line!r}"))
        spec = recipe.spec()
        if spec in tried:
            continue
        tried.append(spec)
        said = f"by {_name(spec, refused.merger)}"
        try:
            if why := unfit(recipe, [one.weight for one in (*before, refused)]):
                raise InvalidInput(why)
            entry = _merged_again(line, refused, before, recipe, said)
        except InvalidInput as error:
            get_run_logger().warning("line %s: %s cannot be merged %s: %s", line, refused.task, said, error)
            continue
        assert entry.state is not None
        last = replace(entry.folds[-1], factor=factor_of(said, entry.state))
        why = f"the gate refused {refused.task!r} by {_name(refused.merger, spec)}: {'; '.join(reasons)}"
        why = f"{why}; {said} it passes"
        yield Alternative(said, replace(entry, factor=last.factor, folds=(*entry.folds[:-1], last), why=why))


def commit(line: str, head: Entry, entry: Entry) -> Entry:
    """Append to the journal what was decided on after `head`. Conflict if another entry came first."""
    label = f"{line}: commit {entry.task}"
    if entry.action == "rebuild":
        recipe = Recipe.from_spec(entry.merger, f"line {line!r}")
        rebuilt: Entry = run_now(steps.commit_rebuild, label, line, head, recipe, list(entry.folds), entry.why)
        return rebuilt
    folded: Entry = run_now(steps.commit, label, line, head, entry.fold)
    return folded


def _merged_again(line: str, refused: Entry, before: Sequence[Entry], recipe: Recipe, said: str) -> Entry:
    factors = {one.state: one.factor for one in before}
    folds = fold_all(line, refused.base, [*before, refused], recipe, factors, f" {said}")
    return after_rebuild(replace(refused, number=refused.number - 1), recipe.spec(), folds)


def _name(spec: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """A recipe by its choices, and with their settings where those are the difference."""
    return recipe_text(spec) if recipe_name(spec) == recipe_name(beside) else recipe_name(spec)
