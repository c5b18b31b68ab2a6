"""Mergers that choose entries: TIES in its variants, MagMax, VaRM and Breadcrumbs, against formulas and references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from storage.errors import InvalidInput
from tasks.mergers import Breadcrumbs, ContinualTies, Magmax, Sequential, Ties, Varm
from tests.contracts.test_mergers import State, Update, delta, fold_all, updates
from tests.tasks.test_merging import CASES, check_merged, fold_weighted, golden_fold

MERGEKIT = Ties(density=0.3, trim="tensor", tie="positive")


@pytest.mark.parametrize(
    ("merger", "file", "tasks"),
    [
        (ContinualTies(), "cont_ties_f32_step1.safetensors", 2),
        (ContinualTies(), "cont_ties_f32_step3.safetensors", 4),
        (Magmax(), "fb_magmax_32.safetensors", 4),
        (MERGEKIT, "mk_ties_d0.3_w_f32.safetensors", 4),
    ],
    ids=["continual_ties-1", "continual_ties-3", "magmax", "mergekit_ties"],
)
def test_mergers_are_their_references(merger: Sequential, file: str, tasks: int) -> None:
    weights = CASES[file].get("weights", ())
    check_merged(golden_fold(merger, list(range(tasks)), torch.float32, weights)[0], file, 5e-7)


def one(*rows: list[float]) -> list[Update]:
    """Updates of one tensor of one row each."""
    return [{"w": torch.tensor([row], dtype=torch.float64)} for row in rows]


def weighted(merger: Sequential, several: list[Update], weights: list[float]) -> Update:
    state: State | None = None
    for update, weight in zip(several, weights, strict=True):
        state = fold_weighted(merger, state, update, weight)
    assert state is not None
    return delta(merger, state)


def same(merged: Update, *row: float) -> None:
    torch.testing.assert_close(merged["w"], torch.tensor([row], dtype=torch.float64), rtol=0, atol=1e-12)


class TestTies:
    def test_weights_decide_the_election_and_the_mean(self) -> None:
        """-1 with weight 3 outvotes 2 with weight 1; the means are weighted: (2 + 3 * 4) / 4, not their product's."""
        same(weighted(Ties(density=1.0), one([2.0, 2.0, 5.0], [-1.0, 4.0, 0.0]), [1.0, 3.0]), -1.0, 3.5, 5.0)
        same(weighted(Ties(density=1.0, aggregate="sum"), one([2.0, 2.0], [-1.0, 4.0]), [1.0, 3.0]), -3.0, 14.0)

    def test_max_takes_the_largest_of_those_that_agree(self) -> None:
        """As in the released code: the largest magnitude of the elected sign, not the largest of all (5, outvoted)."""
        several = one([1.0, -4.0, 5.0, 1.0], [2.0, -3.0, -3.0, -1.0], [-0.5, 6.0, -4.0, 0.0])
        merger = Ties(density=1.0, aggregate="max", scale=0.5)
        # 6 - 7 elects -; the last entry is undecided, and takes the sign of the model: two of three are -
        same(delta(merger, fold_all(merger, several)), 1.0, -2.0, -2.0, -0.5)
        same(weighted(Ties(density=1.0, aggregate="max"), one([2.0, 1.0], [-1.0, 3.0]), [1.0, 3.0]), -3.0, 9.0)

    @settings(max_examples=30, deadline=None)
    @given(arrays.arrays("float64", (5, 8), elements=st.integers(-4, 4)), st.sampled_from([0.3, 0.7, 1.0]))
    def test_max_streams_the_joint_method(self, rows: Any, density: float) -> None:
        """With the released code's rules, after every step."""
        table, merger, state = torch.from_numpy(rows), Ties(density=density, aggregate="max"), None
        cut = 8 - int(8 * density)
        bounds = table.abs().sort(dim=1).values[:, cut - 1 : cut] if cut else torch.zeros(5, 1)
        trimmed = torch.where(table.abs() >= bounds, table, 0)
        for step, row in enumerate(table, 1):
            state = fold_weighted(merger, state, {"w": row[None]}, 1.0)
            sign = trimmed[:step].sum(0).sign()
            sign[sign == 0] = sign.sum().sign()
            agreeing = torch.where(trimmed[:step].sign() == sign, trimmed[:step].abs(), 0)
            assert torch.equal(delta(merger, state)["w"][0], agreeing.amax(0) * sign)

    @pytest.mark.parametrize("aggregate", ["mean", "sum"])
    def test_a_weight_of_two_is_the_update_twice(self, aggregate: Any) -> None:
        several, merger = updates(3), Ties(aggregate=aggregate)
        found, expected = weighted(merger, several, [1.0, 2.0, 1.0]), fold_all(merger, [several[1], *several])
        for name, tensor in delta(merger, expected).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-10)

    def test_equal_weights_other_than_one_change_nothing_of_a_mean(self) -> None:
        several = updates(3)
        found, expected = (weighted(Ties(), several, [weight] * 3) for weight in (0.25, 1.0))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)

    def test_ties_of_the_election(self) -> None:
        several = one([2.0, -1.0, -4.0, -3.0], [-2.0, -1.0, -4.0, 3.0])
        same(delta(Ties(density=1.0), fold_all(Ties(density=1.0), several)), -2.0, -1.0, -4.0, -3.0)
        positive = Ties(density=1.0, tie="positive")
        same(delta(positive, fold_all(positive, several)), 2.0, -1.0, -4.0, 3.0)

    def test_where_the_whole_model_is_undecided_nothing_is_merged(self) -> None:
        same(delta(Ties(density=1.0), fold_all(Ties(density=1.0), one([2.0, -1.0], [-2.0, 1.0]))), 0.0, 0.0)

    @pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.99, 1.0])
    def test_trimming_a_tensor_keeps_exactly_the_share(self, density: float) -> None:
        """Magnitudes are all of three values, so that the threshold alone would keep more."""
        generator = torch.Generator().manual_seed(0)
        sizes = {"a": (7, 9), "b": (1, 40), "c": (), "d": (0, 3)}
        signs = {name: torch.randint(0, 2, size, generator=generator) * 2 - 1 for name, size in sizes.items()}
        update = {name: sign * torch.randint(1, 4, sign.shape, generator=generator) for name, sign in signs.items()}
        update = {name: tensor.float() for name, tensor in update.items()}
        merger = Ties(density=density, trim="tensor")
        for name, tensor in delta(merger, fold_all(merger, [update])).items():
            kept = tensor != 0
            assert kept.sum() == int(density * tensor.numel())
            assert torch.equal(tensor[kept], update[name][kept])
            if 0 < kept.sum() < tensor.numel():
                assert update[name][kept].abs().min() >= update[name][~kept].abs().max()

    @pytest.mark.parametrize(("trim", "kept"), [("model", 0), ("tensor", 10)])
    def test_a_tensor_of_small_changes_is_lost_if_the_model_is_trimmed(self, trim: Any, kept: int) -> None:
        update = {"large.weight": torch.full((5, 5), 2.0), "small.weight": torch.full((4, 5), 1.0)}
        merger = Ties(density=0.5, trim=trim)
        assert torch.count_nonzero(delta(merger, fold_all(merger, [update]))["small.weight"]) == kept

    @pytest.mark.parametrize("trim", ["model", "tensor"])
    def test_all_and_next_to_nothing(self, trim: Any) -> None:
        """density 1 keeps everything (the released code fails at it); a tiny one keeps one entry, or none by tensor."""
        update = updates(1)[0]
        whole, tiny = Ties(density=1.0, trim=trim), Ties(density=1e-9, trim=trim)
        assert all(
            torch.equal(tensor, update[name]) for name, tensor in delta(whole, fold_all(whole, [update])).items()
        )
        left = delta(tiny, fold_all(tiny, [update]))
        assert sum(int(torch.count_nonzero(tensor)) for tensor in left.values()) == (1 if trim == "model" else 0)


class TestContinualTies:
    @staticmethod
    def formula(several: list[Update], density: float, scale: float, aggregate: str) -> Tensor:
        """The recursion on whole vectors, each step by sorting. Of d magnitudes, d - int(density d) lie below."""
        merged = several[0]["w"].flatten() * scale
        for update in several[1:]:
            rows = torch.stack([merged, update["w"].flatten()])
            sizes, trimmed = rows.abs().sort(dim=1).values, rows.clone()
            dropped = rows.shape[1] - int(density * rows.shape[1])
            if dropped:
                trimmed[rows.abs() < sizes[:, dropped - 1 : dropped]] = 0
            elected = trimmed.sum(0).sign()
            elected[elected == 0] = elected.sum().sign()
            agreeing = torch.where(trimmed * elected > 0, trimmed, 0)
            found = {
                "sum": agreeing.sum(0),
                "mean": agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1),
                "max": agreeing.abs().amax(0) * elected,
            }
            merged = merged + scale * found[aggregate]
        return merged

    @pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
    @pytest.mark.parametrize("density", [0.1, 0.2, 0.7, 1.0])
    def test_it_is_the_recursion(self, density: float, aggregate: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        several = [{"w": torch.randn(11, 9, generator=generator, dtype=torch.float64)} for _ in range(5)]
        merger = ContinualTies(density=density, scale=0.4, aggregate=aggregate)
        expected = self.formula(several, density, 0.4, aggregate)
        found = weighted(merger, several, [1.0] * 5)["w"].flatten()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_values_that_cancel_take_the_majority_of_the_step(self) -> None:
        """The state is half of the first update: 1, -1, -1; the newcomer cancels its first entry."""
        several = one([2.0, -2.0, -2.0], [-1.0, -3.0, -3.0])
        same(weighted(ContinualTies(density=1.0), several, [1.0, 1.0]), 1 + 0.5 * -1, -1 + 0.5 * -4, -1 + 0.5 * -4)

    def test_an_update_of_zeros_changes_nothing(self) -> None:
        same(weighted(ContinualTies(density=1.0), one([2.0, -2.0], [0.0, 0.0]), [1.0, 1.0]), 1.0, -1.0)


class TestMagmax:
    def test_the_later_update_wins_ties(self) -> None:
        merger = Magmax(scale=1.0)
        same(delta(merger, fold_all(merger, one([1.0, -3.0, 0.0], [-1.0, 2.0, 0.5], [1.0, 3.0, 0.1]))), 1.0, 3.0, 0.5)

    @settings(max_examples=50, deadline=None)
    @given(arrays.arrays("float64", (4, 6), elements=st.floats(-9, 9, width=32)))
    def test_streaming_is_the_maximum_over_all(self, rows: Any) -> None:
        """And repeating an update that was merged changes nothing but ties, whose magnitude stays."""
        table, merger = torch.from_numpy(rows), Magmax(scale=1.0)
        several = [{"w": row[None]} for row in table]
        merged = delta(merger, fold_all(merger, several))["w"][0]
        assert torch.equal(merged.abs(), table.abs().amax(0))
        assert all(merged[column] in table[:, column] for column in range(6))
        again = delta(merger, fold_all(merger, [*several, several[0]]))["w"][0]
        assert torch.equal(again.abs(), merged.abs())


class TestVarm:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1e-30, 1e-4, 1.0, 1e12]))
    def test_it_is_equation_7(self, count: int, seed: int, size: float) -> None:
        """In every order, and at any size of the updates: cubes of 1e-30 are nothing in float32."""
        generator = torch.Generator().manual_seed(seed)
        stds = torch.rand(count, generator=generator)
        taus = [torch.randn(3, 5, generator=generator) * std * size for std in stds]
        squares = torch.stack([tau.double().square().mean() for tau in taus])
        expected = sum(weight * tau.double() for weight, tau in zip(squares / squares.sum(), taus, strict=True))
        for order in (taus, taus[::-1]):
            found = delta(Varm(), fold_all(Varm(), [{"l.weight": tau} for tau in order]))["l.weight"]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6 * size)

    def test_every_tensor_has_weights_of_its_own(self) -> None:
        first = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([1.0])}
        second = {"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([3.0])}
        merged = delta(Varm(), fold_all(Varm(), [first, second]))
        torch.testing.assert_close(merged["a"], torch.tensor([2.6, 2.8]))
        torch.testing.assert_close(merged["b"], torch.tensor([2.8]))

    @pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1, 3)])
    def test_odd_shapes_and_zeros(self, shape: tuple[int, ...]) -> None:
        zero, ones = {"w": torch.zeros(shape)}, {"w": torch.ones(shape)}
        assert torch.equal(delta(Varm(), fold_all(Varm(), [zero, zero]))["w"], zero["w"])
        assert torch.equal(delta(Varm(), fold_all(Varm(), [zero, ones, zero]))["w"], ones["w"])


class TestBreadcrumbs:
    @staticmethod
    def formula(tau: Tensor, density: float, gamma: float) -> Tensor:
        """What is left of one tensor of different magnitudes: a slice of the sorted ones."""
        order = tau.flatten().abs().argsort()
        count = tau.numel()
        top = min(int(gamma * count), count - int(density * count))
        bottom = count - int(density * count) - top
        kept = torch.zeros(count, dtype=torch.bool)
        kept[order[bottom : count - top]] = True
        return torch.where(kept.reshape(tau.shape), tau, 0)

    @pytest.mark.parametrize(
        ("density", "gamma"), [(0.9, 0.01), (0.1, 0.05), (0.5, 0.5), (0.8, 0.6), (1.0, 0.1), (0.3, 0)]
    )
    @pytest.mark.parametrize("shape", [(40, 25), (300,), (6, 5)])
    def test_it_is_the_formula(self, density: float, gamma: float, shape: tuple[int, ...]) -> None:
        """(6, 5) has no top at gamma 0.01, where mergekit drops everything."""
        generator = torch.Generator().manual_seed(1)
        several = [{"w": torch.randn(shape, generator=generator, dtype=torch.float64)} for _ in range(3)]
        weights, merger = [1.0, 0.5, 2.0], Breadcrumbs(density=density, gamma=gamma, scale=0.3)
        thinned = [self.formula(update["w"], density, gamma) for update in several]
        expected = 0.3 * sum(weight * one for weight, one in zip(weights, thinned, strict=True))
        torch.testing.assert_close(weighted(merger, several, weights)["w"], expected, rtol=0, atol=1e-12)

    def test_of_equal_magnitudes_exactly_the_share_is_kept(self) -> None:
        thinned = Breadcrumbs(density=0.5, gamma=0.25).thinned(torch.ones(5, 8))
        assert torch.count_nonzero(thinned) == 20

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (1, 3)])
    def test_a_small_tensor_is_not_lost(self, shape: tuple[int, ...]) -> None:
        tau = torch.full(shape, 2.0)
        assert torch.count_nonzero(Breadcrumbs(density=0.1, gamma=0.2).thinned(tau)) == min(tau.numel(), 1)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ContinualTies, "density", 0.0),
        (ContinualTies, "scale", 0.0),
        (Magmax, "scale", -0.5),
        (Breadcrumbs, "density", 1.5),
        (Breadcrumbs, "gamma", 1.0),
        (Breadcrumbs, "scale", 0.0),
    ],
)
def test_invalid_settings(kind: type, field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=field):
        kind(**{field: value})
