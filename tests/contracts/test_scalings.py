"""The contract of scalings: what every scaling promises. The table drives it, so a new one is tested when listed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from storage.errors import InvalidInput
from storage.manifest import canonical
from tasks.mergers import Facts, TaskArithmetic
from tasks.recipe import Recipe
from tasks.scalings import SCALINGS, AnyScaling, Lines, MatchNorm

Update = dict[str, Tensor]

SHAPES = {
    "embed.weight": (9, 4),
    "layers.0.fc.bias": (6,),
    "layers.0.fc.weight": (6, 4),
    "layers.1.fc.weight": (6, 4),
    "layers.2.empty": (0, 4),
    "layers.2.fc.weight": (6, 4),
    "temperature": (),
}
SCALED = {
    **{name: kind() for name, kind in SCALINGS.items()},
    "match_norm of 2": MatchNorm(factor=2.0),
    "match_norm in quadrature": MatchNorm(norm="quadrature"),
    "lines of one task": Lines(rule="single", alpha=0.3),
}

# those that look at a mean of the updates; `quadrature` takes them for orthogonal, which repeats are not
MEANS = [SCALED[name] for name in ("match_norm", "match_norm of 2", "lines")]


def drawn(seed: int, size: float = 0.01, dtype: torch.dtype = torch.float32) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * size).to(dtype) for name, shape in SHAPES.items()}


def zeros() -> Update:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def facts_of(scaling: AnyScaling, updates: Sequence[Update], weights: Sequence[float]) -> Facts:
    """What folding keeps for a scaling after these updates, without a store."""
    facts: Facts = {}
    total: Update | None = None
    for update, weight in zip(updates, weights, strict=True):
        share = {name: delta * weight for name, delta in update.items()}
        total = share if total is None else {name: total[name] + one for name, one in share.items()}
        sums: dict[str, float] = {}
        for name, delta in update.items():
            for key, value in scaling.share(delta, total[name] if scaling.needs_total else None).items():
                sums[key] = sums.get(key, 0.0) + value
        facts = scaling.close(facts, sums, weight)
        facts = json.loads(canonical(dict(facts)))  # all that is kept between two merges
    return facts


def factors(
    scaling: AnyScaling, updates: Sequence[Update], merged: Update, weights: Sequence[float] = ()
) -> Mapping[str, float]:
    facts = facts_of(scaling, updates, weights or [1.0] * len(updates))
    measured: dict[str, float] = {}
    for delta in merged.values():
        for key, value in scaling.measure(delta).items():
            measured[key] = measured.get(key, 0.0) + value
    return scaling.factors(list(merged), float(len(updates)), facts, measured)


def added(updates: Sequence[Update], scale: float = 1.0) -> Update:
    return {name: torch.stack([one[name] for one in updates]).sum(0) * scale for name in SHAPES}


@pytest.fixture(params=SCALED.values(), ids=SCALED.keys())
def scaling(request: pytest.FixtureRequest) -> AnyScaling:
    """Every scaling of the table with its defaults, and those that have another rule."""
    made: AnyScaling = request.param
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_tensor_has_a_factor_that_is_finite(scaling: AnyScaling, count: int, dtype: torch.dtype) -> None:
    updates = [drawn(seed, dtype=dtype) for seed in range(count)]
    found = factors(scaling, updates, added(updates))
    assert list(found) == list(SHAPES)
    assert all(math.isfinite(factor) and factor > 0 for factor in found.values())


def test_zeros_are_scaled_to_zeros(scaling: AnyScaling) -> None:
    """No update moved anything; or what they moved cancels out."""
    one = drawn(1)
    opposite = {name: -delta for name, delta in one.items()}
    for updates in ([zeros()], [zeros(), zeros()], [one, opposite]):
        found = factors(scaling, updates, added(updates))
        assert all(math.isfinite(factor) and factor >= 0 for factor in found.values())


def test_an_update_of_zeros_is_one_of_them(scaling: AnyScaling) -> None:
    updates = [drawn(1), zeros()]
    found, alone = factors(scaling, updates, drawn(1)), factors(scaling, updates[:1], drawn(1))
    assert all(math.isfinite(factor) for factor in found.values())
    if scaling in MEANS:
        assert found["embed.weight"] == pytest.approx(alone["embed.weight"] / 2)


def test_single_precision_measures_like_double_precision(scaling: AnyScaling) -> None:
    several = {dtype: [drawn(seed, dtype=dtype) for seed in (1, 2, 3)] for dtype in (torch.float32, torch.float64)}
    single, double = (factors(scaling, updates, added(updates)) for updates in several.values())
    assert single == pytest.approx(double, rel=1e-6)


@pytest.mark.parametrize("scaling", MEANS, ids=str)
def test_weights_are_repeats(scaling: AnyScaling) -> None:
    """An update of weight 3 counts like three of it, where the merged delta is the same."""
    one, two = drawn(1), drawn(2, size=0.03)
    merged = added([one, one, one, two], 0.3)
    weighed = factors(scaling, [one, two], merged, [3.0, 1.0])
    assert weighed == pytest.approx(factors(scaling, [one, one, one, two], merged), rel=1e-6)


@pytest.mark.parametrize("scaling", [MatchNorm(), Lines()], ids=lambda one: one.name)
def test_what_the_merger_scales_by_cancels_out(scaling: AnyScaling) -> None:
    """At one update the line is flat; at more, its beginning scales against the merger."""
    for updates in ([drawn(1)], [drawn(1), drawn(2)]):
        one, ten = (factors(scaling, updates, added(updates, scale))["embed.weight"] for scale in (1.0, 10.0))
        assert one == pytest.approx(10 * ten)


@pytest.mark.parametrize("scaling", [MatchNorm(), Lines()], ids=lambda one: one.name)
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_one_update_is_written_as_it_is(scaling: AnyScaling, weight: float) -> None:
    """Whatever its weight, and whatever scale the merger has."""
    for scale in (1.0, 0.3):
        merged = added([drawn(1)], scale * weight)
        found = factors(scaling, [drawn(1)], merged, [weight])
        for name, delta in drawn(1).items():
            torch.testing.assert_close(merged[name] * found[name], delta, rtol=1e-6, atol=0)


def test_settings_are_all_a_scaling_is(scaling: AnyScaling) -> None:
    assert SCALINGS[scaling.name](**json.loads(canonical(scaling.spec()))) == scaling
    recipe = Recipe(TaskArithmetic(), scaling=scaling)
    assert Recipe.from_spec(json.loads(canonical(recipe.spec())), "here") == recipe


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        (MatchNorm, {"factor": 0.0}, "factor"),
        (Lines, {"alpha": 0.1}, "alpha"),
        (Lines, {"beta": -0.1}, "beta"),
        (Lines, {"rule": "single"}, "alpha"),
        (Lines, {"rule": "single", "alpha": 1.1}, "alpha"),
        (Lines, {"rule": "single", "alpha": 0.1, "beta": 0.9}, "beta"),
    ],
)
def test_invalid_settings(kind: type, settings: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        kind(**settings)
