"""Ternary updates are merged on their planes of bits, and give what their dense numbers give."""

from __future__ import annotations

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.codecs import Ternary
from tasks.compress import compress_update
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average, ModelStock, TaskArithmetic
from tasks.mergers.base import PlainSum, Target
from tasks.packed import planes_of
from tasks.recipe import Recipe
from tasks.tensors import read_delta, read_tensor
from tests.builders import checkpoint_of, memory_store, random_tensors, update_of

SEEDS = (1, 2, 3)


class Updates:
    """Ternary updates of one base, and the same numbers stored dense."""

    def __init__(self, store: ArtifactStore, dtype: torch.dtype = torch.float32) -> None:
        self.store = store
        self.base: CheckpointRef = checkpoint_of(random_tensors(0, dtype=dtype), store)
        plain = [update_of(random_tensors(seed, 0.1 * seed), self.base, store) for seed in SEEDS]
        self.ternary = [compress_update(one, Ternary(density=0.4), store) for one in plain]
        self.dense = [self._spread(one) for one in self.ternary]

    def _spread(self, update: UpdateRef) -> UpdateRef:
        artifact = self.store.open(update)
        return update_of({name: read_delta(artifact, name) for name in artifact.names}, self.base, self.store)

    def state(self, updates: list[UpdateRef], recipe: Recipe, weights: tuple[float, ...]) -> StateRef:
        state = None
        for update, weight in zip(updates, weights, strict=True):
            state = fold_update(self.base, state, update, recipe, self.store, weight=weight)
        assert state is not None
        return state


@pytest.fixture
def updates() -> Updates:
    return Updates(memory_store())


def blobs(store: ArtifactStore, state: StateRef) -> list[str]:
    return [record.blob for record in store.open(state).manifest.tensors]


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic()])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 1.0, 1.7)])
def test_sums_have_the_same_bits(merger: PlainSum, weights: tuple[float, ...], updates: Updates) -> None:
    recipe = Recipe(merger)
    packed, dense = (updates.state(some, recipe, weights) for some in (updates.ternary, updates.dense))
    assert blobs(updates.store, packed) == blobs(updates.store, dense)


def test_ternary_after_dense_and_in_wider_states(updates: Updates) -> None:
    wide = update_of(random_tensors(9, dtype=torch.float64), updates.base, updates.store)
    recipe = Recipe(Average())
    packed, dense = (
        updates.state([wide, *some[:2]], recipe, (1.0, 0.7, 1.0)) for some in (updates.ternary, updates.dense)
    )
    assert blobs(updates.store, packed) == blobs(updates.store, dense)
    assert all(record.dtype == "F64" for record in updates.store.open(packed).manifest.tensors)


@pytest.mark.parametrize("variant", ["fixed", "mergekit"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_stock_from_counts(variant: str, order: tuple[int, ...], dtype: torch.dtype) -> None:
    updates = Updates(memory_store(), dtype)
    recipe = Recipe(ModelStock(variant=variant))  # type: ignore[arg-type]
    models = []
    for some in (updates.ternary, updates.dense):
        state = updates.state([some[place] for place in order], recipe, (1.0, 1.0, 1.0))
        models.append(updates.store.open(materialize(updates.base, state, updates.store)))
    for name in models[0].names:
        packed, dense = (read_tensor(model, name) for model in models)
        torch.testing.assert_close(packed, dense, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_model_stock_does_not_depend_on_the_order(updates: Updates) -> None:
    recipe = Recipe(ModelStock())
    refs = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        state = updates.state([updates.ternary[place] for place in order], recipe, (1.0, 1.0, 1.0))
        model = updates.store.open(materialize(updates.base, state, updates.store))
        refs.add(tuple(record.blob for record in model.manifest.tensors))
    assert len(refs) == 1


def test_zeros_and_a_lone_update_on_planes(updates: Updates) -> None:
    artifact = updates.store.open(updates.ternary[0])
    name = "layer.weight"
    one = planes_of(artifact.parts(name), artifact.record(name).shape)
    none = planes_of({}, artifact.record(name).shape)
    stock, target = ModelStock(), Target(name, "linear.weight")
    alone = stock.combine_planes([one], [1.0], target)
    assert alone is not None
    assert torch.equal(alone, read_delta(artifact, name).reshape(-1))
    beside = stock.combine_planes([one, none], [1.0, 1.0], target)
    assert beside is not None
    assert torch.equal(beside, alone)
    nothing = stock.combine_planes([none, none], [1.0, 1.0], target)
    assert nothing is not None
    assert not nothing.any()
