"""Ternary: ComPEFT (arXiv 2311.13171). The largest `density` of all entries keep their sign, and share one magnitude.

Selection and scale follow the released code (`compress_and_update_llama_adaptors`): one threshold for the whole
update, the entry at rank d - int(d * density) of the sorted magnitudes, `>=`, so int(d * density) + 1 entries and
all ties stay; sigma is the unbiased standard deviation of all d entries before masking; the magnitude is alpha * sigma.

Nothing is stored compressed by that code. Here a tensor is positions and signs. Positions are the gaps between kept
entries as bytes (255 continues), or one bit per entry, whichever is smaller after zstandard at level 1; signs are one
bit each and cannot be compressed. Gaps follow the local density and so beat the bound of a single global one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from tasks.choice import Choice, require
from tasks.codecs.base import Facts, Parts
from tasks.moments import deviation, power
from tasks.select import Stream, kth_magnitude

Bytes = NDArray[np.uint8]
_LEVEL = 1  # on these streams higher levels are slower and often larger
_FULL = 255  # a gap byte that continues in the next byte


@dataclass(frozen=True)
class Ternary(Choice):
    """`density`: fraction of entries kept. `alpha`: magnitude in units of sigma.

    Two data-free values of alpha come from the update itself: `norm` keeps its L2 norm, `projection` makes the dense
    update the orthogonal projection of the ternary one onto its direction. Alpha 1 suits bases of 13 B and more.
    """

    name: Literal["ternary"] = "ternary"
    version: Literal[1] = 1
    density: float = 0.2
    alpha: float | Literal["norm", "projection"] = "projection"

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "density", "between 0 and 1", self.density)
        require(isinstance(self.alpha, str) or self.alpha > 0, "alpha", "positive, 'norm' or 'projection'", self.alpha)

    def survey(self, deltas: Stream) -> Facts:
        """`threshold` and `magnitude` for the whole update."""
        count, squares = power(deltas)
        if squares == 0:
            return {"threshold": 0.0, "magnitude": 0.0}
        # 100 * density and not density: the released code counts int(d * k / 100), and so rounds like this
        dropped = count - int(count * (100 * self.density) / 100)
        threshold = kth_magnitude(deltas, max(dropped, 1))
        return {"threshold": threshold, "magnitude": self._magnitude(deltas, threshold, squares)}

    def _magnitude(self, deltas: Stream, threshold: float, squares: float) -> float:
        if not isinstance(self.alpha, str):
            return float(torch.tensor(deviation(deltas), dtype=torch.float32) * self.alpha)
        kept, total = 0, 0.0
        for delta in deltas():
            magnitudes = delta.abs()
            magnitudes = magnitudes[(magnitudes >= threshold) & (magnitudes > 0)]
            kept += magnitudes.numel()
            total += magnitudes.sum(dtype=torch.float64).item()
        return math.sqrt(squares / kept) if self.alpha == "norm" else squares / total

    def encode(self, delta: Tensor, facts: Facts) -> Parts:
        flat = delta.flatten()
        kept = (flat.abs() >= facts["threshold"]) & (flat != 0)
        positions = kept.nonzero().flatten().cpu().numpy()
        if positions.size == 0:
            return {}
        signs = (flat[kept] < 0).cpu().numpy()
        gaps = _squeeze(_write_gaps(positions))
        mask = _squeeze(np.packbits(kept.cpu().numpy()))
        places = {"gaps": gaps} if gaps.size <= mask.size else {"mask": mask}
        scale = torch.tensor([facts["magnitude"]], dtype=torch.float32)
        streams = {**places, "signs": np.packbits(signs)}
        return {"scale": scale, **{key: torch.from_numpy(stream) for key, stream in streams.items()}}

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        flat = torch.zeros(math.prod(shape))
        if parts:
            if "gaps" in parts:
                positions = _read_gaps(_expand(parts["gaps"]))
            else:
                positions = np.unpackbits(_expand(parts["mask"]), count=flat.numel()).nonzero()[0]
            negative = np.unpackbits(parts["signs"].numpy(), count=positions.size)
            values = np.where(negative, -1.0, 1.0).astype(np.float32)
            flat[torch.from_numpy(positions)] = torch.from_numpy(values) * parts["scale"]
        return flat.reshape(shape)


def _write_gaps(positions: NDArray[np.int64]) -> Bytes:
    """Entries skipped before each position: full bytes of 255, then the remainder."""
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // _FULL + 1)
    stream = np.full(ends[-1], _FULL, dtype=np.uint8)
    stream[ends - 1] = gaps % _FULL
    return stream


def _read_gaps(stream: Bytes) -> NDArray[np.int64]:
    """The inverse: running skips at the bytes that end a gap, plus the positions passed before it."""
    skipped: NDArray[np.int64] = np.cumsum(stream, dtype=np.int64)[stream != _FULL]
    skipped += np.arange(skipped.size)
    return skipped


def _squeeze(stream: Bytes) -> Bytes:
    return np.frombuffer(bytearray(zstandard.ZstdCompressor(level=_LEVEL).compress(stream.tobytes())), dtype=np.uint8)


def _expand(stream: Tensor) -> Bytes:
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stream.numpy().tobytes()), dtype=np.uint8)
