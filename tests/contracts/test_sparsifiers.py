"""The contract of sparsifiers: what each of them promises. The table drives it, so a new one is tested when listed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from storage.manifest import canonical
from tasks.sparsifiers import SPARSIFIERS, Sparsifier

UPDATE, NAME = "update/one", "layer.weight"
SHAPES = [(), (1,), (0,), (0, 4), (1, 9), (9, 1), (7, 5), (4, 3, 2, 2)]


@pytest.fixture(params=SPARSIFIERS.values(), ids=SPARSIFIERS.keys())
def sparsifier(request: pytest.FixtureRequest) -> Sparsifier:
    """Every sparsifier of the table, with its defaults."""
    made: Sparsifier = request.param()
    return made


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def of_every_kind(sparsifier: Sparsifier) -> list[Sparsifier]:
    """The sparsifier with each of its rules of rescaling."""
    kind: Any = type(sparsifier)
    rules = get_args(get_type_hints(kind)["rescale"])
    assert "l1" in rules and len(rules) > 1
    return [kind(rescale=rule) for rule in rules]


def test_the_same_every_time_whatever_else_happens(sparsifier: Sparsifier) -> None:
    """Neither torch's global numbers, nor other tensors, nor threads have a say; nor are those numbers drawn from."""
    delta = some(60, 50)
    expected = sparsifier.thin(delta, UPDATE, NAME)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sparsifier.thin(some(20, 20), UPDATE, "another.weight")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(sparsifier.thin, delta, UPDATE, NAME) for _ in range(8)]
        assert all(torch.equal(job.result(), expected) for job in jobs)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_update_tensor_or_seed_has_another_mask(sparsifier: Sparsifier) -> None:
    """Each drops others: of two independent masks of density p, entries agree with chance 1 - 2 p (1 - p) or less."""
    delta, kind = some(60, 50), type(sparsifier)
    reseeded = kind(**{**sparsifier.spec(), "seed": 1})
    masks = [
        one.thin(delta, update, name) != 0
        for one, update, name in [
            (sparsifier, UPDATE, NAME),
            (sparsifier, "update/two", NAME),
            (sparsifier, UPDATE, "layer.bias"),
            (reseeded, UPDATE, NAME),
        ]
    ]
    for place, mask in enumerate(masks):
        for other in masks[:place]:
            assert (mask == other).double().mean() < 0.95


def test_density_is_the_share_that_is_kept(sparsifier: Sparsifier) -> None:
    kind: Any = type(sparsifier)
    delta = some(200, 100)
    for density in (0.2, 0.5, 0.8):
        kept = torch.count_nonzero(kind(density=density).thin(delta, UPDATE, NAME)) / delta.numel()
        assert kept == pytest.approx(density, abs=5 * (0.25 / delta.numel()) ** 0.5)  # five deviations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(sparsifier: Sparsifier, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is kept has the sign it had, what was zero stays zero, and the input stays as it is."""
    delta = some(*shape, dtype=dtype)
    delta[delta < -0.5] = 0
    kept = delta.clone()
    for one in of_every_kind(sparsifier):
        thinned = one.thin(delta, UPDATE, NAME)
        assert torch.equal(delta, kept)
        assert (thinned.shape, thinned.dtype) == (delta.shape, delta.dtype)
        assert torch.isfinite(thinned).all()
        assert ((thinned == 0) | (thinned.sign() == delta.sign())).all()
        assert torch.equal(one.thin(torch.zeros_like(delta), UPDATE, NAME), torch.zeros_like(delta))


def test_a_view_is_thinned_like_its_copy(sparsifier: Sparsifier) -> None:
    view = some(12, 8).T[::2]
    assert torch.equal(sparsifier.thin(view, UPDATE, NAME), sparsifier.thin(view.contiguous(), UPDATE, NAME))


def test_density_one_is_the_identity(sparsifier: Sparsifier) -> None:
    kind: Any = type(sparsifier)
    delta = some(30, 20)
    assert torch.equal(kind(density=1.0).thin(delta, UPDATE, NAME), delta)


def test_the_expectation_stays(sparsifier: Sparsifier) -> None:
    """With the paper's rescaling, the mean over many seeds is the update; five deviations of every entry."""
    kind: Any = type(sparsifier)
    delta, seeds = some(5, 8, dtype=torch.float64), 4000
    several = torch.stack([kind(density=0.4, seed=seed).thin(delta, UPDATE, NAME) for seed in range(seeds)])
    error = several.std(0) / seeds**0.5
    assert ((several.mean(0) - delta).abs() <= 5 * error).all()
    assert (error > 0).all()


def test_l1_keeps_the_norm(sparsifier: Sparsifier) -> None:
    kind: Any = type(sparsifier)
    delta = some(30, 20, dtype=torch.float64)
    thinned = kind(rescale="l1").thin(delta, UPDATE, NAME)
    assert thinned.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-12)


def test_settings_are_all_a_sparsifier_is(sparsifier: Sparsifier) -> None:
    spec = json.loads(canonical(sparsifier.spec()))
    assert SPARSIFIERS[sparsifier.name](**spec) == sparsifier
    assert sparsifier.source
