"""Rounding to the nearest of 2^bits evenly spaced numbers, each row with its own spacing.

Asymmetric, per row, as in GPTQ's and GraftLLM's `Quantizer`: scale = (max(x, 0) - min(x, 0)) / (2^bits - 1),
zero = round(-min / scale), code = clamp(round(x / scale) + zero), and back scale * (code - zero). 0 comes back as 0.
Their rows of zeros get the range -1 to 1; here they get the scale 0, which gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Grid(NamedTuple):
    """The numbers that rows are rounded to: scales [R], and the code of zero [R], from 0 to 2^bits - 1."""

    scale_R: Floats
    zero_R: NDArray[np.uint8]


def grid_of(rows_RC: Floats, bits: int) -> Grid:
    """The grid from each row's range. A scale that is not finite says that the range is beyond float32."""
    low_R, high_R = np.minimum(rows_RC.min(1, initial=0), 0), np.maximum(rows_RC.max(1, initial=0), 0)
    with np.errstate(over="ignore"):
        scale_R = (high_R - low_R) / np.float32(2**bits - 1)
    return Grid(scale_R, np.rint(_over(-low_R, scale_R)).astype(np.uint8))


def quantised(rows_RC: Floats, grid: Grid, bits: int) -> NDArray[np.uint8]:
    """Codes [R, C]."""
    codes_RC = np.rint(_over(rows_RC, grid.scale_R[:, None]))
    codes_RC += grid.zero_R[:, None]
    return np.clip(codes_RC, 0, 2**bits - 1, out=codes_RC).astype(np.uint8)


def dequantised(codes_RC: NDArray[np.uint8], grid: Grid) -> Floats:
    """The numbers [R, C] that the codes stand for."""
    found_RC = codes_RC.astype(np.float32)
    found_RC -= grid.zero_R[:, None]
    found_RC *= grid.scale_R[:, None]
    return found_RC


def _over(values: Floats, scales: Floats) -> Floats:
    """`values / scales`, 0 where the scale is 0."""
    return np.divide(values, scales, out=np.zeros(np.broadcast(values, scales).shape, np.float32), where=scales > 0)
