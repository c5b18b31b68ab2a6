"""The contract of joint mergers: what every merger promises that sees all updates at once. The table drives it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import canonical
from storage.refs import CheckpointRef, StateRef
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, Joint, Karcher, Sce, Slerp, Target
from tasks.recipe import Recipe
from tasks.scalings import MatchNorm
from tasks.tensors import read_tensor
from tests.builders import checkpoint_of, memory_store, random_tensors, role_of, update_of

JOINT = {name: kind for name, kind in MERGERS.items() if issubclass(kind, Joint)}
SHAPES = [(), (1,), (7,), (1, 9), (9, 1), (16, 8), (4, 3, 2, 2), (0,), (0, 3)]
TARGET = Target("layers.0.fc.weight", "linear.weight")
PLACES = {torch.float32: 5e-7, torch.float64: 1e-12}
FLATTENING = {"iso_cts"}  # gives every direction of a matrix the same size, even to those of one update
SYMMETRIC = {"sce", "model_stock", "karcher"}  # to the last bit; the others up to rounding


@pytest.fixture(params=JOINT.values(), ids=JOINT.keys())
def merger(request: pytest.FixtureRequest) -> Joint:
    """Every joint merger of the table, with its defaults."""
    made: Joint = request.param()
    return made


def most(merger: Joint) -> int:
    """How many updates a test gives it."""
    return min(4, getattr(merger, "limit", None) or 4)


def drawn(seed: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Values of float32, whatever the dtype, so that two dtypes can be compared."""
    return (torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def updates(count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Updates that have something in common."""
    return [drawn(1, shape, dtype, 0.03) + drawn(seed, shape, dtype, 0.01) for seed in range(2, 2 + count)]


def merged(merger: Joint, deltas: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    start = drawn(0, deltas[0].shape, deltas[0].dtype) if base is None else base
    return merger.combine(start, deltas, [1.0] * len(deltas), TARGET)


@pytest.mark.parametrize("dtype", PLACES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_merged_is_finite_and_has_shape_and_dtype(
    merger: Joint, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for count in range(1, most(merger) + 1):
        found = merged(merger, updates(count, shape, dtype))
        assert (found.shape, found.dtype) == (torch.Size(shape), dtype)
        assert torch.isfinite(found).all()
        assert not found.numel() or found.any()


@pytest.mark.parametrize("dtype", PLACES, ids=str)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_updates_merge_to_that_update(
    merger: Joint, shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    """One alone to the last bit, so that the first step of a line holds the first tuned model."""
    (update,) = updates(1, shape, dtype)
    found = merged(merger, [update] * min(count, most(merger)))
    if merger.name in FLATTENING and len(shape) == 2:
        assert not update.numel() or float((found * update).sum()) > 0.5 * float(found.norm() * update.norm())
    elif count == 1:
        assert torch.equal(found, update)
    else:
        torch.testing.assert_close(found, update, rtol=0, atol=PLACES[dtype])


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["zero base", "base"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_merge_to_zeros(merger: Joint, shape: tuple[int, ...], start: float) -> None:
    zeros = torch.zeros(shape)
    found = merged(merger, [zeros] * most(merger), drawn(0, shape) * start)
    assert torch.equal(found, zeros) and not found.signbit().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_updates_make_no_odd_numbers(merger: Joint, shape: tuple[int, ...]) -> None:
    """A zero among the updates, two that cancel out, one that undoes the base, values of very different size."""
    one, two = updates(2, shape)
    base = drawn(0, shape)
    for pair in ([one, torch.zeros(shape)], [one, -one], [one, -base], [-base, -base], [one * 1e-30, two * 1e10]):
        for start in (base, torch.zeros(shape)):
            found = merged(merger, pair, start)
            assert torch.isfinite(found).all()
            assert float(found.abs().sum()) <= 4 * float(sum((start.abs() + delta.abs()).sum() for delta in pair))


def test_low_rank_updates_stay_finite_and_small(merger: Joint) -> None:
    left, right = drawn(5, (16, 1)), drawn(6, (1, 8))
    pair = [left @ right * 0.01, left @ right * 0.02]
    found = merged(merger, pair)
    assert torch.linalg.matrix_rank(found) >= 1
    assert float(found.norm()) < float(pair[0].norm() + pair[1].norm())


@pytest.mark.parametrize("shape", [(), (7,), (16, 8)], ids=str)
def test_order_does_not_matter(merger: Joint, shape: tuple[int, ...]) -> None:
    """Slerp, which has a first and a second model, is at t = 0.5."""
    several = updates(most(merger), shape)
    expected = merged(merger, several)
    for order in permutations(several):
        found = merged(merger, order)
        if merger.name in SYMMETRIC:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_inputs_stay_as_they_are(merger: Joint) -> None:
    several, base = updates(most(merger), (16, 8)), drawn(0, (16, 8))
    merged(merger, several, base)
    assert torch.equal(base, drawn(0, (16, 8)))
    assert all(torch.equal(one, two) for one, two in zip(several, updates(most(merger), (16, 8)), strict=True))


@pytest.mark.parametrize("shape", [(), (7,), (16, 8), (4, 3, 2, 2)], ids=str)
def test_single_precision_is_double_precision_rounded(merger: Joint, shape: tuple[int, ...]) -> None:
    single = updates(most(merger), shape)
    found, exact = merged(merger, single), merged(merger, [one.double() for one in single], drawn(0, shape).double())
    places = 1e-5 if merger.name in FLATTENING else 2e-7  # a decomposition in float32, or one rounding
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=places * float(exact.abs().max()))


def test_memory_does_not_lie_in_an_order(merger: Joint) -> None:
    """A transposed tensor is merged like its copy."""
    several = [one.T for one in updates(most(merger), (8, 16))]
    copies = [one.contiguous() for one in several]
    assert torch.equal(merged(merger, several), merged(merger, copies))


def test_weights_are_ratios_of_repeats() -> None:
    """Weights 2 and 1 are the first update twice; only a merger that says so has them."""
    for kind in JOINT.values():
        if not kind.weighted:
            continue
        base, (one, two) = drawn(0, (16, 8)), updates(2, (16, 8))
        weighed = kind().combine(base, [one, two], [2.0, 1.0], TARGET)
        torch.testing.assert_close(weighed, merged(kind(), [one, one, two], base), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(weighed, kind().combine(base, [one, two], [0.5, 0.25], TARGET))
        assert not torch.allclose(weighed, merged(kind(), [one, two], base), rtol=0.01)


def test_settings_are_all_a_merger_is(merger: Joint) -> None:
    assert MERGERS[merger.name](**json.loads(canonical(merger.spec()))) == merger


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Sce, {"select_topk": 0.0}),
        (Sce, {"select_topk": 1.1}),
        (Slerp, {"t": -0.1}),
        (Slerp, {"t": 1.1}),
        (Karcher, {"iterations": -1}),
        (Karcher, {"tolerance": 0.0}),
    ],
)
def test_invalid_settings(kind: type, settings: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        kind(**settings)


def line(recipe: Recipe, count: int, store: ArtifactStore) -> tuple[CheckpointRef, list[StateRef]]:
    base = checkpoint_of(random_tensors(0), store)
    states: list[StateRef] = []
    for seed in range(1, count + 1):
        update = update_of(random_tensors(seed, size=0.01), base, store)
        states.append(fold_update(base, states[-1] if states else None, update, recipe, store))
    return base, states


class TestThroughAStore:
    def test_it_is_combine(self, merger: Joint) -> None:
        """After every step: fold the updates one by one, write the model, and compare with all of them in memory."""
        store, before = memory_store(), random_tensors(0)
        base, states = line(Recipe(merger), min(3, most(merger)), store)
        for count, state in enumerate(states, 1):
            model = store.open(materialize(base, state, store))
            for name, tensor in before.items():
                deltas = [random_tensors(seed, size=0.01)[name] for seed in range(1, count + 1)]
                by_hand = merger.combine(tensor, deltas, [1.0] * count, Target(name, role_of(name, tensor)))
                assert torch.equal(read_tensor(model, name), tensor + by_hand), name

    def test_a_state_is_a_list(self, merger: Joint) -> None:
        """No tensors; what one more update adds is its ref and its weight, whatever the size of the model."""
        store = memory_store()
        _, states = line(Recipe(merger), most(merger), store)
        sizes = []
        for state in states:
            assert not store.open(state).manifest.tensors
            sizes.append(len(store.objects.get(state)))
        assert all(later - earlier < 250 for earlier, later in pairwise(sizes))

    def test_a_scaling_sees_what_is_merged(self, merger: Joint) -> None:
        """The mean norm of the updates is given back, though most of these methods shorten."""
        store, count = memory_store(), min(3, most(merger))
        base, states = line(Recipe(merger, scaling=MatchNorm()), count, store)
        model = store.open(materialize(base, states[-1], store))
        moved = torch.cat([(read_tensor(model, name) - tensor).flatten() for name, tensor in random_tensors(0).items()])
        norms = [
            torch.cat([one.flatten() for one in random_tensors(seed, size=0.01).values()]).norm()
            for seed in range(1, count + 1)
        ]
        assert float(moved.norm()) == pytest.approx(float(sum(norms)) / count, rel=1e-4)

    def test_weights_are_refused_where_they_mean_nothing(self, merger: Joint) -> None:
        store = memory_store()
        base = checkpoint_of(random_tensors(0), store)
        update = update_of(random_tensors(1, size=0.01), base, store)
        if merger.weighted:
            state = fold_update(base, None, update, Recipe(merger), store, weight=2.0)
            assert store.open(state).manifest.facts["weights"] == [2.0]
        else:
            with pytest.raises(InvalidInput, match="weight"):
                fold_update(base, None, update, Recipe(merger), store, weight=2.0)
