"""Singular triplets in groups of their own precision, each rounded by GPTQ or to the nearest.

A group's right vectors are rounded first, seen by what the layer was given; then its left vectors, seen by what the
values and the rounded right vectors make of that. This is Quant_k of GraftLLM's section 3, and the released engine's
order. There the rounded group is added to the base before the next one is begun, so that layers behind it see what it
does to their input. A layer's own input does not depend on its own groups, so a tensor at a time the groups part here.

Suffixes: M rows and N columns of the matrix, K triplets, P columns of the calibration data (N again).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.gptq import Rounded, consecutive, curvature, gptq, groups_of
from tasks.codecs.quantise import Floats
from tasks.codecs.streams import (
    meta_of,
    narrow,
    number,
    part,
    read_numbers,
    scale_of,
    with_meta,
    write_numbers,
)
from tasks.spectrum import by_lapack

SCALES = {"f16": ("<f2", np.uint16), "f32": ("<f4", np.uint32)}
_MOST = 64  # groups that a matrix may have


class Triplets(NamedTuple):
    """U [M, K], values [K] as shares of the first and falling, V' [K, N], and the first value, 0 for none."""

    left_MK: Tensor
    share_K: Tensor
    right_KN: Tensor
    top: float


def triplets_of(delta_MN: Tensor) -> Triplets:
    """The singular value decomposition in float32, of the two signs of a pair always the same."""
    size = delta_MN.abs().max()  # so that numbers at the ends of float32's range neither vanish nor overflow
    left_MK, value_K, right_KN = by_lapack(delta_MN / size)
    turned_K = torch.where(left_MK.sum(0) < 0, -1.0, 1.0)
    top = float(value_K[0])
    return Triplets(left_MK * turned_K, value_K / top, right_KN * turned_K[:, None], top * float(size))


class Pair(NamedTuple):
    """One group, rounded: U [M, k] and V' [k, N]."""

    left: Rounded
    right: Rounded


@dataclass(frozen=True)
class Groups:
    """Rounded triplets. `bits` of each group; `group`: columns that share a grid; `seen`: whether GPTQ rounded them."""

    pairs: tuple[Pair, ...]
    bits: tuple[int, ...]
    share_K: Floats
    top: float
    group: int
    seen: bool
    scales: str

    def factors(self) -> tuple[Tensor, Tensor]:
        """U times the values [M, K], and V' [K, N], in float32."""
        left_MK = torch.from_numpy(np.concatenate([one.left.numbers() for one in self.pairs], axis=1))
        right_KN = torch.from_numpy(np.concatenate([one.right.numbers() for one in self.pairs], axis=0))
        value_K = (torch.from_numpy(self.share_K).double() * self.top).float()
        return left_MK * value_K, right_KN

    def numbers(self) -> Tensor:
        """The matrix [M, N] in float32: one product, in the order of the triplets."""
        left_MK, right_KN = self.factors()
        return left_MK @ right_KN


def rounded(
    found: Triplets, plan: Sequence[tuple[int, int]], group: int, scales: str, moments_PP: Tensor | None
) -> Groups:
    """`plan`: bits and number of triplets of each group, the largest first. `moments_PP`: X'X / rows, if there is X."""
    dtype = SCALES[scales][0]
    count = sum(size for _, size in plan)
    share_K = found.share_K[:count].cpu().numpy().astype(dtype).astype(np.float32)
    seen = None if moments_PP is None else curvature(moments_PP)
    pairs, done = [], 0
    for bits, size in plan:
        own = slice(done, done + size)
        right = gptq(found.right_KN[own].cpu().numpy(), bits, group, seen, dtype)
        behind = None
        if moments_PP is not None:
            carried_kN = torch.from_numpy(share_K[own, None] * right.numbers()).to(moments_PP.device)
            behind = curvature(carried_kN @ moments_PP.float() @ carried_kN.T)
        left = gptq(found.left_MK[:, own].cpu().numpy(), bits, group, behind, dtype)
        pairs.append(Pair(left, right))
        done += size
    return Groups(tuple(pairs), tuple(bits for bits, _ in plan), share_K, found.top, group, seen is not None, scales)


def write_groups(groups: Groups, codec: str) -> Parts:
    """Codes of every group, V' before U; then scales, zeros, and where GPTQ saw to it the group of every column."""
    sides = [side for pair in groups.pairs for side in (pair.right, pair.left)]
    codes = [write_numbers(np.ascontiguousarray(side.codes_RC).reshape(-1)) for side in sides]
    meta = {
        "codec": codec,
        "form": "triplets",
        "shape": [groups.pairs[0].left.codes_RC.shape[0], groups.pairs[0].right.codes_RC.shape[1]],
        "bits": list(groups.bits),
        "counts": [pair.right.codes_RC.shape[0] for pair in groups.pairs],
        "sizes": [len(one) for one in codes],
        "group": groups.group,
        "seen": groups.seen,
        "scales": groups.scales,
        "top": groups.top.hex(),
    }
    streams = {
        "codes": b"".join(codes),
        "scales": _write_floats([side.scale_RG for side in sides], groups.scales),
        "shares": _write_floats([groups.share_K], groups.scales),
        "zeros": write_numbers(_joined([side.zero_RG for side in sides])),
    }
    if groups.seen:
        # the right vectors of all groups were rounded in the same order
        order = [groups.pairs[0].right.group_C, *(pair.left.group_C for pair in groups.pairs)]
        streams["order"] = write_numbers(narrow(_joined(order)))
    return with_meta(meta, streams)


def read_groups(parts: Parts, shape: tuple[int, ...]) -> Groups:
    """The inverse."""
    meta = meta_of(parts, shape)
    rows, columns, bits, counts = _outline(meta)
    group, scales = number(meta, "group", 1, 2**62), str(meta.get("scales"))
    if scales not in SCALES:
        raise Damaged(f"the metadata's 'scales' must be f16 or f32, found {scales!r}")
    seen = meta.get("seen") is True
    order = _Reader(_order(parts, columns, counts, group) if seen else _in_turn(columns, counts, group))
    shapes = [shape for count in counts for shape in ((count, columns), (rows, count))]
    codes = _codes(parts, meta, shapes, [each for each in bits for _ in range(2)])
    grids = [one * groups_of(across, group) for one, across in shapes]
    scale, zero = _Reader(_read_floats(parts, "scales", sum(grids), scales)), _Reader(_zeros(parts, sum(grids)))
    right_C = order.take(columns)

    def side(at: int, group_C: NDArray[np.int64]) -> Rounded:
        form = (shapes[at][0], -1)
        return Rounded(codes[at], scale.take(grids[at]).reshape(form), zero.take(grids[at]).reshape(form), group_C)

    pairs = []
    for at, count in enumerate(counts):
        right = side(2 * at, right_C)
        pairs.append(Pair(side(2 * at + 1, order.take(count)), right))
    share_K = _read_floats(parts, "shares", sum(counts), scales)
    return Groups(tuple(pairs), tuple(bits), share_K, scale_of(meta, "top"), group, seen, scales)


def _outline(meta: Mapping[str, Any]) -> tuple[int, int, list[int], list[int]]:
    """Rows, columns, and bits and counts of the groups."""
    shape, bits, counts = (meta.get(key) for key in ("shape", "bits", "counts"))
    for key, found in (("shape", shape), ("bits", bits), ("counts", counts)):
        if not isinstance(found, list) or not all(type(one) is int and one > 0 for one in found):
            raise Damaged(f"the metadata's {key!r} must be a list of positive integers, found {found!r}")
    assert isinstance(shape, list) and isinstance(bits, list) and isinstance(counts, list)
    if len(shape) != 2 or not 0 < len(bits) == len(counts) <= _MOST or max(bits) > 8 or sum(counts) > min(shape):
        raise Damaged(f"groups of {counts} triplets in {bits} bits are none of a matrix of shape {shape}")
    return shape[0], shape[1], bits, counts


def _codes(
    parts: Parts, meta: Mapping[str, Any], shapes: Sequence[tuple[int, int]], bits: Sequence[int]
) -> list[NDArray[np.uint8]]:
    """Codes of every side, which lie one after the other."""
    whole, sizes = part(parts, "codes"), meta.get("sizes")
    right = isinstance(sizes, list) and len(sizes) == len(shapes) and all(type(one) is int and one > 0 for one in sizes)
    if not right or sum(sizes) != whole.size:  # type: ignore[arg-type]
        raise Damaged(f"the metadata's 'sizes' must be the lengths of {len(shapes)} streams that make {whole.size:,}")
    found, start = [], 0
    for size, shape, each in zip(sizes, shapes, bits, strict=True):  # type: ignore[arg-type]
        codes = read_numbers({"codes": torch.from_numpy(whole[start : start + size])}, "codes", math.prod(shape))
        if codes.dtype != np.uint8 or int(codes.max(initial=0)) >= 1 << each:
            raise Damaged(f"part 'codes' must have codes of {each} bits")
        found.append(codes.reshape(shape))
        start += size
    return found


def _zeros(parts: Parts, count: int) -> NDArray[np.uint8]:
    found = read_numbers(parts, "zeros", count)
    if found.dtype != np.uint8:
        raise Damaged("part 'zeros' must have numbers of one byte")
    return found


def _order(parts: Parts, columns: int, counts: Sequence[int], group: int) -> NDArray[np.int64]:
    """The groups of the columns of the right vectors, then of each group's left ones."""
    across = [columns, *counts]
    found = read_numbers(parts, "order", sum(across))
    limits = np.repeat([groups_of(one, group) for one in across], across)
    if (found >= limits).any():
        raise Damaged("part 'order' names a group of columns that does not exist")
    return found.astype(np.int64)


def _in_turn(columns: int, counts: Sequence[int], group: int) -> NDArray[np.int64]:
    return np.concatenate([consecutive(one, group) for one in (columns, *counts)])


def _write_floats(values: Sequence[Floats], scales: str) -> bytes:
    """As floats of that dtype, their bits coded as integers: they are much alike."""
    dtype, width = SCALES[scales]
    return write_numbers(_joined(values).astype(dtype).view(width))


def _read_floats(parts: Parts, key: str, count: int, scales: str) -> Floats:
    dtype, width = SCALES[scales]
    bits = read_numbers(parts, key, count)
    if bits.dtype != width:
        raise Damaged(f"part {key!r} must be of {scales}")
    found = bits.view(dtype).astype(np.float32)
    if not np.isfinite(found).all():
        raise Damaged(f"part {key!r} must be finite")
    return found


def _joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.ascontiguousarray(one).reshape(-1) for one in values])


class _Reader:
    """Hands out an array piece by piece."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> NDArray[Any]:
        self._at += count
        return self._values[self._at - count : self._at]
