"""Rounding to nearest: every number becomes a code of a few bits, each row (or group) with its own scale and zero.

Data-free. Codes are far from evenly used, so they are entropy coded: packed and through zstandard, or through pcodec,
whichever is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.packing import pack_codes, packed_size, unpack_codes
from tasks.codecs.quantise import Grid, dequantised, grid_of, quantised
from tasks.codecs.streams import (
    exactly,
    expand,
    meta_of,
    number,
    part,
    read_numbers,
    squeeze,
    with_meta,
    write_numbers,
)


@dataclass(frozen=True)
class Rtn(Codec):
    """bits:   2, 3, 4 or 8 of every code
    group:  how many numbers of a row share a scale and a zero; none: the whole row. Tensors with fewer than two
            dimensions are one row. Of 128, at 2 bits and more, are the groups of GraftLLM and Delta-CoMe
    scales: dtype of the scales; f16 saves two bytes per row and costs a relative 5e-4

    On a full fine-tuning of a small language model 2 bits per row kept 98 % of what was learnt, at 1.7 bits a number
    with scales and zeros, 4 bits all of it.
    """

    source: ClassVar[str] = "GPTQ's quantizer"

    name: Literal["rtn"] = "rtn"
    version: Literal[1] = 1
    bits: Literal[2, 3, 4, 8] = 4
    group: int | None = None
    scales: Literal["f32", "f16"] = "f32"

    def __post_init__(self) -> None:
        require(self.group is None or self.group > 0, "group", "positive, or none for whole rows", self.group)

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        if not leaf.delta.any():
            return Coded({}, decoder(self))
        rows, columns, group = _form(tuple(leaf.delta.shape), self.group)
        values = _grouped(leaf.delta.detach().cpu().to(torch.float32).reshape(rows, columns).numpy(), group)
        grid = grid_of(values, self.bits)
        if self.scales == "f16":
            with np.errstate(over="ignore"):
                grid = grid._replace(scale_R=grid.scale_R.astype(np.float16).astype(np.float32))
        fits = bool(np.isfinite(grid.scale_R).all())
        require(fits, leaf.name, f"numbers whose range fits into {self.scales}", float(leaf.delta.abs().max()))
        codes = _ungrouped(quantised(values, grid, self.bits), rows, columns)
        packed, numbers = squeeze(pack_codes(codes, self.bits)), write_numbers(codes)
        meta = {
            "codec": decoder(self),
            "bits": self.bits,
            "group": self.group,
            "scales": self.scales,
            "shape": list(leaf.delta.shape),
        }
        streams = {
            **({"packed": packed} if len(packed) < len(numbers) else {"codes": numbers}),
            "scales": grid.scale_R.astype("<f2" if self.scales == "f16" else "<f4").tobytes(),
            "zeros": squeeze(grid.zero_R),
        }
        return Coded(with_meta(meta, streams), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(shape)
        meta = meta_of(parts, shape)
        bits = number(meta, "bits", 1, 8)
        held = None if meta.get("group") is None else number(meta, "group", 1, 2**62)
        rows, columns, group = _form(tuple(meta["shape"]), held)
        grid = _read_grid(parts, str(meta.get("scales")), rows * -(-columns // group))
        count = rows * columns
        if "packed" in parts:
            codes = unpack_codes(expand(parts, "packed", packed_size(count, bits)), bits, count)
        else:
            found = read_numbers(parts, "codes", count)
            if found.dtype != np.uint8 or int(found.max(initial=0)) >= 1 << bits:
                raise Damaged(f"part 'codes' must have codes of {bits} bits")
            codes = found
        with np.errstate(over="ignore"):  # damage alone leads beyond float32: who reads it checks for infinities
            values = dequantised(_grouped(codes.reshape(rows, columns), group), grid)
        return torch.from_numpy(_ungrouped(values, rows, columns)).reshape(shape)


def _form(shape: tuple[int, ...], group: int | None) -> tuple[int, int, int]:
    """Rows, columns, and columns of a group; of an empty tensor too there are some to divide by."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // max(rows, 1)
    return rows, columns, max(min(group or columns, columns), 1)


def _grouped(values_RC: NDArray[Any], group: int) -> NDArray[Any]:
    """Groups of a row one below the other, [groups, group]; the last of a row is filled up with zeros."""
    missing = -values_RC.shape[1] % group
    if missing:
        values_RC = np.pad(values_RC, ((0, 0), (0, missing)))
    return values_RC.reshape(-1, group)


def _ungrouped(values: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """The inverse, flat."""
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns]).reshape(-1)


def _read_grid(parts: Parts, scales: str, groups: int) -> Grid:
    widths = {"f32": "<f4", "f16": "<f2"}
    if scales not in widths:
        raise Damaged(f"the metadata's 'scales' must be f32 or f16, found {scales!r}")
    dtype = np.dtype(widths[scales])
    raw = exactly(part(parts, "scales"), groups * dtype.itemsize, "scales")
    found = np.frombuffer(raw.tobytes(), dtype=dtype).astype(np.float32)
    if not np.isfinite(found).all():
        raise Damaged("part 'scales' must be finite")
    return Grid(found, expand(parts, "zeros", groups))
