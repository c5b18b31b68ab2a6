"""Pruned states come back: by folding the same updates again, with the same refs, whatever the merger."""

from __future__ import annotations

import time

import pytest

from storage.artifacts import ArtifactStore
from storage.errors import Mismatch
from storage.lines import Entry, Line
from storage.refs import StateRef, short
from storage.roots import read_journals
from storage.sweep import GRACE, Wishes, sweep
from storage.verify import verify
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS
from tasks.recipe import Recipe
from tasks.refold import missing_folds, refold
from tests.builders import checkpoint_of, memory_store, update_of
from tests.tasks.test_fold import COMPOSED, tensors_of

RECIPES = {name: Recipe(MERGERS[name]()) for name in ("average", "opcm", "ties", "sce")} | {"all": COMPOSED["all"]}


def grow(store: ArtifactStore, recipe: Recipe, count: int, name: str = "main") -> Line:
    """A line of `count` merges; one that is there already grows on."""
    line = Line(store.objects, name)
    base = checkpoint_of(tensors_of(0), store)
    line.open(base, recipe.spec())
    head = line.head()
    for seed in range(head.step + 1, count + 1):
        update = update_of(tensors_of(seed, 0.01), base, store)
        weight = 2.0 if recipe.merger.weighted and seed == 2 else 1.0
        state = fold_update(base, head.state, update, recipe, store, weight=weight)
        head = line.fold(head, f"t{seed}", update, state, weight)
    return line


def prune(store: ArtifactStore) -> None:
    sweep(store, Wishes(states=False), now=time.time() + GRACE + 60)


def states(entries: list[Entry]) -> list[StateRef | None]:
    return [entry.state for entry in entries]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_pruned_line_goes_on_goes_back_and_gives_the_same_refs(recipe: Recipe) -> None:
    store, untouched = memory_store(), memory_store()
    line, twin = grow(store, recipe, 4), grow(untouched, recipe, 6)
    prune(store)
    assert set(store.refs("state")) == {line.head().state}

    grow(store, recipe, 6)
    assert states(line.history()) == states(twin.history())

    prune(store)
    back = line.history()[2]
    assert not store.has(back.state or "")
    assert [one.task for one in missing_folds(line.history()[:3], store)] == ["t1", "t2", "t3"]
    made = refold(line.history()[:3], store)
    assert made == states(twin.history())[:3]
    line.rollback(back, "t4 hurt")
    assert back.state is not None
    model = materialize(back.base, back.state, store)
    assert model == materialize(back.base, back.state, untouched)
    assert verify(store, store.refs(), journals=read_journals(store.objects).lines).findings == ()

    assert missing_folds(line.history(), store) == []
    assert refold(line.history(), store) == []


def test_it_goes_on_from_the_last_state_that_is_there() -> None:
    store = memory_store()
    line = grow(store, RECIPES["average"], 5)
    folds = line.history()
    for one in folds[2:]:
        store.objects.delete(one.fold.state)
    assert refold(folds, store) == states(folds)[2:]


def test_a_state_that_comes_out_as_another_is_said() -> None:
    """As it may on another kind of machine, where last digits differ."""
    store = memory_store()
    line = grow(store, RECIPES["average"], 1)
    (fold,) = line.history()
    store.objects.delete(fold.fold.state)
    other = update_of(tensors_of(9, 0.01), fold.base, store)
    moved = line.fold(line.head(), "other", other, StateRef(fold.fold.state))
    with pytest.raises(Mismatch, match=f"expected {short(fold.fold.state)}, found state/.*DELTAWORKS_DEVICE"):
        refold([moved], store)
