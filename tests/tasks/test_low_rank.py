"""Low rank: the best factors of their width, with as few columns as the energy takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.codecs import Coded, Leaf
from tasks.codecs.low_rank import LowRank


def coded(codec: LowRank, delta: Tensor) -> Coded:
    return codec.encode(Leaf("fc1.weight", "linear.weight", delta), {})


def product(found: Coded) -> Tensor:
    return found.parts["B.tensor"].float() @ found.parts["A.tensor"].float()


def falling(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A matrix with the singular values 1, 1/2, 1/4 ..., and those."""
    generator = torch.Generator().manual_seed(0)
    k = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator))[0] for n in (rows, columns))
    values = 0.5 ** torch.arange(k)
    return left * values @ right.T, values


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_the_fewest_columns_with_that_energy(shape: tuple[int, int], energy: float) -> None:
    delta, values = falling(*shape)
    found = coded(LowRank(energy=energy, values="f32"), delta)
    share = values.double().square().cumsum(0) / values.double().square().sum()
    assert found.rank == int((share < energy).sum()) + 1
    lost = float((product(found) - delta).norm() ** 2 / delta.norm() ** 2)
    assert lost == pytest.approx(1 - float(share[found.rank - 1]), abs=1e-5)


def test_a_rank_by_number_and_numbers_of_half_the_width() -> None:
    delta, _ = falling(50, 60)
    found = coded(LowRank(rank=5), delta)
    assert found.rank == 5 and found.parts["A.tensor"].dtype == torch.bfloat16
    best = coded(LowRank(rank=5, values="f32"), delta)
    assert (product(found) - product(best)).norm() < 0.01 * delta.norm()


def test_the_signs_of_a_pair_are_always_the_same() -> None:
    delta, _ = falling(40, 30)
    one, other = (coded(LowRank(rank=3, values="f32"), sign * delta) for sign in (1, -1))
    torch.testing.assert_close(one.parts["B.tensor"], other.parts["B.tensor"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("delta", [torch.randn(64, 64), torch.randn(7), torch.randn(1, 9), torch.randn(2, 3, 4)])
def test_what_factors_would_not_make_smaller_stays(delta: Tensor) -> None:
    found = coded(LowRank(energy=1.0, values="f32"), delta)
    assert found.rank is None and torch.equal(found.parts["tensor"], delta)


def test_numbers_beyond_the_dtype_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="fc1"):
        coded(LowRank(), torch.full((3,), 3.4e38))
