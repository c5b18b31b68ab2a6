"""Ternary: ComPEFT (arXiv 2311.13171). The largest `density` of all entries keep their sign, and share one magnitude.

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
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.streams import (
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
_PIECE = 1 << 18  # entries that stay in a core's cache while they are compared
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
            kept, total = 0, 0.0
            for delta in deltas():
                for piece in _pieces(delta):
                    magnitudes = np.abs(piece)
                    magnitudes = magnitudes[(magnitudes >= threshold) & (magnitudes > 0)]
                    kept += magnitudes.size
                    total += float(magnitudes.sum(dtype=np.float64))
            magnitude = math.sqrt(squares / kept) if self.alpha == "norm" else squares / total
        top = torch.finfo(torch.float32).max
        require(magnitude <= top, "the magnitude", f"at most {top:g}: take a smaller alpha", magnitude)
        return magnitude

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        places, signs = _chosen(leaf.delta, facts["threshold"])
        if places.size == 0:
            return Coded({}, decoder(self))
        meta = {
            "codec": decoder(self),
            "count": places.size,
            "scale": float(np.float32(facts["magnitude"])).hex(),
            "shape": list(leaf.delta.shape),
        }
        streams = {"gaps": write_numbers(narrow(_gaps(places)))}
        if places.size > _CROWDED * leaf.delta.numel():
            mask = squeeze(_plane(places, leaf.delta.numel()))
            streams = min(streams, {"mask": mask}, key=lambda one: len(next(iter(one.values()))))
        return Coded(with_meta(meta, {**streams, "signs": np.packbits(signs)}), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        flat = np.zeros(math.prod(shape), dtype=np.float32)
        if parts:
            found = read_ternary(parts, shape)
            sizes = np.array([found.scale, -found.scale], dtype=np.float32)
            flat[found.places] = sizes[found.negative]
        return torch.from_numpy(flat).reshape(shape)


@dataclass(frozen=True)
class Signs:
    """A ternary tensor: `places` of its entries other than zero, ascending; 1 where they are negative; their scale."""

    places: NDArray[np.int64]
    negative: NDArray[np.uint8]
    scale: float


def read_ternary(parts: Parts, shape: tuple[int, ...]) -> Signs:
    """What the parts of a ternary tensor say, before it is spread out."""
    meta, elements = meta_of(parts, shape), math.prod(shape)
    count = number(meta, "count", 1, elements)
    if "gaps" in parts:
        places = np.cumsum(read_numbers(parts, "gaps", count), dtype=np.int64)
        places += np.arange(count)
        if not (0 <= places[-1] < elements):
            raise Damaged(f"part 'gaps' of a ternary tensor leads beyond its {elements:,} elements")
    else:
        plane = expand(parts, "mask", -(-elements // 8))
        places = np.unpackbits(plane, count=elements).nonzero()[0]
        if places.size != count:
            raise Damaged(f"part 'mask' of a ternary tensor must have {count:,} bits set, found {places.size:,}")
    signs = exactly(part(parts, "signs"), -(-count // 8), "signs")
    return Signs(places, np.unpackbits(signs, count=count), scale_of(meta))


def _pieces(delta: Tensor) -> Iterator[NDArray[Any]]:
    flat = delta.detach().cpu().reshape(-1).numpy()
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]


def _chosen(delta: Tensor, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places of the entries that are kept, ascending, and which of them are negative."""
    places, signs, start = [], [], 0
    for piece in _pieces(delta):
        # of the numbers that are no zeros: a threshold of 0 keeps no zeros
        kept = np.flatnonzero(np.abs(piece) >= threshold if threshold > 0 else piece)
        signs.append(np.signbit(piece[kept]))
        places.append(kept + start)
        start += piece.size
    return np.concatenate(places or [np.empty(0, np.int64)]), np.concatenate(signs or [np.empty(0, np.bool_)])


def _gaps(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entries skipped before each place."""
    gaps = np.diff(places, prepend=-1)
    gaps -= 1
    return gaps


def _plane(places: NDArray[np.int64], elements: int) -> NDArray[np.uint8]:
    """One bit per element, set at the places."""
    mask = np.zeros(elements, dtype=np.bool_)
    mask[places] = True
    return np.packbits(mask)
