"""Folding and writing through a store: what holds for every merger of the table, sequential or joint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch, Unavailable
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, Average, Joint, TaskArithmetic
from tasks.parallel import Budget
from tasks.recipe import Recipe, recipe_of
from tasks.scalings import Lines, MatchNorm
from tasks.sparsifiers import Dare, Della
from tasks.tensors import read_tensor
from tests.builders import checkpoint_of, memory_store, random_tensors, update_of

RECIPES = {name: Recipe(kind()) for name, kind in MERGERS.items()}
COMPOSED = {
    "ties of the largest": Recipe(MERGERS["ties"](aggregate="max")),
    "dare": Recipe(Average(), sparsify=Dare(density=0.5)),
    "della": Recipe(TaskArithmetic(), sparsify=Della()),
    "match_norm": Recipe(MERGERS["ties"](), scaling=MatchNorm()),
    "lines": Recipe(MERGERS["ties"](), scaling=Lines()),
    "lines of a joint one": Recipe(MERGERS["model_stock"](), sparsify=Dare(density=0.5), scaling=Lines()),
    "all": Recipe(MERGERS["opcm"](), sparsify=Dare(density=0.5), scaling=Lines(beta=0.2)),
}
# those that leave work to torch which it shares out: decompositions and sums of whole tensors
THREADED = {**{name: RECIPES[name] for name in ("opcm", "tsv_m", "iso_c", "iso_cts")}, "all": COMPOSED["all"]}
SIZES = {"layers.0.fc.weight": (6, 4), "layers.1.fc.weight": (6, 4), "layers.1.fc.bias": (6,), "embed.weight": (9, 4)}


def tensors_of(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    """A model with blocks, for LiNeS; names sorted as a manifest sorts them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * size for name, shape in sorted(SIZES.items())}


def grown(recipe: Recipe, store: ArtifactStore, budget: Budget, count: int = 2) -> tuple[CheckpointRef, StateRef]:
    base = checkpoint_of(tensors_of(0), store)
    state = None
    for seed in range(1, count + 1):
        update = update_of(tensors_of(seed, 0.01), base, store)
        state = fold_update(base, state, update, recipe, store, budget=budget)
    assert state is not None
    return base, state


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *COMPOSED.values()], ids=[*RECIPES, *COMPOSED])
def test_refs_depend_neither_on_workers_nor_on_memory(recipe: Recipe) -> None:
    found = set()
    for budget in (Budget(workers=1), Budget(workers=4), Budget(workers=3, memory=1)):
        store = memory_store()
        base, state = grown(recipe, store, budget)
        found.add((state, materialize(base, state, store, budget=budget)))
    assert len(found) == 1


@pytest.fixture
def threads_of_torch() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch computes on, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", THREADED.values(), ids=THREADED)
def test_refs_do_not_depend_on_the_threads_of_torch(
    recipe: Recipe, threads_of_torch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and vectors so large that torch would share the work out, which rounds sums in another order."""
    large = {"layers.0.fc.weight": (200, 180), "layers.1.fc.weight": (150, 260), "layers.1.fc.bias": (70_000,)}
    monkeypatch.setattr("tests.tasks.test_fold.SIZES", large)
    found = set()
    for threads, workers in ((1, 1), (2, 1), (2, 2)):
        threads_of_torch(threads)
        store = memory_store()
        base, state = grown(recipe, store, Budget(workers=workers))
        found.add((state, materialize(base, state, store, budget=Budget(workers=workers))))
        assert torch.get_num_threads() == threads
    assert len(found) == 1


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *COMPOSED.values()], ids=[*RECIPES, *COMPOSED])
def test_a_state_says_how_it_was_made(recipe: Recipe) -> None:
    store = memory_store()
    _, state = grown(recipe, store, Budget())
    assert recipe_of(store.open(state)) == recipe
    assert store.open(state).manifest.facts["count"] == 2


class Failing(MemoryObjects):
    """Objects that cannot be written any more after so many: a disk or a network that goes away."""

    def __init__(self, source: MemoryObjects, writes: int) -> None:
        super().__init__()
        self._objects, self._written = dict(source._objects), dict(source._written)
        self._left = writes

    def put(self, key: str, data: bytes) -> None:
        self._left -= 1
        if self._left < 0:
            raise Unavailable("the store has gone away")
        super().put(key, data)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not isinstance(recipe.merger, Joint)])
def test_an_interrupted_fold_leaves_no_state_and_ends_the_same(name: str) -> None:
    whole, objects = memory_store(), MemoryObjects()
    base, state = grown(RECIPES[name], whole, Budget(1))
    prepared = ArtifactStore(objects)
    _, first = grown(RECIPES[name], prepared, Budget(1), count=1)
    second = update_of(tensors_of(2, 0.01), base, prepared)
    for writes in range(3):
        broken = ArtifactStore(Failing(objects, writes))
        with pytest.raises(Unavailable):
            fold_update(base, first, second, RECIPES[name], broken, budget=Budget(2))
        assert list(broken.refs("state")) == [first]
        again = ArtifactStore(Failing(broken.objects, 1000))  # type: ignore[arg-type]
        assert fold_update(base, first, second, RECIPES[name], again) == state


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", RECIPES)
def test_an_update_that_is_not_finite_is_refused_by_tensor(name: str, bad: float) -> None:
    store = memory_store()
    base = checkpoint_of(tensors_of(0), store)
    update = tensors_of(1, 0.01)
    update["layers.1.fc.bias"][3] = bad
    with pytest.raises(InvalidInput, match=r"layers\.1\.fc\.bias"):
        fold_update(base, None, update_of(update, base, store), RECIPES[name], store)
    assert list(store.refs("state")) == []


@pytest.mark.parametrize("name", RECIPES)
def test_updates_of_other_shapes_are_refused_by_tensor(name: str) -> None:
    store = memory_store()
    base, state = grown(RECIPES[name], store, Budget())
    update = {**tensors_of(3), "embed.weight": torch.zeros(9, 5)}
    with pytest.raises(Mismatch, match=r"embed\.weight.*\[9, 4\].*\[9, 5\]"):
        fold_update(base, state, update_of(update, base, store), RECIPES[name], store)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.merger.weighted])
def test_weights_are_ratios(name: str) -> None:
    """Twice the weight everywhere is the same merge, unless the method adds the weighted updates up."""
    found = []
    for factor in (1.0, 2.0):
        store = memory_store()
        base = checkpoint_of(tensors_of(0), store)
        state = None
        for seed, weight in ((1, 0.75), (2, 0.25)):
            update = update_of(tensors_of(seed, 0.01), base, store)
            state = fold_update(base, state, update, RECIPES[name], store, weight=factor * weight)
        assert state is not None
        merged = store.open(materialize(base, state, store))
        found.append({one: read_tensor(merged, one) - tensors_of(0)[one] for one in merged.names})
    twice = 2.0 if name in ADDING else 1.0
    for tensor in found[0]:
        torch.testing.assert_close(found[1][tensor], twice * found[0][tensor], rtol=1e-4, atol=1e-6)


ADDING = {"task_arithmetic", "breadcrumbs"}


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.merger.weighted])
def test_weights_are_refused_where_they_mean_nothing(name: str) -> None:
    store = memory_store()
    base = checkpoint_of(tensors_of(0), store)
    with pytest.raises(InvalidInput, match=f"{name}.*weight 0.5"):
        fold_update(base, None, update_of(tensors_of(1), base, store), RECIPES[name], store, weight=0.5)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_are_positive(weight: float) -> None:
    store = memory_store()
    base = checkpoint_of(tensors_of(0), store)
    with pytest.raises(InvalidInput, match="weight must be positive"):
        fold_update(base, None, update_of(tensors_of(1), base, store), RECIPES["average"], store, weight=weight)


@pytest.mark.parametrize("name", RECIPES)
def test_odd_shapes(name: str) -> None:
    """Numbers without a dimension, empty tensors, single rows and columns."""
    shapes: dict[str, tuple[int, ...]] = {"a": (), "b.weight": (0, 3), "c.weight": (1, 5), "d.weight": (5, 1)}
    shapes["e.weight"] = (1, 1)
    store = memory_store()

    def drawn(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {one: torch.randn(shape, generator=generator) for one, shape in shapes.items()}

    base = checkpoint_of(drawn(0), store)
    state: Any = None
    for seed in (1, 2):
        state = fold_update(base, state, update_of(drawn(seed), base, store), RECIPES[name], store)
    merged = store.open(materialize(base, state, store))
    for one, shape in shapes.items():
        tensor = read_tensor(merged, one)
        assert tensor.shape == shape
        assert torch.isfinite(tensor).all()


def test_a_recipe_of_random_tensors_goes_through_its_spec() -> None:
    """What a journal keeps of a recipe is the recipe."""
    for recipe in [*RECIPES.values(), *COMPOSED.values()]:
        assert Recipe.from_spec(recipe.spec(), "a journal") == recipe


def test_sparsifying_is_keyed_by_the_update_and_not_by_the_line() -> None:
    """The same update enters two lines with the same entries dropped."""
    store = memory_store()
    base = checkpoint_of(random_tensors(0), store)
    update: UpdateRef = update_of(random_tensors(1), base, store)
    other = update_of(random_tensors(2), base, store)
    recipe = Recipe(TaskArithmetic(scale=1.0), sparsify=Dare(density=0.5))
    alone = store.open(fold_update(base, None, update, recipe, store))
    before = fold_update(base, None, other, recipe, store)
    after = store.open(fold_update(base, before, update, recipe, store))
    for name in alone.names:
        total = after.parts(name)["sum"] - store.open(before).parts(name)["sum"]
        torch.testing.assert_close(total, alone.parts(name)["sum"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if getattr(recipe.merger, "limit", None)])
def test_a_line_that_is_full_says_so_before_anything_is_written(name: str) -> None:
    merger = RECIPES[name].merger
    assert isinstance(merger, Joint)
    assert merger.limit
    store = memory_store()
    base, state = grown(RECIPES[name], store, Budget(), count=merger.limit)
    before = sorted(store.refs("state"))
    with pytest.raises(InvalidInput, match=f"merges {merger.limit} updates, found one more"):
        fold_update(base, state, update_of(tensors_of(9), base, store), RECIPES[name], store)
    assert sorted(store.refs("state")) == before


@pytest.mark.parametrize("scaling", [MatchNorm(), MatchNorm(norm="quadrature"), Lines()], ids=str)
def test_weights_count_in_scalings(scaling: Any) -> None:
    """An update of weight 3 is three updates of weight 1, as far as the norm of a mean and LiNeS's sums go."""
    found = []
    for seeds, weights in (((1, 2), (1.0, 3.0)), ((1, 2, 2, 2), (1.0, 1.0, 1.0, 1.0))):
        store = memory_store()
        base, state = checkpoint_of(tensors_of(0), store), None
        for seed, weight in zip(seeds, weights, strict=True):
            update = update_of(tensors_of(seed, 0.01), base, store)
            state = fold_update(
                base, state, update, Recipe(TaskArithmetic(scale=1.0), None, scaling), store, weight=weight
            )
        assert state is not None
        facts = store.open(state).manifest.facts
        found.append({key: facts[key] for key in facts if key.startswith("scaling.")})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
