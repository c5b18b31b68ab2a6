"""Ternary: the largest entries of an update keep their signs and share one magnitude, as in ComPEFT (arXiv 2311.13171).

Selection and scale follow the released code (`compress_and_update_llama_adaptors`): one threshold for the whole
update, the entry at rank d - int(d * density) of the sorted magnitudes, `>=`, so int(d * density) + 1 entries and
all ties stay; sigma is the unbiased standard deviation of all d entries before masking; the magnitude is alpha * sigma.

Nothing is stored compressed by that code. Here a tensor is positions and signs. Positions are the gaps between kept
entries through pcodec, which follows the local density and so beats the bound of a single global one, or one bit per
entry, whichever is smaller; signs are one bit each and cannot be compressed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, Trial, decoder
from tasks.codecs.streams import (
    Numbers,
    exactly,
    expand,
    meta_of,
    narrow,
    number,
    part,
    read_numbers,
    scale_of,
    squeeze,
    with_meta,
    write_numbers,
)
from tasks.moments import Power, deviation, power
from tasks.select import Stream, kth_magnitude

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # the grid of ComPEFT's appendix
_PIECE = 1 << 16  # entries that stay in a core's cache while they are compared
_CROWDED = 0.3  # density from which one bit per entry may be smaller than gaps


@dataclass(frozen=True)
class Ternary(Codec):
    """`density`: fraction of entries kept. `alpha`: magnitude in units of sigma.

    Two data-free values of alpha come from the update itself: `norm` keeps its L2 norm, `projection` makes the dense
    update the orthogonal projection of the ternary one onto its direction. `grid` tries these two and the paper's
    values on examples that the task was trained on, and takes the best; a chain does that, `compress_update` alone
    cannot. The paper's figures: a grid of density 0.05 to 0.5 and alpha 0.5 to 10, chosen on a validation split; alpha
    1 for bases of 13 B and more.
    """

    source: ClassVar[str] = "arXiv 2311.13171, ComPEFT"

    name: Literal["ternary"] = "ternary"
    version: Literal[2] = 2
    density: float = 0.2
    alpha: float | Literal["norm", "projection", "grid"] = "projection"

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "density", "between 0 and 1", self.density)
        allowed = isinstance(self.alpha, str) or 0 < self.alpha < math.inf
        require(allowed, "alpha", "positive, 'norm', 'projection' or 'grid'", self.alpha)

    def trials(self) -> Sequence[Self]:
        if self.alpha != "grid":
            return ()
        return [replace(self, alpha=alpha) for alpha in ("projection", "norm", *ALPHAS)]

    def best(self, exact: float, tried: Sequence[Trial]) -> int:
        """The highest score, of equals the first."""
        return max(range(len(tried)), key=lambda number: tried[number].score)

    def survey(self, deltas: Stream) -> Facts:
        """`threshold` and `magnitude` for the whole update."""
        seen: list[Power] = []
        passes = 0

        def watched() -> Iterator[Tensor]:  # the first pass of the selection takes the power by the way
            nonlocal passes
            passes += 1
            first = passes == 1
            for delta in deltas():
                if first:
                    seen.append(power(partial(iter, [delta])))
                yield delta

        # 100 * density and not density: the released code counts int(d * k / 100), and so rounds like this
        threshold = kth_magnitude(
            watched, lambda count: count and max(count - int(count * (100 * self.density) / 100), 1)
        )
        squares = sum(one.squares for one in seen)
        if squares == 0:
            return {"threshold": 0.0, "magnitude": 0.0}
        return {"threshold": threshold, "magnitude": self._magnitude(deltas, threshold, squares)}

    def _magnitude(self, deltas: Stream, threshold: float, squares: float) -> float:
        require(self.alpha != "grid", "alpha", "chosen first where it says 'grid', as a chain does", self.alpha)
        if not isinstance(self.alpha, str):
            magnitude = float(torch.tensor(deviation(deltas), dtype=torch.float32) * self.alpha)
        else:
            kept, total = _tally(deltas, threshold)
            magnitude = math.sqrt(squares / kept) if self.alpha == "norm" else squares / total
        top = torch.finfo(torch.float32).max
        require(magnitude <= top, "the magnitude", f"at most {top:g}: take a smaller alpha", magnitude)
        return magnitude

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        elements = leaf.delta.numel()
        gaps, signs = _chosen(leaf.delta, facts["threshold"])
        if not gaps.size:
            return Coded({}, decoder(self))
        meta = {
            "codec": decoder(self),
            "count": gaps.size,
            "scale": float(np.float32(facts["magnitude"])).hex(),
            "shape": list(leaf.delta.shape),
        }
        streams = {"gaps": write_numbers(gaps)}
        if gaps.size > _CROWDED * elements:
            mask = squeeze(np.packbits(_spread(gaps, elements)))
            streams = streams if len(streams["gaps"]) <= len(mask) else {"mask": mask}
        return Coded(with_meta(meta, {**streams, "signs": np.packbits(signs)}), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        flat = np.zeros(math.prod(shape), dtype=np.float32)
        if parts:
            found = read_ternary(parts, shape)
            for places, negative in found.pieces():
                flat[places] = found.values(negative)
        return torch.from_numpy(flat).reshape(shape)


@dataclass(frozen=True)
class Signs:
    """A ternary tensor before it is spread out.

    places:   the gaps before its entries other than zero, or where they are as one bit per entry
    is_plane: which of both
    negative: 1 where they are negative, [count]
    scale:    their size
    """

    places: Numbers
    is_plane: bool
    negative: NDArray[np.uint8]
    scale: float

    def pieces(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Places of the entries, ascending, and their signs: as many at once as stay in a core's cache."""
        first = 0
        for places in self._from_plane() if self.is_plane else self._from_gaps():
            yield places, self.negative[first : first + places.size]
            first += places.size

    def _from_gaps(self) -> Iterator[NDArray[np.int64]]:
        steps, last = np.arange(1, _PIECE + 1), -1
        for first in range(0, self.places.size, _PIECE):
            places = np.cumsum(self.places[first : first + _PIECE], dtype=np.int64)
            places += steps[: places.size]
            places += last
            last = int(places[-1])
            yield places

    def _from_plane(self) -> Iterator[NDArray[np.int64]]:
        for first in range(0, self.places.size, _PIECE // 8):
            bits = np.unpackbits(self.places[first : first + _PIECE // 8].view(np.uint8))
            places = np.flatnonzero(bits.view(np.bool_))
            places += 8 * first
            yield places

    def values(self, negative: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`scale` or `-scale`: the bit of a sign is the highest of a float's."""
        bits = negative.astype(np.uint32) << np.uint32(31)
        bits |= np.float32(self.scale).view(np.uint32)
        return bits.view(np.float32)


def read_ternary(parts: Parts, shape: tuple[int, ...]) -> Signs:
    """What the parts of a ternary tensor say."""
    meta, elements = meta_of(parts, shape), math.prod(shape)
    count = number(meta, "count", 1, elements)
    signs = exactly(part(parts, "signs"), -(-count // 8), "signs")
    negative = np.unpackbits(signs, count=count)
    if "gaps" in parts:
        gaps = read_numbers(parts, "gaps", count)
        if int(gaps.max()) >= elements or int(gaps.sum(dtype=np.uint64)) + count > elements:
            raise Damaged(f"part 'gaps' of a ternary tensor leads beyond its {elements:,} elements")
        return Signs(gaps, False, negative, scale_of(meta))
    plane = expand(parts, "mask", -(-elements // 8))
    found = int(np.bitwise_count(plane).sum(dtype=np.int64))
    if found != count or np.unpackbits(plane[-1:])[elements % 8 or 8 :].any():
        raise Damaged(
            f"part 'mask' of a ternary tensor must have {count:,} bits set, found {found:,} or some beyond it"
        )
    return Signs(plane, True, negative, scale_of(meta))


def _pieces(delta: Tensor) -> Iterator[NDArray[Any]]:
    flat = delta.detach().cpu().reshape(-1).numpy()
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]


def _tally(deltas: Stream, threshold: float) -> tuple[int, float]:
    """How many entries are kept, and the sum of their magnitudes in float64."""
    kept, total = 0, 0.0
    for delta in deltas():
        for piece in _pieces(delta):
            magnitudes = np.abs(piece)
            chosen = magnitudes >= threshold
            kept += int(np.count_nonzero(chosen if threshold > 0 else magnitudes))
            # a product costs a third of a selection
            total += float(np.multiply(magnitudes, chosen, dtype=np.float64).sum())
    return kept, total


def _chosen(delta: Tensor, threshold: float) -> tuple[Numbers, NDArray[np.bool_]]:
    """The gaps before the entries that are kept, and which of these are negative."""
    gaps, signs, skipped = [], [], 0
    for piece in _pieces(delta):
        # of the numbers that are no zeros: a threshold of 0 keeps no zeros
        kept = np.flatnonzero(np.abs(piece) >= threshold if threshold > 0 else piece)
        if not kept.size:
            skipped += piece.size
            continue
        signs.append(np.signbit(piece[kept]))
        before = np.diff(kept, prepend=-1)
        before -= 1
        before[0] += skipped
        gaps.append(narrow(before))
        skipped = piece.size - 1 - int(kept[-1])
    if not gaps:
        return np.empty(0, np.uint8), np.empty(0, np.bool_)
    return np.concatenate(gaps), np.concatenate(signs)


def _spread(gaps: Numbers, elements: int) -> NDArray[np.bool_]:
    """True at the places that the gaps lead to."""
    mask = np.zeros(elements, dtype=np.bool_)
    mask[np.cumsum(gaps, dtype=np.int64) + np.arange(gaps.size)] = True
    return mask
