"""What an inspection counts of a tensor, against the formulas written out in plain Python."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tasks.inspection import measure
from tasks.inspection.measure import (
    Moments,
    changed_bits,
    numbers_of,
    ranks_of,
    step_entropy,
    ternary_bound,
    values_of_product,
)
from tasks.kinds import fine_kind_of
from tasks.spectrum import singular_values


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kurtosis(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    second, fourth = (math.fsum((one - mean) ** power for one in values) / len(values) for power in (2, 4))
    return fourth / second**2 - 3


@pytest.mark.parametrize("values", [drawn(999).exp() + 5, drawn(500) ** 3 * 1e-6, torch.arange(7.0)], ids=len)
def test_moments_of_pieces_are_those_of_the_whole(values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PIECE", 64)
    found, changed, beyond = numbers_of(values, (0.0, 1e-6, 4.0))
    plain = values.double().tolist()
    assert found.count == len(plain)
    assert found.squares == pytest.approx(math.fsum(one * one for one in plain), rel=1e-12)
    assert found.kurtosis == pytest.approx(kurtosis(plain), rel=1e-9)
    assert changed == sum(one != 0 for one in plain)
    assert beyond == tuple(sum(abs(one) > tolerance for one in plain) for tolerance in (0.0, 1e-6, 4.0))


def test_known_kurtosis() -> None:
    """-2 for two values that are as likely; 0 for a normal distribution; none for a constant or nothing."""
    assert numbers_of(torch.tensor([-1.0, 1.0] * 50), ())[0].kurtosis == pytest.approx(-2)
    assert numbers_of(drawn(200_000), ())[0].kurtosis == pytest.approx(0, abs=0.05)
    for flat in (torch.full((9,), 2.0), torch.empty(0), torch.tensor(3.0)):
        assert numbers_of(flat, ())[0].kurtosis is None
    assert numbers_of(torch.empty(0), ())[0] == Moments()


def test_a_tolerance_is_not_beyond_itself() -> None:
    """|delta| <= tolerance counts as equal, as in the paper's code."""
    delta = torch.tensor([0.0, -0.5, 0.5, 0.75, -1.0])
    assert numbers_of(delta, (0.5, 0.75))[1:] == (4, (2, 1))


def test_bits_tell_minus_zero_from_zero() -> None:
    base, tuned = torch.tensor([0.0, 1.0, 2.0, -0.0]), torch.tensor([-0.0, 1.0, 2.5, -0.0])
    assert changed_bits(base, tuned) == 2
    assert changed_bits(base.bfloat16(), base.bfloat16()) == 0


def test_ternary_bound() -> None:
    """The figures of a table of limits: 0.0908, 0.3364, 0.5690, 0.9219 and 1.5 bits."""
    for share, bits in ((0.01, 0.0908), (0.05, 0.3364), (0.1, 0.5690), (0.2, 0.9219), (0.5, 1.5)):
        assert ternary_bound(round(share * 10_000), 10_000) / 10_000 == pytest.approx(bits, abs=5e-5)
    assert ternary_bound(0, 10) == ternary_bound(0, 0) == 0
    assert ternary_bound(10, 10) == 10


def bits(number: float) -> int:
    """A bfloat16 as an integer."""
    return int(struct.unpack(">H", struct.pack(">f", number)[:2])[0])


def test_entropy_of_steps_given_the_exponent() -> None:
    base = (drawn(5000) * 0.02).bfloat16()
    tuned = (base.float() + drawn(5000, seed=1) * 1e-4).bfloat16()
    old, new = base.tolist(), tuned.tolist()
    exponents = [struct.unpack(">H", struct.pack(">f", abs(one))[:2])[0] >> 7 for one in old]
    pairs = list(zip(exponents, ((bits(b) - bits(a)) % 65_536 for a, b in zip(old, new, strict=True)), strict=True))
    alone, joint = Counter(exponents), Counter(pairs)
    wanted = -sum(count * math.log2(count / alone[exponent]) for (exponent, _), count in joint.items())
    assert len(joint) > 2 * len(alone) > 10
    assert step_entropy(base, tuned) == pytest.approx(wanted, rel=1e-9)
    assert step_entropy(base, base) == 0
    # without the exponent it is more
    steps = Counter(step for _, step in pairs)
    assert wanted < -sum(count * math.log2(count / 5000) for count in steps.values())


def test_entropy_of_steps_is_for_halves() -> None:
    wide = drawn(10)
    assert step_entropy(wide, wide + 1) is None
    assert step_entropy(wide.bfloat16(), wide) is None
    assert step_entropy(wide.half(), wide.half()) == 0
    assert step_entropy(torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)) == 0


def test_ranks_of_known_values() -> None:
    equal = ranks_of(torch.ones(8, dtype=torch.float64), 8, 20)
    assert equal is not None
    assert (equal.side, equal.rank) == (8, 8)
    assert (equal.effective, equal.stable) == (pytest.approx(8), pytest.approx(8))
    one = ranks_of(torch.tensor([5.0, 0, 0]).double(), 3, 3)
    assert one is not None and (one.rank, one.effective, one.stable) == (1, pytest.approx(1), 1)
    two = ranks_of(torch.tensor([3.0, 1.0]).double(), 2, 9)
    assert two is not None
    assert two.effective == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert two.stable == pytest.approx(10 / 9)
    assert ranks_of(torch.zeros(4).double(), 4, 4) is None


def test_square_noise_has_four_fifths_of_its_side() -> None:
    found = ranks_of(singular_values(drawn(300, 300)), 300, 300)
    assert found is not None and found.rank == 300
    assert found.effective / 300 == pytest.approx(0.8, abs=0.03)
    exact = torch.linalg.svdvals(drawn(300, 300).double())
    assert found.stable == pytest.approx(float(exact.square().sum() / exact[0] ** 2), rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 4, 20), (3, 7, 20), (30, 7, 2)], ids=str)
def test_values_of_a_product(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    left, right = drawn(rows, rank), drawn(rank, columns, seed=1)
    exact = torch.linalg.svdvals(left.double() @ right.double())[: min(shape)]
    torch.testing.assert_close(values_of_product(left, right), exact, rtol=1e-9, atol=1e-9)


def test_moments_add_in_any_grouping() -> None:
    rng = random.Random(0)
    values = [rng.expovariate(1) for _ in range(300)]
    cuts = [0, *sorted(rng.sample(range(300), 6)), 300]
    parts = [numbers_of(torch.tensor(values[a:b], dtype=torch.float64), ())[0] for a, b in pairwise(cuts)]
    left = sum(parts, Moments())
    right = parts[-1]
    for one in reversed(parts[:-1]):
        right = one + right
    for found in (left, right):
        assert found.kurtosis == pytest.approx(kurtosis(values), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "role", "kind"),
    [
        ("layers.0.self_attn.q_proj.weight", "linear.weight", "attention"),
        ("layers.0.self_attn.q_proj.bias", "linear.bias", "bias"),
        ("layers.0.norm.weight", "norm.weight", "norm"),
        ("layers.0.norm.bias", "norm.bias", "norm"),
        ("cls_token", "bare", "other"),
        ("patch.weight", "conv.weight", "other"),
        ("patch.bias", "conv.bias", "bias"),
        ("embed.weight", "embedding.weight", "embedding"),
    ],
)
def test_finer_kinds(name: str, role: str, kind: str) -> None:
    assert fine_kind_of(name, role) == kind
