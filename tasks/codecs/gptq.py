"""GPTQ: a matrix rounded column by column, each column's error made good by the columns after it (arXiv 2210.17323).

What counts is the error of the layer's output, |(W - Q) x|, over calibration data with the second moments H = X'X / n.
Columns go by falling diagonal of H ("act-order"); the entry of column i that is left to be made good is weighted by row
i of the upper Cholesky factor of the damped inverse of H, their algorithm 1. Grids are asymmetric, one per row and
group of columns, and the groups follow that order: column by column the group is part of what is stored. A group's
grid is found when its first column is reached, on numbers that all groups before have already corrected.

Two things differ from the released code, and neither shows where every input of a layer is in use: inputs that are
always zero come last whatever the unit of the others, and have the others' mean for damping.

Suffixes: R rows, C columns, G groups of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InvalidInput
from tasks.codecs.quantise import Floats, Grid, dequantised, grid_of, quantised
from tasks.devices import load_linalg

DAMP = 0.01  # of the mean of H's diagonal, added to it; ten times that until the factor exists
_BLOCK = 128  # columns whose errors are carried on together where a row is one group


class Curvature(NamedTuple):
    """What GPTQ needs of H: the order of the columns, and in that order the factor [C, C] and who is never used [C]."""

    order_C: NDArray[np.int64]
    factor_CC: Floats
    idle_C: NDArray[np.bool_]


class Rounded(NamedTuple):
    """A matrix as codes [R, C], scales [R, G], codes of zero [R, G], and the group of every column [C]."""

    codes_RC: NDArray[np.uint8]
    scale_RG: Floats
    zero_RG: NDArray[np.uint8]
    group_C: NDArray[np.int64]

    def numbers(self) -> Floats:
        """What the codes stand for, [R, C]. Beyond float32 they are infinite."""
        found_RC = self.codes_RC.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for group in range(self.scale_RG.shape[1]):
                own = self.group_C == group
                found_RC[:, own] = dequantised(self.codes_RC[:, own], self.grid(group))
        return found_RC

    def grid(self, group: int) -> Grid:
        return Grid(self.scale_RG[:, group], self.zero_RG[:, group])


def curvature(moments_CC: Tensor) -> Curvature:
    """From H [C, C] on any device, which is left as it is. Raises InvalidInput where H is no such matrix."""
    H_CC = moments_CC.detach().to(torch.float32, copy=True)
    if H_CC.ndim != 2 or H_CC.shape[0] != H_CC.shape[1] or not bool(torch.isfinite(H_CC).all()):
        raise InvalidInput(f"calibration data must be a finite square matrix, found shape {list(H_CC.shape)}")
    diagonal_C = H_CC.diagonal()
    idle_C = diagonal_C <= 0
    used = diagonal_C[~idle_C]
    mean = float(used.mean()) if used.numel() else 1.0
    order_C = torch.argsort(diagonal_C, descending=True, stable=True)
    diagonal_C[idle_C] = mean
    H_CC = H_CC[order_C][:, order_C]
    damp = DAMP
    load_linalg(H_CC.device)
    while True:
        damped_CC = H_CC.clone()
        damped_CC.diagonal().add_(damp * mean)
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if not failed:
            factor_CC, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_CC), upper=True)
        if not failed:
            break
        if damp > 1e6:
            raise InvalidInput("calibration data must be X'X / rows of some X, found a matrix that is far from it")
        damp *= 10
    return Curvature(order_C.cpu().numpy(), factor_CC.cpu().numpy(), idle_C[order_C].cpu().numpy())


def groups_of(columns: int, group: int | None) -> int:
    """How many groups columns come to; none: one."""
    return max(-(-columns // min(group or columns, columns)), 1) if columns else 1


def consecutive(columns: int, group: int | None) -> NDArray[np.int64]:
    """The group of every column where columns stay as they are."""
    return np.arange(columns) // min(group or max(columns, 1), max(columns, 1))


def gptq(
    rows_RC: Floats, bits: int, group: int | None = 128, seen: Curvature | None = None, scales: str = "<f4"
) -> Rounded:
    """`rows_RC` as codes of `bits`, `group` columns to a grid (none: all). Without `seen`, rounded to the nearest.

    `scales`: the numpy dtype that scales will be stored in; they are rounded to it before anything is rounded to them.
    One that is infinite says that the numbers are beyond that dtype.
    """
    rows, columns = rows_RC.shape
    group_C = consecutive(columns, group)
    left_RC = np.array(rows_RC if seen is None else rows_RC[:, seen.order_C], dtype=np.float32)
    if seen is not None:
        left_RC[:, seen.idle_C] = 0
    codes_RC = np.empty((rows, columns), dtype=np.uint8)
    grids: list[Grid] = []
    step = _BLOCK if group is None else group
    for start in range(0, columns, step):
        block = slice(start, min(start + step, columns))
        if group is not None or not grids:
            grids.append(_grid(left_RC if group is None else left_RC[:, block], bits, scales))
        if seen is None:
            codes_RC[:, block] = quantised(left_RC[:, block], grids[-1], bits)
        else:
            codes_RC[:, block], errors_RB = _block(left_RC[:, block], grids[-1], bits, seen.factor_CC[block, block])
            left_RC[:, block.stop :] -= errors_RB @ seen.factor_CC[block, block.stop :]
    scale_RG, zero_RG = (np.stack(some, axis=1) for some in zip(*grids or [_grid(left_RC, bits, scales)], strict=True))
    if seen is None:
        return Rounded(codes_RC, scale_RG, zero_RG, group_C)
    back_C = np.argsort(seen.order_C, kind="stable")
    return Rounded(codes_RC[:, back_C], scale_RG, zero_RG, group_C[back_C])


def _grid(rows_RC: Floats, bits: int, scales: str) -> Grid:
    grid = grid_of(rows_RC, bits)
    with np.errstate(over="ignore"):
        return grid._replace(scale_R=grid.scale_R.astype(scales).astype(np.float32))


def _block(block_RB: Floats, grid: Grid, bits: int, factor_BB: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes of one block, and the errors that columns after it are to make good."""
    left_RB, errors_RB = block_RB.copy(), np.zeros_like(block_RB)
    codes_RB = np.empty(block_RB.shape, dtype=np.uint8)
    for column in range(block_RB.shape[1]):
        own = slice(column, column + 1)
        codes_RB[:, own] = quantised(left_RB[:, own], grid, bits)
        errors_RB[:, own] = (left_RB[:, own] - dequantised(codes_RB[:, own], grid)) / factor_BB[column, column]
        left_RB[:, column:] -= errors_RB[:, own] * factor_BB[column, column:]
    return codes_RB, errors_RB
