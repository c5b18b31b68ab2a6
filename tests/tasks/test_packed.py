"""Arithmetic on planes of bits gives what float64 arithmetic on the dense tensors gives."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.errors import Damaged, DeltaworksError, InvalidInput, Mismatch
from tasks.codecs import Leaf, Parts, Ternary
from tasks.codecs.streams import meta_of, with_meta
from tasks.packed import (
    Planes,
    conflict_plane,
    counts,
    dot,
    norm,
    overlap,
    planes_of,
    sign_conflicts,
    signs_of,
    squared,
    total,
    unpacked,
)

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 1000, 65_536, 65_537, 200_003]
DENSITIES = [0.0, 0.001, 0.1, 0.5, 0.99, 1.0]


def ternary(shape: tuple[int, ...], density: float, scale: float, seed: int) -> Tensor:
    """Entries 0, `scale` and -`scale`."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, (torch.rand(shape, generator=generator) < 0.6) * 2.0 - 1.0, 0.0) * scale


def parts_of(dense: Tensor) -> Parts:
    """A ternary tensor as it is stored."""
    top = float(dense.abs().max()) if dense.numel() else 0.0
    return Ternary().encode(Leaf("w", "bare", dense), {"threshold": top, "magnitude": top}).parts


def packed(dense: Tensor) -> Planes:
    return planes_of(parts_of(dense), tuple(dense.shape))


def dense_of(planes: Planes) -> np.ndarray:
    return planes.scale * planes.signs(0, planes.elements).astype(np.float64)


def check(one: Tensor, other: Tensor) -> None:
    """All operations on a pair, against float64 on the dense tensors."""
    a, b = packed(one), packed(other)
    wide, other_wide = one.double().reshape(-1), other.double().reshape(-1)
    for planes, dense in ((a, wide), (b, other_wide)):
        assert np.array_equal(dense_of(planes), dense.numpy())
        assert planes.count == int(dense.count_nonzero())
        assert squared(planes) == pytest.approx(float(dense @ dense), rel=1e-12)
        assert norm(planes) == pytest.approx(float(dense.norm()), rel=1e-12)
        assert dot(planes, planes) == squared(planes)
    opposed = wide * other_wide < 0
    assert dot(a, b) == dot(b, a) == pytest.approx(float(wide @ other_wide), rel=1e-9, abs=1e-12)
    assert sign_conflicts(a, b) == sign_conflicts(b, a) == int(opposed.sum())
    assert overlap(a, b).both == int((wide * other_wide != 0).sum())
    plane = conflict_plane(a, b)
    assert np.array_equal(unpacked(plane, 0, a.elements).astype(bool), opposed.numpy())
    # exact in float64: at most two terms
    assert torch.equal(total([a, b]), (wide + other_wide).float())
    assert torch.equal(total([a, b], [3.0, -0.5]), (3.0 * wide - 0.5 * other_wide).float())
    assert np.array_equal(counts([a, b, b]), (wide.sign() + 2 * other_wide.sign()).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("densities", [(0.1, 0.2), (0.5, 0.001), (1.0, 0.99), (0.0, 0.3), (0.0, 0.0)], ids=str)
def test_equals_the_dense_result(size: int, densities: tuple[float, float]) -> None:
    check(ternary((size,), densities[0], 0.0123, 0), ternary((size,), densities[1], 1.75, 1))


@pytest.mark.parametrize("shape", [(), (1, 9), (9, 1), (3, 5, 7), (0, 4)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(ternary(shape, 0.8, 0.5, 2), ternary(shape, 0.7, 2.0, 3))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.sampled_from(DENSITIES), st.sampled_from(DENSITIES), st.integers(0, 2**30), st.data())
def test_equals_the_dense_result_for_any(
    size: int, density: float, other: float, seed: int, data: st.DataObject
) -> None:
    scales = [data.draw(st.floats(2.0**-60, 2.0**60, width=32), label="scale") for _ in range(2)]
    check(ternary((size,), density, scales[0], seed), ternary((size,), other, scales[1], seed + 1))


def test_both_ways_of_storing_places_are_read() -> None:
    kinds = set()
    for size, density in ((70_001, 0.01), (70_001, 0.5), (4097, 0.62)):
        dense = ternary((size,), density, 0.25, 4)
        kinds |= parts_of(dense).keys() & {"gaps", "fours"}
        check(dense, ternary((size,), 0.3, 0.5, 5))
    assert kinds == {"gaps", "fours"}


def test_a_sum_of_one_magnitude_is_exact() -> None:
    """In float32, ten times 0.1 summed one by one is not 1."""
    ones = [packed(torch.full((70,), 0.1)) for _ in range(10)]
    assert set(total(ones).tolist()) == {float(np.float32(10 * float(np.float32(0.1))))}


def test_more_than_a_byte_can_count() -> None:
    one, other = packed(torch.full((65,), 2.0)), packed(torch.full((65,), -2.0))
    several = [one] * 200 + [other] * 300
    assert set(counts(several).tolist()) == {-100} and set(total(several).tolist()) == {-200.0}
    assert set(counts([one] * 127).tolist()) == {127}


def test_a_sum_takes_many_magnitudes() -> None:
    dense = [ternary((65_600,), 0.2, 0.1 * (number + 1), number) for number in range(9)]
    wanted = torch.stack(dense).double().sum(0)
    torch.testing.assert_close(total([packed(one) for one in dense]).double(), wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_signs_of_any_tensor(dtype: torch.dtype) -> None:
    delta = torch.randn(300, 301, generator=torch.Generator().manual_seed(0), dtype=dtype)
    delta[delta.abs() < 0.3] = 0.0
    delta[0, :4] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42], dtype=dtype)
    for seen in (delta, delta.t(), delta[::2, 1:], delta[0, 0], delta[:0]):
        found = signs_of(seen)
        assert np.array_equal(found.signs(0, found.elements), seen.reshape(-1).sign().numpy())
        assert found.scale == 1


def test_zeros_have_no_signs() -> None:
    """Entries of magnitude 0, as a survey of zeros could write them, are zeros."""
    parts = Ternary().encode(Leaf("w", "bare", torch.ones(9)), {"threshold": 0.5, "magnitude": 0.0}).parts
    assert parts and not planes_of(parts, (9,)).count
    nothing, some = planes_of({}, (9,)), packed(torch.ones(9))
    assert (dot(nothing, some), norm(nothing), sign_conflicts(nothing, some)) == (0.0, 0.0, 0)


def test_reading_takes_far_less_memory_than_a_dense_tensor() -> None:
    """numpy tells its memory to tracemalloc, torch does not: nothing here is torch's."""
    size = 16_000_000
    parts = parts_of(ternary((size,), 0.05, 0.5, 6))
    tracemalloc.start()
    planes = planes_of(parts, (size,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert planes.positive.nbytes + planes.negative.nbytes == 2 * 8 * math.ceil(size / 64)
    assert peak < 4 * size / 5


def test_sizes_must_fit() -> None:
    one, other = packed(torch.ones(64)), packed(torch.ones(63))
    for operation in (dot, sign_conflicts, conflict_plane, lambda a, b: total([a, b]), lambda a, b: counts([a, b])):
        with pytest.raises(Mismatch, match=r"expected 64 elements, found 63"):
            operation(one, other)
    with pytest.raises(InvalidInput, match="one of them at least"):
        total([])


@pytest.mark.parametrize("scale", [-0.5, 1e300], ids=str)
def test_an_impossible_magnitude_is_damage(scale: float) -> None:
    parts = parts_of(torch.ones(9))
    meta = {**meta_of(parts, (9,)), "scale": scale.hex()}
    streams = {key: part.numpy() for key, part in parts.items() if key != "meta"}
    with pytest.raises(Damaged, match="magnitude"):
        planes_of(with_meta(meta, streams), (9,))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([0.05, 0.6]), st.integers(0, 3), st.integers(0, 2000), st.integers(1, 255))
def test_damaged_parts_are_refused_or_give_planes(density: float, which: int, place: int, change: int) -> None:
    """One byte altered: an error of ours, or planes that are sound, of what the codec reads from the same bytes."""
    parts = parts_of(ternary((1500,), density, 0.5, 7))
    key = sorted(parts)[which % len(parts)]
    altered = parts[key].clone()
    altered[place % altered.numel()] ^= change
    broken = {**parts, key: altered}
    try:
        found = planes_of(broken, (1500,))
    except DeltaworksError:
        return
    assert not (found.positive & found.negative).any()
    assert np.array_equal(dense_of(found), Ternary.decode(broken, (1500,)).double().numpy())
