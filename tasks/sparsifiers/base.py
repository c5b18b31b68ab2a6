"""What a sparsifier is: a thinning of one tensor of one update, before any merger sees it.

Random masks come from a counter-based generator keyed by (seed, update, tensor): neither the order of merging, nor
the device, nor the number of threads changes which entries are dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.choice import Choice


@dataclass(frozen=True)
class Sparsifier(Choice):
    """The common root. `source` says where the method comes from."""

    source: ClassVar[str]

    name: str
    version: int

    def thin(self, delta: Tensor, update: str, tensor: str) -> Tensor:
        """`delta` with entries dropped and the rest rescaled: a tensor of its shape, dtype and device.

        `update` is the update's ref, `tensor` the name; with the settings they are all that decides what is dropped.
        """
        raise NotImplementedError


def uniform(delta: Tensor, seed: int, update: str, tensor: str) -> Tensor:
    """One number in [0, 1) for every entry of `delta`, float32, on its device, of the tensor's shape.

    Philox (Salmon et al. 2011), drawn on the CPU. Its raw output is used, which numpy keeps for ever, and not numpy's
    distributions, which may change: each 64-bit word gives two numbers of 24 bits, the lower half first.
    """
    key = hashlib.sha256("\0".join((str(seed), update, tensor)).encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw((delta.numel() + 1) // 2)
    halves = words.astype("<u8", copy=False).view("<u4")[: delta.numel()]
    drawn = torch.from_numpy((halves >> np.uint32(8)).astype(np.float32)) * 2**-24
    return drawn.reshape(delta.shape).to(delta.device)


def with_l1_of(delta: Tensor, thinned: Tensor) -> Tensor:
    """`thinned` scaled so that its L1 norm is that of `delta`; as it is if nothing was left."""
    before, after = (one.abs().sum(dtype=torch.float64) for one in (delta, thinned))
    return thinned * float(before / after) if after > 0 else thinned
