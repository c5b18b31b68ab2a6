"""Ternary: the largest entries of an update keep their signs and share one magnitude, as in ComPEFT (arXiv 2311.13171).

Selection and scale follow the released code (`compress_and_update_llama_adaptors`): one threshold for the whole
update, the entry at rank d - int(d * density) of the sorted magnitudes, `>=`, so int(d * density) + 1 entries and
all ties stay; sigma is the unbiased standard deviation of all d entries before masking; the magnitude is alpha * sigma.

Nothing is stored compressed by that code. Here a tensor is written as gaps and signs where few entries are kept, else
as four entries to a byte (tasks/codecs/signs.py). Both follow the local density, and so beat the bound of a single
global one where densities differ.
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

from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, Trial, decoder
from tasks.codecs.signs import fours_of, gaps_of, pieces_of, read_ternary
from tasks.codecs.streams import Bytes, squeeze_codes, with_meta, write_numbers
from tasks.moments import Power, deviation, power
from tasks.select import Stream, kth_magnitude

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # the grid of ComPEFT's appendix
_CROWDED = 0.25  # share of kept entries above which fours are written: as small, and many times as fast


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
    turns_factors: ClassVar[bool] = True

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
        flat, threshold = _flat(leaf.delta), facts["threshold"]
        meta = {
            "codec": decoder(self),
            "scale": float(np.float32(facts["magnitude"])).hex(),
            "shape": list(leaf.delta.shape),
        }
        found = gaps_of(flat, threshold, _CROWDED * flat.size)
        if found is None:
            return Coded(with_meta(meta, {"fours": squeeze_codes([fours_of(flat, threshold)])}), decoder(self))
        gaps, signs = found
        if not gaps.size:
            return Coded({}, decoder(self))
        streams: dict[str, Bytes | bytes] = {"gaps": write_numbers(gaps), "signs": np.packbits(signs)}
        return Coded(with_meta({**meta, "count": gaps.size}, streams), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(shape)
        return torch.from_numpy(read_ternary(parts, shape).dense()).reshape(shape)


def _tally(deltas: Stream, threshold: float) -> tuple[int, float]:
    """How many entries are kept, and the sum of their magnitudes in float64."""
    kept, total = 0, 0.0
    for delta in deltas():
        for piece in pieces_of(_flat(delta)):
            magnitudes = np.abs(piece)
            chosen = magnitudes >= threshold
            kept += int(np.count_nonzero(chosen if threshold > 0 else magnitudes))
            # a product costs a third of a selection
            total += float(np.multiply(magnitudes, chosen, dtype=np.float64).sum())
    return kept, total


def _flat(delta: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = delta.detach().cpu().reshape(-1).numpy()
    return found
