"""DARE as a codec (arXiv 2311.03099): random numbers stay, and a seed in place of their positions says which.

Which ones comes from the counter-based generator of the sparsifier of that name, keyed by the seed, the update and the
tensor: positions cost nothing, whatever the density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from storage.errors import Damaged
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.streams import exactly, meta_of, part, read_numbers, scale_of, with_meta, write_numbers
from tasks.codecs.ulps import bits_of, from_bits
from tasks.sparsifiers.base import chosen

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class SeededDare(Codec):
    """density: chance of every number to stay; those that do are divided by it. The paper's drop rate is 1 - density:
             0.9 for most models, 0.99 for large ones whose updates are small
    seed:    which ones stay
    values:  dtype of what stays
    """

    source: ClassVar[str] = "arXiv 2311.03099"

    name: Literal["dare"] = "dare"
    version: Literal[1] = 1
    density: float = 0.1
    seed: int = 0
    values: Literal["bf16", "f16", "f32"] = "bf16"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", "in (0, 1]", self.density)

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        flat = leaf.delta.detach().cpu().reshape(-1)
        kept = chosen(flat, self.density, self.seed, leaf.update, leaf.name)
        values = (flat[kept].to(torch.float32) / self.density).to(_DTYPES[self.values])
        if not values.any():
            return Coded({}, decoder(self))
        fits = bool(torch.isfinite(values).all())
        require(fits, leaf.name, f"numbers that fit into {self.values} after rescaling", float(flat.abs().max()))
        meta = {
            "codec": decoder(self),
            "density": float(self.density).hex(),
            "seed": self.seed,
            "shape": list(leaf.delta.shape),
            "tensor": leaf.name,
            "update": leaf.update,
            "values": self.values,
        }
        bits = bits_of(values)
        coded, raw = write_numbers(bits), bits.tobytes()
        return Coded(with_meta(meta, {"coded": coded} if len(coded) < len(raw) else {"raw": raw}), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        flat = torch.zeros(math.prod(shape))
        if not parts:
            return flat.reshape(shape)
        meta = meta_of(parts, shape)
        kept = _which(meta, flat)
        count, dtype = int(kept.sum()), _DTYPES.get(str(meta.get("values")))
        if dtype is None:
            raise Damaged(f"the metadata's 'values' must be one of {', '.join(_DTYPES)}, found {meta.get('values')!r}")
        width = np.dtype(f"<u{dtype.itemsize}")
        if "raw" in parts:
            raw = exactly(part(parts, "raw"), count * dtype.itemsize, "raw")
            bits = np.frombuffer(bytearray(raw.tobytes()), dtype=width)
        else:
            bits = read_numbers(parts, "coded", count)
            if bits.dtype != width:
                raise Damaged(f"part 'coded' must have numbers of {dtype.itemsize} bytes, found {bits.dtype.itemsize}")
        flat[kept] = from_bits(bits, dtype, (count,)).to(torch.float32)
        return flat.reshape(shape)


def _which(meta: dict[str, Any], flat: Tensor) -> Tensor:
    density, seed = scale_of(meta, "density"), meta.get("seed")
    if not 0 < density <= 1 or not isinstance(seed, int):
        raise Damaged(f"the metadata must have a density in (0, 1] and a seed, found {density} and {seed!r}")
    return chosen(flat, density, seed, str(meta.get("update")), str(meta.get("tensor")))
