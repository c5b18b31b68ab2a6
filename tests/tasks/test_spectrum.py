"""Thin singular value decompositions against torch's in float64, whichever way they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.mergers.orthonormal import whiten
from tasks.spectrum import Thin, by_lapack, leading, numerical_rank, protected, singular_values, thin_svd

SHAPES = [(64, 64), (70, 64), (90, 64), (256, 64), (64, 256), (61, 37), (3, 2), (9, 1), (1, 9), (1, 1)]
EMPTY = [(0, 4), (4, 0), (0, 0)]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0]


def built(rows: int, columns: int, s_K: Tensor, seed: int = 0) -> Tensor:
    """A matrix of these singular values, in float64."""
    return orthonormal(rows, len(s_K), seed) * s_K @ orthonormal(columns, len(s_K), seed + 1).T


def graded(count: int, condition: float) -> Tensor:
    """Values from 1 to 1 / condition, evenly in their logarithm."""
    return condition ** -torch.linspace(0, 1, count, dtype=torch.float64)


def check(found: Thin, matrix_RC: Tensor, tolerance: float) -> None:
    """What holds in any basis: shapes, order, values, orthonormality and the product, relative to the largest value."""
    U, s, Vh = (one.double() for one in found)
    exact_K = torch.linalg.svdvals(matrix_RC.double())
    count, size = min(matrix_RC.shape), float(exact_K.max()) if exact_K.numel() else 0.0
    assert (U.shape, s.shape, Vh.shape) == ((len(matrix_RC), count), (count,), (count, matrix_RC.shape[1]))
    assert {one.dtype for one in found} == {matrix_RC.dtype}
    assert (s >= 0).all() and (s.diff() <= 0).all()
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(s, exact_K, rtol=0, atol=tolerance * size)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(U * s @ Vh, matrix_RC.double(), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("condition", [1.0, 5.0, 30.0, 1e3, 9e3, 1e5, 1e12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thin_svd(shape: tuple[int, int], condition: float) -> None:
    matrix = built(*shape, graded(min(shape), condition))
    check(thin_svd(matrix), matrix, 1e-13)
    check(thin_svd(matrix.float()), matrix.float(), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_thin_svd_of_low_rank_and_of_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13
    for rank in range(min(3, *shape) + 1):
        matrix = built(*shape, torch.arange(rank, 0, -1, dtype=torch.float64)).to(dtype)
        found = thin_svd(matrix)
        check(found, matrix, tolerance)
        assert numerical_rank(found.s, *shape) == rank


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(40, 40), (120, 30), (30, 120)], ids=str)
def test_any_size_of_float32(shape: tuple[int, int], size: float) -> None:
    """Squares of these leave the range of float32; the vectors must be those of the matrix at size one."""
    matrix = built(*shape, graded(min(shape), 4.0)).float()
    scaled = (matrix.double() * size).float()
    tolerance = 1e-5 if size > 1e-35 else 1e-2  # the inputs themselves lose digits below the normal range
    check(thin_svd(scaled), scaled, tolerance)
    one, two = leading(matrix, 0.5), leading(scaled, 0.5)
    assert len(one.s) == len(two.s)
    torch.testing.assert_close(two.U @ two.U.T, one.U @ one.U.T, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(two.s.double() / size, one.s.double(), rtol=10 * tolerance, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    rank=st.integers(0, 40),
    exponent=st.floats(0, 8),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_thin_svd_of_anything(
    rows: int, columns: int, rank: int, exponent: float, seed: int, dtype: torch.dtype
) -> None:
    rank = min(rank, rows, columns)
    matrix = built(rows, columns, graded(rank, 10**exponent), seed).to(dtype)
    check(thin_svd(matrix), matrix, 2e-5 if dtype == torch.float32 else 1e-13)


def test_a_solver_that_gives_up_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gesdd does on some frames: then in float64, then turned."""
    solve, asked = torch.linalg.svd, []

    def fails_twice(matrix: Tensor, **settings: object) -> object:
        asked.append((matrix.dtype, tuple(matrix.shape)))
        if len(asked) < 3:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.linalg, "svd", fails_twice)
    matrix = built(70, 64, graded(64, 1e6)).float()
    check(by_lapack(matrix), matrix, 2e-5)
    assert asked == [(torch.float32, (70, 64)), (torch.float64, (70, 64)), (torch.float64, (64, 70))]


def test_frames_with_zeros_are_whitened_on_the_rest() -> None:
    frame = built(60, 20, graded(20, 10.0)).float()
    padded = torch.zeros(64, 50)
    padded[2:62, 5:25] = frame
    found = whiten(padded)
    torch.testing.assert_close(found[2:62, 5:25], whiten(frame))
    torch.testing.assert_close(found[2:62, 5:25].T @ found[2:62, 5:25], torch.eye(20), rtol=0, atol=1e-5)
    assert found.count_nonzero() == found[2:62, 5:25].count_nonzero()
    assert not whiten(torch.zeros(8, 5)).any()


def solvers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the solvers that are called and their precision."""
    called: list[str] = []
    for name in ("svd", "eigh"):
        solver = getattr(torch.linalg, name)

        def spy(matrix: Tensor, *args: object, _name: str = name, _solver: object = solver, **more: object) -> object:
            called.append(f"{_name}{matrix.element_size() * 8}")
            return _solver(matrix, *args, **more)  # type: ignore[operator]

        monkeypatch.setattr(torch.linalg, name, spy)
    return called


@pytest.mark.parametrize(
    ("shape", "condition", "dtype", "expected"),
    [
        ((256, 64), 1.2, torch.float32, ["eigh32"]),
        ((64, 256), 1.2, torch.float32, ["eigh32"]),
        ((256, 64), 1e2, torch.float32, ["eigh64"]),
        ((64, 256), 1e2, torch.float32, ["eigh64"]),
        ((256, 64), 1e6, torch.float32, ["svd32"]),
        ((64, 64), 1.2, torch.float32, ["eigh32"]),
        ((64, 64), 30.0, torch.float32, ["eigh32", "svd32"]),
        ((256, 64), 30.0, torch.float32, ["eigh32", "svd32"]),
        ((64, 64), 1e2, torch.float32, ["svd32"]),
        ((1000, 64), 1.0, torch.float32, ["eigh32"]),
        ((256, 64), 1.2, torch.float64, ["svd64"]),
    ],
)
def test_the_way_depends_on_the_condition(
    shape: tuple[int, int],
    condition: float,
    dtype: torch.dtype,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cheap where it is exact enough, and no attempt in vain where it is known not to be."""
    matrix = built(*shape, graded(64, condition)).to(dtype)
    called = solvers(monkeypatch)
    thin_svd(matrix)
    assert called == expected


@pytest.mark.parametrize("shape", [(64, 64), (100, 64), (64, 100)], ids=str)
@pytest.mark.parametrize("small", [0.1, 1e-3, 3e-5, 1e-6, 1e-9, 0.0])
def test_a_flat_spectrum_with_a_second_step(shape: tuple[int, int], small: float) -> None:
    """What is left after the clear triplets may be rounding or nothing, and must not repeat their vectors."""
    for equal in (40, 63):
        values = torch.cat([torch.ones(equal), torch.full((64 - equal,), small)]).double()
        matrix = built(*shape, values).float()
        check(thin_svd(matrix), matrix, 2e-5)


def test_protected() -> None:
    """Shares .4, .7, .9, 1 of the sum."""
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [protected(s, alpha) for alpha in (0.0, 0.39, 0.4, 0.5, 0.7, 0.95)] == [0, 0, 1, 1, 2, 3]
    assert [protected(s, alpha, reach=True) for alpha in (0.0, 0.39, 0.4, 0.5, 0.7, 0.95)] == [0, 1, 1, 2, 2, 4]
    for reach in (False, True):
        assert protected(torch.zeros(3), 0.5, reach=reach) == 0
        assert protected(torch.zeros(0), 0.5, reach=reach) == 0


SPECTRA = {
    "flat": lambda count: 1 - 0.5 * torch.arange(count, dtype=torch.float64) / count,
    "power": lambda count: torch.arange(1, count + 1, dtype=torch.float64) ** -0.7,
    "spikes": lambda count: torch.cat([torch.full((2,), 30.0, dtype=torch.float64), 1.5 - graded(count - 2, 2.0)]),
    "low rank": lambda count: torch.tensor([5.0, 4.0, 3.1, 2.0, 1.0], dtype=torch.float64),
    "one": lambda count: torch.ones(1, dtype=torch.float64),
}


@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(80, 80), (200, 50), (50, 200)], ids=str)
def test_leading(shape: tuple[int, int], spectrum: str, alpha: float, reach: bool) -> None:
    """As many as the exact values say, and the subspaces of the exact vectors."""
    matrix = built(*shape, SPECTRA[spectrum](min(shape)).sort(descending=True).values)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
        U, s, Vh = torch.linalg.svd(matrix.to(dtype).double(), full_matrices=False)
        r = protected(s, alpha, reach=reach)
        found = leading(matrix.to(dtype), alpha, reach=reach)
        assert {one.dtype for one in found} == {dtype}
        assert (found.U.shape, found.s.shape, found.Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
        torch.testing.assert_close(found.s.double(), s[:r], rtol=1e-5, atol=0)
        for one, exact in ((found.U.double(), U[:, :r]), (found.Vh.double().T, Vh[:r].T)):
            torch.testing.assert_close(one @ one.T, exact @ exact.T, rtol=0, atol=tolerance)
            torch.testing.assert_close(one.T @ one, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [*EMPTY, (1, 5), (5, 1), (1, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_of_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    found = leading(torch.zeros(shape, dtype=dtype), 0.5)
    assert (found.U.shape, found.s.shape, found.Vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (1 - 0.5 * torch.arange(64, dtype=torch.float64) / 64, ["eigh32"]),
        (torch.cat([torch.full((2,), 50.0), torch.ones(62)]).double(), ["eigh64"]),  # too peaked to be tried
        # a null space that rounding in float32 fills with a third of the sum: the cut would move
        (torch.cat([torch.ones(16), torch.zeros(48)]).double(), ["eigh32", "eigh64"]),
        # the cut falls between two values that float32 does not tell apart
        (torch.cat([torch.ones(21), torch.full((43,), 0.999999)]).double(), ["eigh32", "eigh64"]),
        # a null space whose rounding does not reach the cut
        (torch.cat([torch.linspace(1, 0.6, 8), torch.zeros(56)]).double(), ["eigh32"]),
    ],
    ids=["flat", "peaked", "low rank", "degenerate", "clear of the cut"],
)
def test_the_way_to_the_leading(values: Tensor, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = built(128, 64, values).float()
    called = solvers(monkeypatch)
    leading(matrix, 0.32)
    assert called == expected


def test_inputs_stay_as_they_are() -> None:
    for shape in ((50, 20), (20, 50), (30, 30)):
        matrix = built(*shape, graded(20, 3.0)).float()
        before = matrix.clone()
        thin_svd(matrix)
        leading(matrix, 0.5)
        assert torch.equal(matrix, before)


def test_the_same_bits_again() -> None:
    matrix = built(120, 40, graded(40, 50.0)).float()
    for work in (thin_svd, lambda one: leading(one, 0.5)):
        assert all(torch.equal(one, two) for one, two in zip(work(matrix), work(matrix.clone()), strict=True))


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    found, exact = singular_values(matrix), torch.linalg.svdvals(matrix.double())
    assert found.dtype == torch.float64 and found.shape == exact.shape
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
    assert torch.equal(singular_values(torch.zeros(shape, dtype=dtype)), torch.zeros(min(shape), dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_values_of_zeros_are_zeros_whatever_the_size(size: float) -> None:
    """A product of rank 3: what rounding leaves of the other values does not count as directions."""
    wanted = torch.tensor([4.0, 2.0, 1e-3], dtype=torch.float64)
    found = singular_values(built(50, 40, wanted) * size)
    torch.testing.assert_close(found[:3] / size, wanted, rtol=1e-8, atol=0)
    assert not found[3:].any()
