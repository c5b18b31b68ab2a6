"""DARE and DELLA against their formulas and references, and the numbers that masks are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.sparsifiers import Dare, Della
from tasks.sparsifiers.base import uniform
from tests.tasks.test_merging import CASES, GOLDEN, check_merged, golden_update


def test_dare_is_fusion_bench() -> None:
    """The reference draws from torch's global generator, parameter by parameter in the order of the module, task by
    task; with the same masks the arithmetic must be the same. 5e-7, float32."""
    file = "fb_dare_ta_32.safetensors"
    case: dict[str, Any] = CASES[file]
    order = json.loads((GOLDEN / "manifest.json").read_text())["shapes"]
    dare = Dare(density=1 - case["sparsity_ratio"])
    generator = torch.Generator().manual_seed(case["torch_manual_seed"])
    total = {name: torch.zeros(shape) for name, shape in order.items()}
    for task in range(4):
        update = golden_update(task, torch.float32)
        for name, shape in order.items():
            kept = torch.rand(shape, generator=generator) > case["sparsity_ratio"]
            total[name] = total[name] + dare.rescaled(update[name], kept)
    check_merged({name: tensor * case["scaling_factor"] for name, tensor in total.items()}, file, 5e-7)


def test_dare_keeps_what_its_numbers_say() -> None:
    delta = torch.arange(1.0, 101.0).reshape(4, 25)
    drawn = uniform(delta, 3, "update/a", "w")
    thinned = Dare(density=0.25, seed=3).thin(delta, "update/a", "w")
    assert torch.equal(thinned, torch.where(drawn < 0.25, delta * 4, 0))


def magprune(delta: Tensor, drawn: Tensor, density: float, epsilon: float, l1: bool) -> Tensor:
    """mergekit's formula, entry by entry: the rank in the row, the probability of it, then the rescaling."""
    result = torch.zeros_like(delta)
    for row, numbers, out in zip(delta.flatten(1), drawn.flatten(1), result.flatten(1), strict=True):
        for place, value in enumerate(row.tolist()):
            rank = sum(abs(other) < abs(value) for other in row.tolist())
            chance = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
            if numbers[place] < chance:
                out[place] = value if l1 else value / chance
    return result * (delta.abs().sum() / result.abs().sum()) if l1 else result


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.1), (0.5, 0.5 - 1e-9), (0.9, 0.1), (0.4, 0.0)])
@pytest.mark.parametrize("shape", [(6, 11), (1, 30), (4, 3, 2, 2)], ids=str)
def test_della_is_magprune(shape: tuple[int, ...], density: float, epsilon: float, rescale: Any) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    della = Della(density=density, epsilon=epsilon, seed=5, rescale=rescale)
    drawn = uniform(delta, 5, "update/a", "w")
    expected = magprune(delta, drawn, density, epsilon, rescale == "l1")
    torch.testing.assert_close(della.thin(delta, "update/a", "w"), expected, rtol=1e-12, atol=0)


def test_della_takes_a_vector_for_one_row() -> None:
    delta = torch.randn(40, generator=torch.Generator().manual_seed(2))
    row = Della().thin(delta[None], "update/a", "w")
    assert torch.equal(Della().thin(delta, "update/a", "w"), row[0])
    assert Della().probability(delta)[delta.abs().argmax()] == pytest.approx(0.4)
    assert Della().probability(delta)[delta.abs().argmin()] == pytest.approx(0.2)


def test_della_spares_the_large() -> None:
    """Over many rows the largest entry is kept in 0.8 of them and the smallest in 0.2, within five deviations."""
    delta = torch.arange(1.0, 6.0).expand(20000, 5)
    kept = (Della(density=0.5, epsilon=0.3).thin(delta, "update/a", "w") != 0).double().mean(0)
    expected = torch.tensor([0.2, 0.35, 0.5, 0.65, 0.8], dtype=torch.float64)
    torch.testing.assert_close(kept, expected, rtol=0, atol=5 * 0.5 / 20000**0.5)


def test_the_numbers_never_change() -> None:
    """Masks of stored states depend on them: these must be the same on every machine and with every version."""
    drawn = uniform(torch.empty(5), 0, "update/abc", "layer.weight") * 2**24
    assert drawn.tolist() == [2015476, 5793531, 2468424, 3318683, 15249987]


def test_the_numbers_are_uniform() -> None:
    """Mean, variance, and the largest gap of the distribution function (Kolmogorov), at a chance of 1e-6 to fail."""
    drawn = uniform(torch.empty(300, 100), 1, "update/abc", "w").double().flatten()
    assert drawn.min() >= 0 and drawn.max() < 1
    count = drawn.numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (drawn.sort().values - steps).abs().max() < 2.7 / count**0.5
    assert torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].abs() < 5 / count**0.5


def test_longer_tensors_begin_alike() -> None:
    """The numbers of an entry depend on its place alone, so that odd sizes lose nothing."""
    whole = uniform(torch.empty(9), 0, "u", "w")
    assert all(torch.equal(uniform(torch.empty(size), 0, "u", "w"), whole[:size]) for size in range(9))


@pytest.mark.parametrize(
    ("kind", "changed", "field"),
    [
        (Dare, {"density": 0.0}, "density"),
        (Dare, {"density": 1.1}, "density"),
        (Della, {"density": 0.0}, "density"),
        (Della, {"density": 0.1, "epsilon": 0.1}, "epsilon"),
        (Della, {"density": 0.95, "epsilon": 0.1}, "epsilon"),
        (Della, {"epsilon": -0.1}, "epsilon"),
    ],
)
def test_invalid_settings(kind: Any, changed: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        kind(**changed)
