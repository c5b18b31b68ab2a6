"""Singular value decompositions: thin ones only, by the cheapest way that is exact enough.

A tall matrix A [M, N] has the right singular vectors of its Gram matrix A'A [N, N], whose symmetric eigenproblem costs
a fraction of the decomposition of A. The price: rounding e of the Gram matrix is an error e * (s_0 / s_i)^2 of the i-th
left vector A v_i / s_i. So only vectors of large enough values are taken from it, and what was assumed of the matrix
is checked afterwards.

Shapes: matrix [R, C]; tall [M, N] is the matrix or its transpose, M >= N; K = min(R, C) = N; r are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.devices import load_linalg

_FEW = 32  # columns up to which everything is quick
_CLEAR = {torch.float32: 6.0, torch.float64: 1e4}  # s_0 / s_i up to which a Gram matrix of this dtype is exact enough
_REST = {torch.float32: 1e5, torch.float64: 1e11}  # the same up to which two halves' left vectors can be told apart
_PRODUCT = 16.0  # s_0 / s_i up to which A v_i / s_i in float32 loses no more than gesdd in float32 does
_ELONGATED = 1.3  # M / N from which the Gram matrix in float64 is faster than gesdd in float32
_FLAT, _PEAKED = 4.0, 16.0  # peakedness up to which float32 is tried, for all triplets and for the leading ones
_ROTATION = 3e-3  # radians by which rounding may turn the subspace of `leading`, at its edge
_BLOCKS = 4  # of columns of a Gram matrix: by symmetry 6 of 16 blocks need not be computed


class Thin(NamedTuple):
    """Left vectors [R, k], values [k] in descending order, right vectors [k, C]; in the dtype of the matrix."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def thin_svd(matrix_RC: Tensor) -> Thin:
    """All K = min(R, C) triplets.

    U and V are orthogonal, and their product is the matrix, to 2e-5 in float32 and 1e-13 in float64 (relative to s_0),
    whatever the condition and the rank. Vectors of values that are zero or equal are some orthonormal basis.

    float32: if the spectrum is flat, as that of noise, triplets with s_i > s_0 / 6 from the Gram matrix in float32, and
    the narrow rest in the same way again. Else, for R and C more than 30 % apart and a condition up to 1e4, all from
    the Gram matrix in float64. Otherwise, and in float64 always (a Gram matrix keeps 1e-16 * condition^2 there):
    torch.linalg.svd of the tall side.

    On a GPU float64 costs as little (768 x 768 on an H200: 8 ms, where gesvd takes 88, and the Jacobi method, which is
    torch's choice there, takes 36 and is orthogonal to 4e-4 only). So float32 becomes float64 there, and goes through
    Gram matrices, down to s_0 / 1e4 at a time. torch decomposes a batch matrix by matrix: a stack would be no faster.
    """
    rows, columns = matrix_RC.shape
    if rows < columns:
        return _turned(thin_svd(matrix_RC.T))
    if matrix_RC.dtype != torch.float32 or columns <= _FEW:
        return by_lapack(matrix_RC)
    if matrix_RC.device.type != "cpu":
        return Thin(*(one.float() for one in _in_double(matrix_RC.double())))
    found = _clear_and_rest(matrix_RC, thin_svd)
    if found is None and rows > _ELONGATED * columns:
        found = _through_gram(matrix_RC)
    return found or by_lapack(matrix_RC)


def leading(matrix_RC: Tensor, alpha: float, *, reach: bool = False) -> Thin:
    """The first r triplets alone, r = `protected(s, alpha, reach)`; the cut counts all values.

    float32 goes through the Gram matrix: the vectors are orthogonal to 2e-5, and rounding turns the subspace by 3e-3
    radians at most, at its edge, where gesdd in float32 does no better. In float32 if this can be shown, else in
    float64; where even that is too coarse (s_r < s_0 / 1e4), and for float64: the first r of `thin_svd`.
    """
    if matrix_RC.shape[0] < matrix_RC.shape[1]:
        return _turned(leading(matrix_RC.T, alpha, reach=reach))
    if matrix_RC.dtype == torch.float32 and matrix_RC.shape[1] > _FEW and alpha > 0:
        # float32 costs less on the CPU alone, and is tried there
        for dtype in (torch.float32, torch.float64)[matrix_RC.device.type != "cpu" :]:
            found = _leading_through_gram(matrix_RC, dtype, alpha, reach)
            if found is not None:
                return found
    U, s, Vh = thin_svd(matrix_RC)
    r = protected(s, alpha, reach=reach)
    return Thin(U[:, :r], s[:r], Vh[:r])


def by_lapack(matrix_RC: Tensor) -> Thin:
    """All triplets, by gesdd, and on a GPU by gesvd.

    gesdd does not always converge where many values are equal, as those of frames are: then in float64, and then the
    matrix turned.
    """
    load_linalg(matrix_RC.device)
    driver = None if matrix_RC.device.type == "cpu" else "gesvd"
    wide_RC = matrix_RC.double()
    for matrix in (matrix_RC, wide_RC):
        try:
            found = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return Thin(*(one.to(matrix_RC.dtype) for one in found))
    found = torch.linalg.svd(wide_RC.T.contiguous(), full_matrices=False, driver=driver)
    return _turned(Thin(*(one.to(matrix_RC.dtype) for one in found)))


def singular_values(matrix_RC: Tensor) -> Tensor:
    """All K values alone, in descending order, in float64: from the Gram matrix of the smaller side in float64.

    Values below s_0 * sqrt(K * 2e-16), about 5e-7 for K = 1000, are what rounding leaves of zeros, and are zeros here.
    """
    rows, columns = matrix_RC.shape
    tall_MN = matrix_RC.T if rows < columns else matrix_RC
    found_K = torch.zeros(min(rows, columns), dtype=torch.float64, device=matrix_RC.device)
    if not matrix_RC.any():
        return found_K
    top = matrix_RC.abs().max().double()  # so that no square leaves the range of float64
    scaled = _gram(tall_MN.double() / top, torch.float64)
    assert scaled is not None
    gram_NN, size = scaled
    squares_K = torch.linalg.eigvalsh(gram_NN, UPLO="L").flip(0)
    rounding = len(found_K) * torch.finfo(torch.float64).eps * squares_K[0]
    return torch.where(squares_K > rounding, squares_K.clamp(min=0) * size, found_K).sqrt() * top


def protected(s_K: Tensor, alpha: float, *, reach: bool = False) -> int:
    """How many leading values make up the share `alpha`, in [0, 1), of the sum of all.

    Without `reach` the most whose sum does not exceed it, with `reach` the fewest whose sum reaches it. 0 for zeros.
    """
    share_K = _shares(s_K)
    if not reach or alpha == 0:
        return int((share_K <= alpha).sum())
    return min(int((share_K < alpha).sum()) + 1, len(s_K)) if s_K.any() else 0


def numerical_rank(s_K: Tensor, rows: int, columns: int) -> int:
    """How many values stand above rounding: s_i > s_0 * max(R, C) * eps of their dtype."""
    return int((s_K > s_K[:1] * max(rows, columns) * torch.finfo(s_K.dtype).eps).sum())


def _shares(s_K: Tensor) -> Tensor:
    """The share of the first, the first two ... values in the sum, in float64; all above any alpha for zeros."""
    total_K = s_K.double().cumsum(0)
    return total_K / total_K[-1:] if s_K.any() else torch.full_like(total_K, torch.inf)


def _turned(found: Thin) -> Thin:
    return Thin(found.Vh.mT, found.s, found.U.mT)


def _in_double(tall_MN: Tensor) -> Thin:
    """All triplets of a float64 matrix, as exact as float32 can hold them."""
    return _clear_and_rest(tall_MN, _in_double) or by_lapack(tall_MN)


def _clear_and_rest(tall_MN: Tensor, deeper: Callable[[Tensor], Thin]) -> Thin | None:
    """All triplets: those that the Gram matrix in the matrix's own dtype makes clear, and by `deeper` the narrow rest.

    None for a condition above 1e5 in float32 and 1e11 in float64, and in float32 for a spectrum that is not flat: most
    of it would be rest. What the clear left vectors have of A V_rest is rounding (about 6 eps s_0), but much beside
    small values: without it the two halves are orthogonal. Left vectors of zeros, however, would be any, those of the
    clear half included.
    """
    dtype = tall_MN.dtype
    scaled = _gram(tall_MN, dtype)
    if scaled is None or (dtype == torch.float32 and _peakedness(scaled[0]) > _FLAT):
        return None
    s_N, V_NN = _spectrum(*scaled)
    clear = int((s_N * _CLEAR[dtype] >= s_N[0]).sum())
    U, s, Vh = _triplets(tall_MN, s_N[:clear], V_NN[:, :clear])
    if clear == len(s_N):
        return Thin(U, s, Vh)
    rest = tall_MN @ V_NN[:, clear:]
    rest = rest - U @ (U.T @ rest)
    U_rest, s_rest, Vh_rest = deeper(rest)
    if s_rest[-1] * _REST[dtype] < s_N[0]:
        return None
    # where the two meet, rounding may have changed the order
    s_K, order_K = torch.cat([s, s_rest]).sort(descending=True, stable=True)
    return Thin(torch.cat([U, U_rest], 1)[:, order_K], s_K, torch.cat([Vh, Vh_rest @ V_NN[:, clear:].T])[order_K])


def _through_gram(tall_MN: Tensor) -> Thin | None:
    """All triplets of a float32 matrix from its Gram matrix in float64, or None if its condition does not allow it."""
    scaled = _gram(tall_MN, torch.float64)
    if scaled is None:
        return None
    # a cheap first look: the diagonal of a Cholesky factor lies between the smallest and the largest singular value
    factor_NN, failed = torch.linalg.cholesky_ex(scaled[0])
    diagonal_N = factor_NN.diagonal()
    if failed or diagonal_N.max() > _CLEAR[torch.float64] * diagonal_N.min():
        return None
    s_N, V_NN = _spectrum(*scaled)
    return None if s_N[0] > _CLEAR[torch.float64] * s_N[-1] else _triplets(tall_MN, s_N, V_NN)


def _leading_through_gram(tall_MN: Tensor, dtype: torch.dtype, alpha: float, reach: bool) -> Thin | None:
    """The first triplets of a float32 matrix from its Gram matrix in `dtype`, or None if that is too coarse."""
    scaled, single = _gram(tall_MN, dtype), dtype == torch.float32
    if scaled is None or (single and _peakedness(scaled[0]) > _PEAKED):
        return None
    s_N, V_NN = _spectrum(*scaled)
    r = protected(s_N, alpha, reach=reach)
    if (r and s_N[0] > _CLEAR[dtype] * s_N[r - 1]) or (single and not _certain(s_N, alpha, r)):
        return None
    return _triplets(tall_MN, s_N[:r], V_NN[:, :r])


def _gram(tall_MN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A'A [N, N] over its largest entry, and that entry; None for zeros and where float32 would lose small squares.

    Below the diagonal and on it: eigh and cholesky read no more.
    """
    load_linalg(tall_MN.device)
    tall_MN = tall_MN.to(dtype)
    columns = tall_MN.shape[1]
    width = -(-columns // _BLOCKS)
    gram_NN = tall_MN.new_zeros(columns, columns)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        torch.mm(tall_MN[:, start:stop].T, tall_MN[:, :stop], out=gram_NN[start:stop, :stop])
    size = gram_NN.diagonal().max()
    low, high = (1e-25, 1e30) if dtype == torch.float32 else (0.0, torch.inf)
    return (gram_NN.div_(size), size) if low < size < high else None


def _spectrum(gram_NN: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [N] in float64 and right vectors [N, N] in columns, in descending order."""
    squares_N, V_NN = torch.linalg.eigh(gram_NN, UPLO="L")
    return (squares_N.flip(0).double().clamp(min=0) * size).sqrt(), V_NN.flip(1)


def _triplets(tall_MN: Tensor, s_r: Tensor, V_Nr: Tensor) -> Thin:
    """With the left vectors A v_i / s_i; of a float32 matrix in float64 where cancellation would show."""
    dtype = tall_MN.dtype
    even = int((s_r * _PRODUCT >= s_r[:1]).sum()) if dtype == torch.float32 else len(s_r)
    AV_Mr = tall_MN @ V_Nr[:, :even].to(dtype)
    if even < len(s_r):
        AV_Mr = torch.cat([AV_Mr, (tall_MN.double() @ V_Nr[:, even:].double()).float()], dim=1)
    return Thin(AV_Mr / s_r.to(dtype), s_r.to(dtype), V_Nr.to(dtype).mT)


def _peakedness(gram_NN: Tensor) -> float:
    """N * sum s^4 / (sum s^2)^2: 1 if all values are equal, 2 for square noise, N if one direction holds everything."""
    lower_NN, diagonal_N = gram_NN.tril(-1), gram_NN.diagonal()
    squares = 2 * lower_NN.square().sum() + diagonal_N.square().sum()
    return float(len(diagonal_N) * squares / diagonal_N.sum().square())


def _certain(s_N: Tensor, alpha: float, r: int) -> bool:
    """Whether rounding of a float32 Gram matrix moves neither the cut nor the subspace before it."""
    squares_N = s_N.square()
    error = 4 * torch.finfo(torch.float32).eps * squares_N[0]  # of each square (Weyl), from a backward stable eigh
    if 0 < r < len(s_N) and error > _ROTATION * (squares_N[r - 1] - squares_N[r]):
        return False
    error_N = torch.minimum(error / s_N.clamp(min=1e-6 * s_N[0]), error.sqrt())
    return bool((_shares(s_N) - alpha).abs().min() > error_N.sum() / s_N.sum())
